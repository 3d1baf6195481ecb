"""The settings of a comparison: what competes, on which rows, by which means."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graftlm.errors import Finding, SettingsError, nearest

__all__ = ["OF_DATA", "TASKS", "ComparisonSettings", "read_budget"]

#: Those that are settings of the section `data` of a run file too, by the same names.
OF_DATA = ("drop_bad_rows", "format", "group", "merge_labels", "template")

#: What can be compared: a row by itself has a score there.
TASKS = ("auto", "choice", "classify", "dpo", "lm", "mlm", "regress", "reward", "seq2seq", "sft", "tag", "tfew")


@dataclass(frozen=True)
class ComparisonSettings:
    """Everything that a comparison is told; None means: decided by the comparison, and then written down.

    `budget` is the number of trained parameters beside the head, as a share of the base ("0.3%") or a count ("20000").
    `trials` learning rates are tried for each method, on validation rows. `shots` are numbers of examples shown to the
    untouched base in its prompt. `general` is a file of texts and `other` one with rows of another task: on these is
    measured what is forgotten; `mapping` and its like say which column plays which role in each. `format`,
    `drop_bad_rows`, `merge_labels`, `group` and `template` are what they are in the section `data` of a run file; a
    group is whole among the training, validation or test rows. `head` is where new heads of classifiers start: "probe",
    a regression on the training rows and the same for all, or "fresh", drawn by the seed.

    Example:
        >>> ComparisonSettings(methods=("lora", "ia3"), seeds=3).trials
        4
    """

    data: str | None = None
    base: str = "bundled"
    methods: tuple[str, ...] = ("lora", "ia3", "prefix", "bitfit")
    full: bool = True
    seeds: int = 5
    budget: str | None = None
    trials: int = 4
    steps: int | None = None
    epochs: float | None = None
    batch: int = 16
    max_length: int | None = None
    max_rows: int | None = None
    test: str | None = None
    test_rows: int | None = None
    test_share: float = 0.25
    validation_share: float = 0.2
    mapping: dict[str, str] | None = None
    format: str = "auto"
    drop_bad_rows: bool = False
    merge_labels: bool = False
    group: str | None = None
    template: str | None = None
    task: str = "auto"
    shots: tuple[int, ...] = ()
    general: str | None = None
    general_mapping: dict[str, str] | None = None
    other: str | None = None
    other_mapping: dict[str, str] | None = None
    head: str = "probe"
    dtype: str = "float32"
    threads: int | None = None
    waive: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            (self.seeds >= 1, f"seeds is {self.seeds}, wanted 1 or more", "--seeds 5"),
            (self.trials >= 1, f"trials is {self.trials}, wanted 1 or more", "--trials 4"),
            (self.batch >= 1, f"batch is {self.batch}, wanted 1 or more", "--batch 16"),
            (self.steps is None or self.steps >= 1, f"steps is {self.steps}, wanted 1 or more", "--steps 60"),
            (self.epochs is None or self.epochs > 0, f"epochs is {self.epochs}, wanted above 0", "--epochs 3"),
            (self.steps is None or self.epochs is None, "steps and epochs exclude each other", "--steps 60"),
            (0 < self.test_share < 1, f"test_share is {self.test_share}, wanted between 0 and 1", "--test-share 0.25"),
            (
                0 < self.validation_share < 1,
                f"validation_share is {self.validation_share}, wanted between 0 and 1",
                "validation_share=0.2",
            ),
            (
                self.task in TASKS,
                f"task is {self.task!r}, wanted one of {', '.join(TASKS)}",
                f"--task {(nearest(self.task, TASKS) or ['auto'])[0]}",
            ),
            (self.head in ("probe", "fresh"), f"head is {self.head!r}, wanted probe or fresh", 'head="probe"'),
            (all(k >= 0 for k in self.shots), f"shots are {self.shots}, wanted 0 or more", "--shots 4"),
        )
        faults = [Finding("U155", message, fix=fix) for met, message, fix in checks if not met]
        if self.budget is not None:
            try:
                read_budget(self.budget, 10**6)
            except SettingsError as error:
                faults += error.findings
        if faults:
            raise SettingsError(faults)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, tuples as lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }


def read_budget(text: str, base_parameters: int) -> int:
    """The number of trained parameters that `text` allows: a share of the base ("0.3%") or a count ("20k", "20000").

    Raises SettingsError (U155) for anything else.

    Example:
        >>> read_budget("0.3%", 4_737_792), read_budget("20k", 1)
        (14213, 20000)
    """
    plain = text.strip().lower().replace("_", "").replace(" ", "")
    try:
        if plain.endswith("%"):
            found = int(float(plain[:-1]) / 100 * base_parameters)
        elif plain[-1:] in ("k", "m"):
            found = int(float(plain[:-1]) * {"k": 1e3, "m": 1e6}[plain[-1]])
        else:
            found = int(plain)
    except ValueError:
        found = 0
    if found < 1:
        message = f"budget {text!r} is no share of the base and no count of parameters"
        raise SettingsError(Finding("U155", message, fix="--budget 0.3%"))
    return found
