"""The schema of a run: every setting with its type, default, hard limits, one plain line, usual range and flags.

`RunSettings` is the Python face. `SETTINGS` (by dotted name) and `FLAGS` (for a command line) are read off it, so
a setting is described in one place only. A value of None means: decided by the run, and then written down.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

__all__ = [
    "FLAGS",
    "KEYS",
    "SECTIONS",
    "SETTINGS",
    "DataSettings",
    "Flag",
    "GenerateSettings",
    "ModelSettings",
    "PreferenceSettings",
    "ReinforcementSettings",
    "RunSettings",
    "Setting",
    "TrainSettings",
]

_MOST = 1_000_000_000  # a count above this is a slip of the hand


def _about(text: str, usual: str | tuple[float, float] = "", *flags: str, **limits: Any) -> Any:
    """What is said of a field: its line, its usual range (low, high) or usual values, its flags, its hard limits."""
    said: Any = {"usual": usual, "flags": flags}
    return Field(description=text, json_schema_extra=said, **limits)


def _count(text: str, usual: str | tuple[float, float] = "", *flags: str, least: int = 1) -> Any:
    return _about(text, usual, *flags, ge=least, le=_MOST)


def _text(text: str, usual: str = "", *flags: str) -> Any:
    return _about(text, usual, *flags, min_length=1)


def _path_as_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_AsText = BeforeValidator(_path_as_text)


def _text_as_number(value: object) -> object:
    try:
        return float(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else value
    except ValueError:
        return value


_Weight = Annotated[float, BeforeValidator(_text_as_number), Gt(0), Le(1000)]


class _Section(BaseModel):
    """A group of settings: frozen, strictly typed, without unknown names; a fault is a `SettingsError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    section: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            from .faults import as_settings_error  # faults reads this module

            raise as_settings_error(error, self.section) from None

    # Tells pydantic that this initialiser adds nothing to validation: nested sections are then checked in one pass.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class DataSettings(_Section):
    """The rows to learn from and to evaluate on.

    Example:
        >>> DataSettings(path="faq.jsonl", map={"prompt": "question"}).format
        'auto'
    """

    section: ClassVar[str] = "data"

    path: Annotated[
        str | None,
        _text("File with the rows to train on, or a folder of files; without one, the bundled messages", "", "DATA"),
        _AsText,
    ] = None
    mixture: Annotated[
        dict[str, _Weight],
        _about(
            "Instead of one path several, as path=weight: of weight 0.5 half of the rows, of 2 each twice", "a.csv=2"
        ),
    ] = {}
    eval_path: Annotated[str | None, _text("File with the rows to evaluate on; without one, a share"), _AsText] = None
    test: Annotated[
        str | None,
        _text("Rows that are scored once, after training: a file, or a share of the rows such as 0.1", "0.1", "--test"),
        _AsText,
    ] = None
    format: Annotated[
        Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "text"],
        _about("Format of the data file; auto goes by its name", "auto"),
    ] = "auto"
    map: Annotated[
        dict[str, str],
        _about("Which column plays which role, as role=column", "prompt=question,completion=answer", "--map"),
    ] = {}
    eval_share: Annotated[
        float | None,
        _about("Share of the rows kept for evaluation; by itself 0.2, above 2 000 rows 0.05", (0.02, 0.3), gt=0, lt=1),
    ] = None
    group: Annotated[
        str | None, _text("Column whose equal values stay on one side: all trained on, or all held out", "author")
    ] = None
    max_rows: Annotated[int | None, _count("Most rows that are read, the first of the file", (100, 100_000))] = None
    stream: Annotated[bool, _about("Read rows while training; needs --steps", "", "--stream")] = False
    buffer: Annotated[
        int, _count("Rows of a stream of which the next one is drawn; with 1 they come as in the file", (100, 100_000))
    ] = 1000
    drop_bad_rows: Annotated[bool, _about("Leave out rows that cannot be used and list them, instead of stopping")] = (
        False
    )
    merge_labels: Annotated[bool, _about("Take labels that differ only by case or space for one label")] = False
    prompt: Annotated[
        str | None, _text("Prompt template: a text with the names of columns in braces", "{sentence} Sentiment:")
    ] = None
    label_words: Annotated[
        dict[str, str], _about("What is said of each label, as label=word; needs a prompt", "0=negative,1=positive")
    ] = {}
    template: Annotated[str | None, _text("Chat template: plain, turns or Jinja; without one, the base's own")] = None
    waive: Annotated[str | None, _text("Codes of findings that are not to stop the run", "D132,D127")] = None


class ModelSettings(_Section):
    """The base model and how its weights are held.

    Example:
        >>> ModelSettings(name="models/qwen").dtype
        'auto'
    """

    section: ClassVar[str] = "model"

    name: Annotated[str, _text("Base model: bundled, a folder or a hub id", "", "-m", "--model"), _AsText] = "bundled"
    revision: Annotated[str | None, _text("Branch, tag or commit of a base from a hub")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _about("Number type of the base's weights; auto goes by the device", "auto"),
    ] = "auto"
    quantize: Annotated[
        Literal["nf4", "fp4", "int4", "int8", "int8-dynamic"] | None,
        _about("Hold the base's weights in fewer bits, packed as they are read", "nf4", "--quantize"),
    ] = None
    device_map: Annotated[
        str | None,
        _text(
            "Lay the base over devices and disk: auto, a device",
            "auto",
            "--device-map",
        ),
    ] = None
    max_memory: Annotated[
        dict[str, str],
        _about("Most of the base that each device is to hold", "cpu=8GiB,0=20GiB", "--max-memory"),
    ] = {}
    offload_folder: Annotated[
        str | None, _text("Folder for weights on disk that are not as in the checkpoint; without one, a temporary one")
    ] = None
    trust_remote_code: Annotated[bool, _about("Run code that comes with the base model")] = False


class TrainSettings(_Section):
    """How long, how fast and on how much at once.

    Example:
        >>> TrainSettings(epochs=3, learning_rate=2e-4).batch
        16
    """

    section: ClassVar[str] = "train"

    epochs: Annotated[float | None, _about("Passes over the training rows", (1, 10), "--epochs", gt=0, le=100_000)] = (
        None
    )
    steps: Annotated[int | None, _count("Optimizer steps, instead of epochs", (100, 10_000), "--steps")] = None
    learning_rate: Annotated[
        float | None,
        _about("Peak learning rate; without one, the method's own", (1e-5, 1e-3), "--lr", ge=1e-7, le=0.3),
    ] = None
    batch: Annotated[int, _count("Rows per optimizer step", (4, 128), "--batch")] = 16
    accumulate: Annotated[int, _count("Parts that a step's rows are computed in, one after the other", (1, 32))] = 1
    max_length: Annotated[
        int | None, _count("Most tokens of a row; without one, by the data", (128, 4096), "--max-length")
    ] = None
    packing: Annotated[bool, _about("Put texts one behind the other in one row; they do not see one another")] = False
    group_by_length: Annotated[
        bool, _about("Put rows of like length into one batch: less padding, another order of rows")
    ] = False
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"],
        _about("AdamW in 32 or 8 bits, or paged", "adamw", "--optimizer"),
    ] = "adamw"
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], _about("Shape of the learning rate after the warm-up", "linear")
    ] = "linear"
    warmup: Annotated[
        float, _about("Share of the steps in which the learning rate rises to its peak", (0, 0.1), ge=0, lt=1)
    ] = 0.06
    weight_decay: Annotated[float, _about("Decoupled weight decay", (0, 0.1), ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, _about("Largest norm of the gradient", (0.3, 5), gt=0)] = 1.0
    seed: Annotated[int, _about("Seed of every random choice", "", "--seed", ge=0, le=2**32 - 1)] = 0
    eval_every: Annotated[int | None, _count("Steps between evaluations", (50, 1000))] = None
    save_every: Annotated[int | None, _count("Steps between checkpoints", (50, 1000))] = None
    keep_checkpoints: Annotated[int, _count("Checkpoints kept, the latest ones", (1, 5))] = 2
    early_stopping: Annotated[
        int | None, _count("Stop after so many evaluations without gain; without one, never", (2, 10))
    ] = None
    recompute: Annotated[
        Literal["none", "feedforward", "blocks"],
        _about(
            "What is computed twice to hold fewer activations: nothing, feed-forward parts, or whole blocks", "none"
        ),
    ] = "none"
    cache_bottom: Annotated[
        bool,
        _about(
            "Keep what the blocks below the lowest change make of each row on disk, and read it in later passes", "true"
        ),
    ] = False
    threads: Annotated[int | None, _count("Processor threads; without one, all", (1, 64))] = None
    track: Annotated[
        Literal["tensorboard", "clearml", "comet_ml", "mlflow", "neptune", "swanlab", "trackio", "wandb"] | None,
        _about("Tracker that is told the numbers of the run, beside its own files", "tensorboard", "--track"),
    ] = None


class PreferenceSettings(_Section):
    """What learning from preferences (dpo, kto) weighs.

    Example:
        >>> PreferenceSettings(beta=0.2).loss
        'sigmoid'
    """

    section: ClassVar[str] = "preferences"

    beta: Annotated[float, _about("How closely the model is held to its start", (0.05, 0.5), gt=0, le=100)] = 0.1
    loss: Annotated[Literal["sigmoid", "ipo"], _about("Form of the dpo loss", "sigmoid")] = "sigmoid"
    smoothing: Annotated[
        float, _about("Share of the pairs taken to be in the wrong order (dpo)", (0, 0.2), ge=0, lt=0.5)
    ] = 0.0
    wanted_weight: Annotated[float, _about("Weight of wanted answers (kto)", (0.5, 4), gt=0, le=1000)] = 1.0
    unwanted_weight: Annotated[float, _about("Weight of unwanted answers (kto)", (0.5, 4), gt=0, le=1000)] = 1.0


class ReinforcementSettings(_Section):
    """What learning from rewards of the model's own answers (ppo, grpo, rloo) goes by.

    Example:
        >>> ReinforcementSettings(reward="regex:^Yes").answers
        8
    """

    section: ClassVar[str] = "reinforcement"

    reward: Annotated[
        str | None,
        _text("What an answer is worth: regex:PATTERN, match:COLUMN, FILE.py:FUNCTION or model:FOLDER", "", "--reward"),
    ] = None
    answers: Annotated[int, _count("Answers sampled to each prompt", (4, 16), least=2)] = 8
    kl_weight: Annotated[float, _about("How closely the model is held to its start", (0, 0.2), ge=0, le=100)] = 0.04
    clip: Annotated[float, _about("How far a ratio of probabilities counts from 1", (0.1, 0.3), gt=0, lt=1)] = 0.2
    updates: Annotated[
        int | None, _count("Steps that learn from the same answers; without one, 4 for ppo, else 1", (1, 8))
    ] = None
    discount: Annotated[float, _about("What a reward is worth one token earlier (ppo)", (0.95, 1), gt=0, le=1)] = 1.0
    gae_lambda: Annotated[
        float, _about("How far advantages look beyond the next value (ppo): 0 not, 1 to the end", (0.9, 1), ge=0, le=1)
    ] = 0.95
    value_weight: Annotated[float, _about("Weight of the loss of values (ppo)", (0.05, 1), gt=0, le=1000)] = 0.1
    value_clip: Annotated[float, _about("How far a value counts from what it was (ppo)", (0.1, 1), gt=0, le=1000)] = 0.2


class GenerateSettings(_Section):
    """How text is written with the model.

    Example:
        >>> GenerateSettings(temperature=0.7).max_new_tokens
        96
    """

    section: ClassVar[str] = "generate"

    max_new_tokens: Annotated[int, _count("Most tokens written per answer", (32, 1024))] = 96
    temperature: Annotated[
        float, _about("Randomness of the choice of a token; 0 takes the likeliest", (0, 1), ge=0, le=10)
    ] = 0.0
    top_p: Annotated[float, _about("Share of the likelihood that is drawn from", (0.8, 1), gt=0, le=1)] = 1.0
    samples: Annotated[int, _count("Answers shown in the report", (1, 20), least=0)] = 4


class RunSettings(_Section):
    """Everything that a run is told.

    Example:
        >>> RunSettings(method="ia3", train=TrainSettings(steps=100)).train.steps
        100
    """

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    method: Annotated[
        str,
        _text("What is trained, as name(setting=value)", "", "--method"),
    ] = "lora(rank=16,targets=all-linear)"
    start: Annotated[
        str | None,
        _text("Adapter to go on with, a run's or its own folder; with a method, a new one on top of it", "", "--from"),
        _AsText,
    ] = None
    task: Annotated[
        Literal[
            "auto",
            "lm",
            "mlm",
            "sft",
            "classify",
            "regress",
            "tag",
            "seq2seq",
            "choice",
            "tfew",
            "dpo",
            "kto",
            "reward",
            "ppo",
            "grpo",
            "rloo",
        ],
        _about("What is learnt; auto goes by the columns and the base", "auto", "--task"),
    ] = "auto"
    train: TrainSettings = TrainSettings()
    preferences: PreferenceSettings = PreferenceSettings()
    reinforcement: ReinforcementSettings = ReinforcementSettings()
    generate: GenerateSettings = GenerateSettings()
    output: Annotated[
        str | None, _text("Folder of the run; without one, runs/<data>-<n>", "", "-o", "--out"), _AsText
    ] = None

    @model_validator(mode="after")
    def _agree(self) -> RunSettings:
        from .faults import contradictions, settings_error  # faults reads this module

        found = contradictions({name: setting.of(self) for name, setting in SETTINGS.items()})
        if found:
            raise settings_error(found)
        return self


@dataclass(frozen=True)
class Setting:
    """One setting as the schema has it; `kind` is the type in words, `limits` the hard range in words."""

    name: str
    kind: Literal["text", "a number", "a whole number", "true or false", "name=value pairs", "a choice"]
    default: Any
    optional: bool
    text: str
    usual: str | tuple[float, float]
    limits: str
    choices: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def section(self) -> str:
        """The section that holds it, empty for `method`, `task` and `output`."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The name within its section."""
        return self.name.rpartition(".")[2]

    @property
    def usual_text(self) -> str:
        """The usual range in words, such as `1e-5 to 1e-3`."""
        return self.usual if isinstance(self.usual, str) else " to ".join(number(bound) for bound in self.usual)

    def of(self, settings: RunSettings) -> Any:
        """This setting's value in `settings`."""
        return getattr(getattr(settings, self.section) if self.section else settings, self.key)


@dataclass(frozen=True)
class Flag:
    """One flag of the command line; everything that a click option (or argument) is made from.

    `names` are the spellings (a name in capitals is an argument), `key` is the parameter under which the value is
    handed to `resolve(flags={key: value})`, `setting` the dotted name that it sets (None for `--config`, `--set`).
    Values may stay text: `resolve` reads and checks them, so that a wrong one is told of like any other.
    """

    names: tuple[str, ...]
    key: str
    kind: str
    help: str
    setting: str | None
    choices: tuple[str, ...] = ()
    repeatable: bool = False

    @property
    def is_argument(self) -> bool:
        """Whether it stands on the command line without a dash."""
        return not self.names[0].startswith("-")

    @property
    def label(self) -> str:
        """The spelling used as the origin of a value, such as `--lr`."""
        return self.names[-1]


def number(value: float) -> str:
    """A number as people write it: `2e-4`, `0.3`, `20 000`.

    Example:
        >>> number(2e-4), number(20000), number(0.25)
        ('2e-4', '20 000', '0.25')
    """
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace(",", " ")
    mantissa, _, exponent = f"{value:.6g}".partition("e")
    if not exponent and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:.5e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


_KINDS: dict[Any, Any] = {str: "text", float: "a number", int: "a whole number", bool: "true or false"}
_LIMITS = ((Gt, "gt", "above"), (Ge, "ge", "at least"), (Lt, "lt", "below"), (Le, "le", "at most"))


def _limits(field: FieldInfo) -> str:
    return " and ".join(
        f"{word} {number(getattr(bound, attribute))}"
        for kind, attribute, word in _LIMITS
        for bound in field.metadata
        if isinstance(bound, kind) and getattr(bound, attribute) != _MOST
    )


def _settings(model: type[_Section], prefix: str = "") -> Iterator[Setting]:
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            yield from _settings(field.annotation, f"{key}.")
            continue
        annotation: Any = field.annotation
        optional = get_origin(annotation) in (Union, types.UnionType)
        if optional:
            annotation = get_args(annotation)[0]
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        about: Any = field.json_schema_extra
        yield Setting(
            name=prefix + key,
            kind="a choice" if choices else _KINDS.get(annotation, "name=value pairs"),
            default=field.default,
            optional=optional,
            text=field.description or "",
            usual=about["usual"],
            limits=_limits(field),
            choices=choices,
            flags=about["flags"],
        )


SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _settings(RunSettings)}
"""Every setting by its dotted name, in the order of the schema."""


def whole_of(name: str) -> str:
    """The setting of name=value pairs that a dotted name is one of; the name itself where it is no such one.

    Example:
        >>> whole_of("data.map.prompt"), whole_of("train.steps")
        ('data.map', 'train.steps')
    """
    pairs = (setting.name for setting in SETTINGS.values() if setting.kind == "name=value pairs")
    return next((whole for whole in pairs if name.startswith(f"{whole}.")), name)


KEYS: frozenset[str] = frozenset(setting.key for setting in SETTINGS.values())

SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(setting.section for setting in SETTINGS.values() if setting.section))


def _flag(setting: Setting) -> Flag:
    usual = f" (usually {setting.usual_text})" if isinstance(setting.usual, tuple) else ""
    key = setting.flags[-1].lstrip("-").replace("-", "_").lower()
    return Flag(setting.flags, key, setting.kind, setting.text + usual, setting.name, setting.choices)


FLAGS: tuple[Flag, ...] = (
    *(_flag(setting) for setting in SETTINGS.values() if setting.flags),
    Flag(("-c", "--config"), "config", "a file", "Run file (YAML) with settings", None),
    Flag(("--set",), "set", "name=value", "Any other setting, such as train.warmup=0.1", None, repeatable=True),
)
"""The flags that the verbs share, in the order in which help should list them."""
