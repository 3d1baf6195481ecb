"""Methods: values that choose sites of a model and build a delta for each; `+` composes them.

A method is a frozen dataclass with the field's own names for its settings. It is inert: nothing happens until `attach`.

Example:
    >>> from graftlm.methods import BitFit, LoRA
    >>> method = LoRA(rank=8) + BitFit()
    >>> str(method)
    'lora(rank=8)+bitfit'
"""

from __future__ import annotations

import contextlib
import dataclasses
import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.core.delta import Delta
from graftlm.core.sites import Site, Survey
from graftlm.errors import Finding, MethodError, nearest

__all__ = ["Method", "Part", "Samples", "Sum", "device_at", "in_eval_mode", "model_loss", "one_of"]

#: Texts that need no quotes in a method's text: they cannot be read as anything else.
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(-[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class Part:
    """One delta of an adapter: which of the method's parts made it, and where it acts."""

    method: Method
    site: Site
    delta: Delta


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    loss: Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class Samples:
    """Some of the task's data, for methods that choose by data what to change (scores, pruning).

    `batches` hold what the model is called with; `loss(model, batch)` is what training will minimise.
    """

    batches: Iterable[Mapping[str, Any]]
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] = model_loss


@dataclass(frozen=True)
class Method:
    """What to change in a model and how; subclasses choose `sites` and `build` a delta for each.

    That is enough for most. Beyond it: `build_all` for deltas that share something, `measure` for methods that look at
    data first, `penalty` and `after_step` for those that take part in training, `bake` for what is dropped on saving.
    """

    name: ClassVar[str]
    #: How people write it: "LoRA", "full fine-tuning".
    title: ClassVar[str]
    #: Learning rate used where the run names none, and the usual range around it.
    learning_rate: ClassVar[float] = 1e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)

    #: False for methods that change the model from the start (a random prompt, a pruned base).
    starts_as_identity: ClassVar[bool] = True

    def sites(self, survey: Survey) -> Sequence[Site]:
        """The sites of the surveyed model that this method changes, at least one. Raises SiteError, MethodError."""
        raise NotImplementedError

    def build(self, site: Site, module: nn.Module) -> Delta:
        """A fresh delta for `site`, whose module is `module`; created on the current default device."""
        raise NotImplementedError

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """A fresh delta for each of `sites`, each on its module's device; on the meta device without `values`.

        `modules` are all modules of the model by path ("" is the model). Override it where deltas share something.
        """
        deltas = []
        for site in sites:
            with torch.device(device_at(modules, site.path) if values else torch.device("meta")):
                deltas.append(self.build(site, modules[site.path]))
        return deltas

    @property
    def needs_samples(self) -> bool:
        """Whether `measure` must see data before the deltas are built."""
        return False

    @property
    def sample_rows(self) -> int:
        """How many rows a run gives to a method that looks at data."""
        return 64

    def measure(self, model: nn.Module, sites: Sequence[Site], samples: Samples) -> Any:
        """What `apply_measured` needs to know from the task's data; the model is as it was afterwards."""
        raise NotImplementedError

    def apply_measured(self, parts: Sequence[Part], measured: Any, model: nn.Module) -> None:
        """Set up fresh deltas by what `measure` gave; called once, before they are attached."""
        raise NotImplementedError

    @property
    def context_taken(self) -> int:
        """How many positions of the base's context its virtual tokens take."""
        return 0

    def learning_rate_factor(self, parameter: str) -> float:
        """What the run's learning rate is multiplied by for the delta's parameter of that name (LoRA+)."""
        return 1.0

    def penalty(self, parts: Sequence[Part]) -> Tensor | None:
        """A regulariser that training adds to the mean loss of a step; None for none."""
        return None

    def after_step(self, parts: Sequence[Part], step: int, total: int) -> None:
        """Take part in training: called after optimizer step `step` (from 1) of `total`, with its gradients."""

    def bake(self, part: Part) -> Part:
        """The plain form in which `part` is stored: what only training needs (a reparametrisation) is dropped."""
        return part

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one is the sum of."""
        return (self,)

    def __add__(self, other: Method) -> Method:
        """Both at once: their deltas act together."""
        if not isinstance(other, Method):
            return NotImplemented
        return Sum((*self.parts, *other.parts))

    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default:
                found[field.name] = value
        return found

    def __str__(self) -> str:
        chosen = ",".join(f"{name}={_text(value)}" for name, value in self.settings().items())
        return f"{self.name}({chosen})" if chosen else self.name

    def require(self, *checks: tuple[bool, str, str]) -> None:
        """Raise one MethodError with every check that is not met: (met, what is wrong, fix)."""
        faults = [Finding("T102", f"{self.name}: {message}", fix=fix) for met, message, fix in checks if not met]
        if faults:
            raise MethodError(faults)


def one_of(setting: str, value: Any, choices: Iterable[Any]) -> tuple[bool, str, str]:
    """The check for `Method.require` that `value` is among `choices`; its fix is the nearest of them, else the first.

    Example:
        >>> one_of("start", "pisa", ["default", "pissa"])
        (False, "start 'pisa' is none of default, pissa", 'start=pissa')
    """
    known = [str(choice) for choice in choices]
    close = nearest(str(value), known) or known
    return value in known, f"{setting} {value!r} is none of {', '.join(known)}", f"{setting}={close[0]}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(item) for item in value) + "]"
    if isinstance(value, str) and not _bare(value):
        return repr(value)
    return str(value)


def _bare(text: str) -> bool:
    """Whether `text` is read as itself without quotes: words of Python's own (`global`) are not."""
    words = text.split("-")
    return bool(_WORD.fullmatch(text)) and not any(keyword.iskeyword(each) for each in (*words, text.capitalize()))


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; every module has its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_at(modules: Mapping[str, nn.Module], path: str) -> torch.device:
    """Where the module at `path` computes; for one without tensors (a dropout), where the module around it does."""
    tensor = None
    while tensor is None:
        module = modules.get(path)
        if module is not None:
            tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
        if not path:
            break
        path = path.rpartition(".")[0]
    if tensor is None:
        return torch.device("cpu")
    if tensor.is_meta and module is not None:
        # What lies on disk or in other memory (accelerate's hooks) is brought to a device for each call.
        for inner in module.modules():
            device = getattr(getattr(inner, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return tensor.device


@dataclass(frozen=True)
class Sum(Method):
    """Several methods at once, made by `+`; linear ports sum, parameters add up their changes."""

    name: ClassVar[str] = "sum"
    title: ClassVar[str] = "sum"
    methods: tuple[Method, ...]

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods summed, in the order they were written."""
        return self.methods

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.methods)
