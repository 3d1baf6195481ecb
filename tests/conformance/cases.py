"""The grid of the conformance suite: every method with example settings, variants and sums, times every tiny model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from graftlm.core import Adapter, LinearDelta, Method, Site, Survey
from graftlm.errors import NotMergeable
from graftlm.methods import (
    IA3,
    MAM,
    METHODS,
    AdaLoRA,
    Attempt,
    BitFit,
    DoRA,
    Full,
    Gated,
    Head,
    Last,
    Layers,
    LoRA,
    LoRAPlus,
    Modules,
    NormTuning,
    OLoRA,
    ParallelAdapter,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    Prune,
    PTuning,
    ReZero,
    RsLoRA,
    SeriesAdapter,
    Sparse,
    TrainableTokens,
    UniPELT,
    VeRA,
)
from models_for_tests import DECODERS, MODELS

#: Example settings of every entry of METHODS; `test_examples_are_complete` fails for a method without one.
EXAMPLES: dict[str, Method] = {
    "prune": Prune(0.3),
    "sparse": Sparse(fraction=0.05),
    "tokens": TrainableTokens(ids=[*range(5, 60, 2)]),
    "vera": VeRA(rank=8),
    "adalora": AdaLoRA(rank=4, target_rank=2),
    "attempt": Attempt(length=2, sources=3, bottleneck=4, temperature=2.0),
    "bitfit": BitFit(),
    "dora": DoRA(rank=4),
    "full": Full(),
    "head": Head(),
    "ia3": IA3(),
    "last": Last(1),
    "layers": Layers("-1:"),
    "lora": LoRA(rank=4),
    "loraplus": LoRAPlus(rank=4),
    "modules": Modules("norm"),
    "norm": NormTuning(),
    "prefix": PrefixTuning(length=3),
    "prompt": PromptTuning(length=3),
    "ptuning": PTuning(length=3),
    # A small scale: noise on factors as large as these moves T5's unscaled attention far.
    "olora": OLoRA(rank=4, alpha=2.0),
    "pissa": PiSSA(rank=4, alpha=2.0),
    "rslora": RsLoRA(rank=4, alpha=3.0),
    "parallel": ParallelAdapter(width=5),
    "series": SeriesAdapter(width=5),
    "gated": Gated(LoRA(rank=4)),
    "mam": MAM(length=2, mlp=8, width=5),
    "rezero": ReZero(LoRA(rank=4)),
    "unipelt": UniPELT(length=2, mlp=8, reduction=8, rank=3),
}

#: Settings that take other paths through a method, and sums.
VARIANTS: dict[str, Method] = {
    "sparse-random": Sparse(fraction=0.02, score="random", scope="tensor", targets="attention"),
    "prune+lora": Prune(pattern="2:4", targets="output") + LoRA(rank=2),
    "prune+sparse": Prune(0.4, scope="tensor") + Sparse(fraction=0.05),
    "ia3+prefix": IA3() + PrefixTuning(length=2),
    "series+prompt": SeriesAdapter(width=4) + PromptTuning(length=2),
    "lora-all": LoRA(rank=3, targets="all-linear"),
    "lora-patterns": LoRA(rank=4, rank_pattern={r".*\.1\..*": 2}, alpha_pattern={r".*\.0\..*": 5.0}),
    "lora-dropout": LoRA(rank=4, dropout=0.3),
    "lora-bias": LoRA(rank=4, bias=True),
    "lora-gaussian": LoRA(rank=4, start="gaussian"),
    "lora-parts": LoRA(rank=3, targets="query,value"),
    "lora-experts": LoRA(rank=2, targets="experts"),
    "dora-parts": DoRA(rank=3, targets="query,value", dropout=0.2),
    "pissa-parts": PiSSA(rank=3, targets="query,value", rslora=True),
    "lora-embed": LoRA(rank=4, targets="embed"),
    "lora-head": LoRA(rank=2, targets="head"),
    "lora-last-layer": LoRA(rank=4, targets="all-linear", layers="-1:"),
    "modules-embed": Modules("embed"),
    "tokens+prompt": TrainableTokens(ids=[6, 9, 40, 41, 42, 43]) + PromptTuning(length=2),
    "tokens+lora+modules": TrainableTokens(ids=[*range(60, 4, -3)]) + LoRA(rank=2, targets="embed") + Modules("embed"),
    "lora+head": LoRA(rank=4) + Head(),
    "dora+modules": DoRA(rank=4, targets="all-linear") + Modules(["attention", "norm"]),
    "lora+bitfit": LoRA(rank=4, targets="all-linear") + BitFit(),
    "lora+full": LoRA(rank=4, targets="all-linear") + Full(),
    "lora+modules": LoRA(rank=4) + Modules(["norm", "embed"]),
    "bitfit+head": BitFit() + Head(),
    "ia3-queries": IA3(targets="query", feedforward=[]),
    "ia3+lora": IA3() + LoRA(rank=2, targets="key,output"),
    "bitfit-existing": BitFit(add=False),
    "bitfit-norms": BitFit(norms=True),
    "bitfit-parts": BitFit("query,value"),
    "prefix-mlp": PrefixTuning(length=3, mlp=8),
    "prompt-end": PromptTuning(length=2, position="end"),
    "prompt-both": PromptTuning(length=2, position="after-bos", stack="both"),
    "ptuning-mlp": PTuning(length=3, encoder="mlp", hidden=5),
    "prefix+prompt+lora": PrefixTuning(length=2) + PromptTuning(length=3, start="uniform") + LoRA(rank=2),
    "series-pfeiffer": SeriesAdapter(reduction=8, variant="pfeiffer"),
    "series-lin": SeriesAdapter(width=5, variant="lin", dropout=0.2),
    "series-near-identity": SeriesAdapter(width=5, start="near-identity", layers="-1:"),
    "parallel-attention": ParallelAdapter(width=5, targets="attention,ffn"),
    "series+parallel+lora": SeriesAdapter(width=3) + ParallelAdapter(width=5, targets="attention") + LoRA(rank=2),
    "rezero-sum": ReZero(
        LoRA(rank=2, targets="query,value") + SeriesAdapter(width=3) + ParallelAdapter(width=5), shared=True
    ),
    "rezero-norm": ReZero(Modules("norm"), start=0.5),
}

CASES: dict[str, Method] = {
    **{name: EXAMPLES[name] if name in EXAMPLES else METHODS[name]() for name in METHODS},
    **VARIANTS,
}

_NO_BIAS = (
    "llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "t5", "t5_gated", "mixtral", "qwen3_moe",
    "llama_classifier", "modernbert",
)  # fmt: skip

#: (case, model) -> the code (or codes) of the error with which the method honestly says that it does not fit.
REFUSALS: dict[tuple[str, str], str] = {
    # Bloom's attention code does not say which columns of its fused map are keys.
    **{(case, "bloom"): "C105" for case in ("ia3", "ia3-queries", "ia3+lora", "bitfit-parts")},
    ("ia3+prefix", "bloom"): "C105 T150",
    **{(case, "bloom"): "C105" for case in ("lora-parts", "dora-parts", "pissa-parts")},  # its roles come from names
    **{("lora-experts", model): "C101" for model in MODELS if model not in ("mixtral", "qwen3_moe")},
    **{(case, model): "T109" for case in ("bitfit-existing",) for model in _NO_BIAS},
    **{(case, "bloom"): "T150" for case in ("prefix", "prefix-mlp", "prefix+prompt+lora")},
    **{("attempt", model): "T154" for model in DECODERS},
    # Bloom's blocks hide the add behind their feed-forward part.
    **{(case, "bloom"): "T140" for case in ("series-pfeiffer", "series-lin")},
    **{("mam", "bloom"): "T150", ("rezero-sum", "bloom"): "C105", ("unipelt", "bloom"): "T150 T140 C105"},
}

#: Cases of which the merged weights need a bias that the plain model has no place for.
ADDS_BIAS = {"lora-bias", "bitfit", "bitfit-parts", "bitfit-norms", "lora+bitfit", "bitfit+head"}


def grid(cases: dict[str, Method] | None = None, models: tuple[str, ...] = tuple(MODELS)) -> pytest.MarkDecorator:
    """Parametrise over (case, model) pairs that fit together."""
    chosen = CASES if cases is None else cases
    pairs = [(case, model) for model in models for case in chosen if (case, model) not in REFUSALS]
    return pytest.mark.parametrize(("case", "model_name"), pairs, ids=[f"{model}-{case}" for case, model in pairs])


def cross(cases: dict[str, Method] | None = None) -> pytest.MarkDecorator:
    """The grid, of which the usual run takes every case on a few unlike models, and a few cases on every model."""
    chosen = CASES if cases is None else cases
    few_models, few_cases = ("qwen2", "gpt2", "roberta", "t5"), ("lora", "bitfit", "full")
    pairs = [
        pytest.param(
            case, model, id=f"{model}-{case}",
            marks=() if model in few_models or case in few_cases else pytest.mark.slow,
        )
        for model in MODELS
        for case in chosen
        if (case, model) not in REFUSALS
    ]  # fmt: skip
    return pytest.mark.parametrize(("case", "model_name"), pairs)


def starts_as_identity(method: Method) -> bool:
    """Whether the model computes the same right after `method` is attached."""
    return all(part.starts_as_identity for part in method.parts)


def merges(adapter: Adapter) -> bool:
    """Merge `adapter` where it can be; else see that it is refused before anything changes."""
    before = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    refused: NotMergeable | None = None
    try:
        adapter.merge()
    except NotMergeable as error:
        refused = error
    if refused is not None:
        assert refused.findings[0].code == "R201"
        assert all(torch.equal(value, before[key]) for key, value in adapter.model.state_dict().items())
        assert not adapter.merged
    return refused is None


def only(*names: str) -> dict[str, Method]:
    """Some of the cases."""
    return {name: CASES[name] for name in names}


# --- methods that exist for the tests alone -------------------------------------------------------------------------


class ScaleDelta(LinearDelta):
    """Scales a map's input and output; the only delta here with a `before` and an `after`."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.ones(width_in))
        self.outer = nn.Parameter(torch.ones(width_out))

    def before(self, x: Tensor) -> Tensor:
        return x * self.inner.to(x.dtype)

    def after(self, y: Tensor) -> Tensor:
        return y * self.outer.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.outer[:, None] * weight * self.inner, None if bias is None else bias * self.outer


@dataclass(frozen=True)
class Scale(Method):
    """Scale the chosen maps' inputs and outputs."""

    name = "scale"
    targets: str = "attention"

    def sites(self, survey: Survey) -> list[Site]:
        return survey.select(self.targets)

    def build(self, site: Site, module: nn.Module) -> ScaleDelta:
        return ScaleDelta(site.in_features, site.out_features)


class UnfoldableDelta(LinearDelta):
    """Adds a bent change, which no weight can hold."""

    def __init__(self, width_out: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width_out))

    def after(self, y: Tensor) -> Tensor:
        return y + torch.tanh(y) * self.shift.to(y.dtype)


@dataclass(frozen=True)
class Unfoldable(Method):
    """A method that cannot be merged."""

    name = "unfoldable"

    def sites(self, survey: Survey) -> list[Site]:
        return survey.select("output")

    def build(self, site: Site, module: nn.Module) -> UnfoldableDelta:
        return UnfoldableDelta(site.out_features)


@dataclass(frozen=True)
class Breaking(Method):
    """A method that fails while its deltas are built, after `good` of them."""

    name = "breaking"
    good: int = 3

    def sites(self, survey: Survey) -> list[Site]:
        return survey.select("all-linear")

    def build(self, site: Site, module: nn.Module) -> ScaleDelta:
        self.built.append(site)
        if len(self.built) > self.good:
            raise RuntimeError("out of memory")
        return ScaleDelta(site.in_features, site.out_features)

    def __post_init__(self) -> None:
        object.__setattr__(self, "built", [])
