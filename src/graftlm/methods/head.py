"""Head: the modules outside the backbone are trained (a "linear probe"), or swapped for fresh ones.

A head belongs to its adapter: it is saved, routed and loaded with it, so each may have its own labels.
Parameters: the head's, or `outputs` (in + 1) in its last map. Start: the base's values, or normal with standard
deviation 0.02 and zero biases, as BERT's authors start a head, or a regression on what the base makes of some training
rows: logistic of classes, of each label where a row may have several, ridge of numbers. A head that already points
somewhere gives the body gradients of use from the first step, where one drawn anew pulls it about at random
("Fine-Tuning can Distort Pretrained Features", Kumar et al. 2022, section 4: linear probing, then fine-tuning; the
regression is ours in place of their gradient descent, and so is that it is shrunk until its logits differ by a tenth of
a nat from row to row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from graftlm.core import Delta, Part, Samples, Site, Survey, WholeParameterDelta, in_eval_mode, one_of
from graftlm.core.kind import LANGUAGE, head_kind
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import Parameters
from graftlm.methods.regression import fit_logistic, fit_ridge

__all__ = ["FreshDelta", "Head"]

#: The standard deviation over rows, in nats, that logits have at most when a regression starts the head.
_SPREAD = 0.1


@dataclass(frozen=True)
class Head(Parameters):
    """Train the head: the modules outside the backbone (classifier, score), or the output embedding.

    `outputs` gives the last map of a classification head that many outputs, whatever the base has (logits then have
    that width: compute the loss from them, since the model's own loss counts on its configuration's labels);
    `start=fresh` forgets the base's head; `start=probe` regresses the labels of some training rows on what the base's
    body makes of them, and starts the last map there: classes of rows or of tokens, several labels, or numbers. A head
    of another width cannot be merged.

    Example:
        >>> print(Head(outputs=5))
        head(outputs=5)
    """

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "head only"
    learning_rate: ClassVar[float] = 2e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-1)

    outputs: int | None = None
    start: str = "base"

    def __post_init__(self) -> None:
        self.require(
            (
                self.outputs is None or (isinstance(self.outputs, int) and self.outputs >= 1),
                f"outputs {self.outputs!r} is not a whole number from 1",
                "outputs=2",
            ),
            one_of("start", self.start, ("base", "fresh", "probe")),
            (
                self.start != "probe" or self.outputs is None,
                "start=probe finds as many outputs as the base has, and outputs asks for others",
                "outputs=None",
            ),
        )

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        """True where the base's own head is trained on."""
        return self.outputs is None and self.start == "base"

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the head, those of its last map last."""
        maps = [site for site in survey.with_role("head") if site.kind in ("linear", "conv1d")]
        if not survey.with_role("head"):
            raise MethodError(Finding("T110", f"head: {survey.model_name} has no head beside its backbone"))
        if self.start == "probe" and (head_kind(survey.model_name) in LANGUAGE or not maps):
            message = f"head(start=probe): the head of {survey.model_name} does not tell classes"
            raise MethodError(Finding("T165", message, fix="head"))
        found = survey.select_parameters("head")
        if self.outputs is None:
            return found
        if head_kind(survey.model_name) in LANGUAGE or not maps:
            raise MethodError(
                Finding("T160", f"head: outputs={self.outputs} cannot be had in {survey.model_name}, whose head "
                        "gives a number to each token of the vocabulary", fix="head")
            )  # fmt: skip
        last = maps[-1].path
        return [*(site for site in found if site.path != last), *(site for site in found if site.path == last)]

    def build(self, site: Site, module: nn.Module) -> WholeParameterDelta:
        """A trained copy of the parameter at `site`, or a fresh one."""
        delta = super().build(site, module)
        return FreshDelta(delta.value, delta.value.shape) if self.start == "fresh" else delta

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """A delta for each parameter; those of the last map with `outputs` rows."""
        deltas = super().build_all(sites, modules, values=values)
        if self.outputs is None:
            return deltas
        for at, (site, delta) in enumerate(zip(sites, deltas, strict=True)):
            if site.path == sites[-1].path:
                assert isinstance(delta, WholeParameterDelta)
                with delta.value.device:
                    deltas[at] = FreshDelta(delta.value, torch.Size((self.outputs, *delta.value.shape[1:])))
        return deltas

    @property
    def needs_samples(self) -> bool:
        """True for a regression."""
        return self.start == "probe"

    @property
    def sample_rows(self) -> int:
        """Few hundred rows settle a regression; it is the widths of bodies that ask for them."""
        return 512 if self.needs_samples else super().sample_rows

    def measure(self, model: nn.Module, sites: Sequence[Site], samples: Samples) -> tuple[Tensor, Tensor]:
        """What the last map reads of each row or token, [n, in], and its class or number, [n], or labels, [n, outputs].

        Raises MethodError (T165) where the labels are neither, or all rows have the same.
        """
        seen: list[Tensor] = []
        read, known = [], []
        last = model.get_submodule(_last_map(sites).path)
        handle = last.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float().cpu()))
        try:
            with in_eval_mode(model), torch.no_grad():
                for batch in samples.batches:
                    seen.clear()
                    samples.loss(model, batch)
                    labels = batch.get("labels")
                    if labels is None or len(seen) != 1 or labels.dim() > 2:
                        message = "head(start=probe): this task has no labels of rows or tokens"
                        raise MethodError(Finding("T165", message, fix="head"))
                    x, y = _rows_of(seen[0], labels.cpu(), batch)
                    if len(x) != len(y):
                        message = "head(start=probe): this task scores several texts for one label"
                        raise MethodError(Finding("T165", message, fix="head"))
                    read.append(x)
                    known.append(y)
        finally:
            handle.remove()
        x, y = torch.cat(read), torch.cat(known)
        if bool((y == y[:1]).all()):
            message = f"head(start=probe): all {len(y)} rows looked at have one label"
            raise MethodError(Finding("T165", message, fix="head, or more rows"))
        return x, y

    def apply_measured(self, parts: Sequence[Part], measured: Any, model: nn.Module) -> None:
        """Start the last map at the regression's solution."""
        path = _last_map([part.site for part in parts]).path
        last = [part for part in parts if part.site.path == path]
        own = {part.site.parameter: cast(WholeParameterDelta, part.delta).value for part in last}
        x, y = measured
        outputs, with_bias = len(own["weight"]), "bias" in own
        if not y.is_floating_point():
            weight, bias = _regression(x, y, outputs, with_bias=with_bias)
        elif y.dim() == 2 and y.shape[1] > 1:
            weight, bias = _each_label(x, y, with_bias=with_bias)
        else:
            weight, bias = _numbers(x, y.reshape(-1), with_bias=with_bias)
        # The direction counts. At a regression's own size, which narrow features make large, the body's first steps
        # move the logits by too much: on SST-2 the five methods that were tried end lower from there.
        spread = (x @ weight.T).var(0)
        if y.is_floating_point():
            # Each label has a logit of its own, which dropout in training moves by what the features' means weigh.
            dropped = max((part.p for part in model.modules() if isinstance(part, nn.Dropout)), default=0.0)
            spread = spread + dropped / max(1 - dropped, 1e-3) * ((x**2) @ (weight.T**2)).mean(0)
        smaller = min(1.0, _SPREAD / max(float(spread.sqrt().mean()), 1e-12))
        weight, bias = smaller * weight, smaller * bias
        with torch.no_grad():
            own["weight"].copy_(weight)
            if "bias" in own:
                own["bias"].copy_(bias)


def _last_map(sites: Sequence[Site]) -> Site:
    """The weight that gives the logits."""
    return next(site for site in reversed(sites) if site.parameter == "weight")


def _rows_of(x: Tensor, labels: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Features [n, in] and classes [n] of the rows, or of the tokens that have a label."""
    if labels.dim() == 2 and labels.shape[1] > 1 and not labels.is_floating_point():
        return x[labels >= 0], labels[labels >= 0]
    if x.dim() == 3:  # heads of decoders read every position, and the last one counts
        mask = batch["attention_mask"].cpu()
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        x = x[torch.arange(len(x)), last] if x.shape[1] > 1 else x[:, 0]  # where that one alone is handed over
    return x, labels if labels.is_floating_point() else labels.reshape(-1)


def _regression(x: Tensor, y: Tensor, outputs: int, *, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Weight [outputs, in] and bias [outputs] of a logistic regression, its strength chosen by cross-validation."""
    found, slopes, offsets = _logistic(x, y, with_bias=with_bias)
    if len(slopes) == 1:  # two classes have one slope: half of it each
        slopes, offsets = torch.cat([-slopes / 2, slopes / 2]), torch.cat([-offsets / 2, offsets / 2])
    weight, bias = torch.zeros(outputs, x.shape[1]), torch.full((outputs,), float(offsets.min()))
    classes = torch.tensor(found.classes_)
    weight[classes], bias[classes] = slopes, offsets
    return weight, bias


def _each_label(x: Tensor, y: Tensor, *, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Weight [labels, in] and bias [labels] of a logistic regression for each label that varies."""
    weight, bias = torch.zeros(y.shape[1], x.shape[1]), torch.zeros(y.shape[1])
    for at, column in enumerate((y > 0.5).int().T):
        if 0 < int(column.sum()) < len(column):
            _, slopes, offsets = _logistic(x, column, with_bias=with_bias)
            weight[at], bias[at] = slopes[0], offsets[0]
    return weight, bias


def _numbers(x: Tensor, y: Tensor, *, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Weight [1, in] and bias [1] of a ridge regression, its strength chosen by cross-validation."""
    slopes, offsets = _unscaled(fit_ridge(x.numpy(), y.tolist(), intercept=with_bias), with_bias=with_bias)
    return slopes.reshape(1, -1), offsets.reshape(1)


def _logistic(x: Tensor, y: Tensor, *, with_bias: bool) -> tuple[Any, Tensor, Tensor]:
    """The regression of classes [n] on features [n, in], and its slopes [classes or 1, in] and offsets."""
    fit = fit_logistic(
        x.numpy(),
        y.tolist(),
        strengths=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        scaled=True,
        intercept=with_bias,
        iterations=1000,
        judged_by="neg_log_loss",
    )
    return fit[-1], *_unscaled(fit, with_bias=with_bias)


def _unscaled(fit: Any, *, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Slopes and offsets of a pipeline of scaler and regression, for features as they come."""
    scaler, found = fit[0], fit[-1]
    slopes = torch.tensor(found.coef_ / scaler.scale_, dtype=torch.float32)
    if not with_bias:
        return slopes, torch.zeros(slopes.shape[:-1])
    return slopes, torch.tensor(found.intercept_ - found.coef_ @ (scaler.mean_ / scaler.scale_), dtype=torch.float32)


class FreshDelta(WholeParameterDelta):
    """A parameter that forgets the base's value, in the base's shape or in `shape`."""

    def __init__(self, base: torch.Tensor, shape: torch.Size) -> None:
        super().__init__(torch.empty(shape, dtype=torch.float32))
        self.folds = shape == base.shape
        self.why_not = "" if self.folds else f"it has {shape[0]} outputs where the base has {base.shape[0]}"
        if base.dim() > 1:
            nn.init.normal_(self.value, std=0.02)
        else:
            nn.init.zeros_(self.value)
