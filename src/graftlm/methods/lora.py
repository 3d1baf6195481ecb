r"""LoRA: a low-rank change beside a frozen linear map (Hu et al. 2021, "LoRA: Low-Rank Adaptation...").

    y = W x + b + s B A drop(x),   A in R^{r x in},  B in R^{out x r},  s = alpha / r   (section 4.1)

Start: A uniform in +-1/sqrt(in) (kaiming_uniform with a = sqrt 5, as in the authors' code; the paper says Gaussian),
B zero, so the change starts at zero. On an embedding A is zero and B normal: y = E[x] + s B A[:, x] (authors' code).
On a fused map (qkv) the change is one rank-r product over the whole map, as in PEFT; at a part of it (`targets=query`)
it is one for that part, as in the authors' code. On experts (3-D parameters) each expert has its own A and B, in PEFT's
layout. Parameters: r (in + out) a site, and r (in + out) an expert.

Variants, each a setting and a name of its own:

- `rslora`: s = alpha / sqrt(r) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA").
- `plus`: B learns at `plus` times the learning rate of A (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of
  Large Models"; 16 in the authors' code).
- `start=gaussian`: A normal with standard deviation 1/r (PEFT's).
- `start=pissa`: s B A starts as the r largest singular directions of W (Meng et al. 2024, "PiSSA: Principal Singular
  Values and Singular Vectors Adaptation"): W = U S V^T, B0 = U_r sqrt(S_r / s), A0 = sqrt(S_r / s) V_r^T.
- `start=olora`: B0 and A0 are the first r columns and rows of W = Q R (Bueyuekakyuez 2024, "OLoRA: Orthonormal Low-Rank
  Adaptation of Large Language Models").
- `start=loftq`: on a base that was packed while it was read, s B A starts as the best change of rank r towards the
  weight W that was packed: of the singular values of W - Q, where Q is what the codes stand for (Li et al. 2023,
  "LoftQ: LoRA-Fine-Tuning-aware Quantization for Large Language Models", algorithm 1 with T = 1). W is read from its
  file again, one map at a time. The paper goes on and packs W - s B A anew, T = 5 times; that base would be another
  one than the packed one, and the adapter's file alone would not be the model. So does `replace_lora_weights_loftq`
  of peft.

The papers of PiSSA and OLoRA move W to W - s B0 A0, so that the model is the same at the start. Here the base stays as
it is, and the change is s (B A - B0 A0) = s (B (A - A0) + (B - B0) A0): the same function, in which nothing is lost
where W is stored in few bits, and only small numbers are cast. On saving, `bake` writes it as a plain LoRA of rank 2r.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import Delta, LinearDelta, LowRank, Method, ParameterDelta, Part, Site, Survey, Targets, dense, one_of
from graftlm.core.junction import columns_of
from graftlm.core.storage import is_packed, source_weight
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import need_values, output_scale

__all__ = [
    "ExpertsLoRADelta", "LoRA", "LoRADelta", "LoRAEmbeddingDelta", "LoRAPlus", "OLoRA", "PiSSA", "RsLoRA",
    "draw", "start_of", "weight_at",
]  # fmt: skip

#: Starts that A and B take from the base's weight.
_FROM_WEIGHT = ("pissa", "olora")
_STARTS = ("default", "gaussian", *_FROM_WEIGHT, "loftq")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of linear maps, embeddings and experts.

    `rank_pattern` and `alpha_pattern` give single sites another rank or alpha: the keys are module names, dotted
    suffixes or regular expressions, as in PEFT. `bias=True` adds a trained bias to each change (PEFT's `lora_bias`).
    `start` and `plus` are explained above; `rslora`, `loraplus`, `pissa` and `olora` are this with other defaults.
    `targets=experts` means the 3-D parameters in which transformers keeps the experts of a layer.

    Example:
        >>> print(LoRA(rank=16, targets="all-linear", rslora=True))
        lora(rank=16,targets=all-linear,rslora=True)
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    learning_rate: ClassVar[float] = 5e-4
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "attention"
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()
    rslora: bool = False
    bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    start: str = "default"
    plus: float = 1.0

    def __post_init__(self) -> None:
        ranks = (self.rank, *self.rank_pattern.values())
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        self.require(
            (all(map(_is_regex, patterns)), f"a pattern of {', '.join(patterns)} is not a regular expression", ""),
            (
                all(isinstance(r, int) and r >= 1 for r in ranks),
                f"rank {self.rank!r} is not a whole number from 1",
                "rank=8",
            ),
            (self.alpha > 0, f"alpha {self.alpha} is not above 0", "alpha=16"),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.05"),
            one_of("start", self.start, _STARTS),
            (self.plus > 0, f"plus {self.plus} is not above 0", "plus=16"),
        )

    def sites(self, survey: Survey) -> list[Site]:
        """The linear maps, embeddings and experts that `targets` name in `layers`."""
        kinds = ("linear", "conv1d", "embedding", "experts")
        sites = survey.select(self.targets, layers=self.layers, exclude=self.exclude, kinds=kinds)
        faults = [
            Finding("T106", f"{self.name}: {pattern!r} in {kind} matches none of the {len(sites)} sites")
            for kind, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern in patterns
            if not any(_named(pattern, _address(site)) for site in sites)
        ]
        faults += [fault for site in sites for fault in self.misfits(site)]
        if faults:
            raise MethodError(faults)
        return sites

    def misfits(self, site: Site) -> list[Finding]:
        """Why these settings cannot be had at `site`; empty where they can."""
        faults = []
        if self.bias and site.kind == "embedding":
            faults.append(
                Finding("T107", f"{self.name}: bias=True has no meaning on the embedding {site.path}", fix="bias=False")
            )
        decomposes = self.start in (*_FROM_WEIGHT, "loftq")
        if decomposes and site.kind in ("embedding", "experts"):
            faults.append(
                Finding(
                    "T131",
                    f"{self.name}: start={self.start} is for linear maps, and {site.key} is "
                    f"{'an embedding' if site.kind == 'embedding' else 'a stack of experts'}",
                    fix="start=default",
                )
            )
        elif decomposes and self.rank_at(_address(site)) > min(site.in_features, site.out_features):
            faults.append(
                Finding(
                    "T132",
                    f"{self.name}: {site.key} is {site.out_features} x {site.in_features} and has no "
                    f"{self.rank_at(_address(site))} directions to start from",
                    fix=f"rank={min(site.in_features, site.out_features)}",
                )
            )
        if site.kind == "experts" and (self.dropout or self.bias):
            setting = "bias=True" if self.bias else f"dropout={self.dropout}"
            faults.append(
                Finding(
                    "T134",
                    f"{self.name}: {setting} cannot be had on the experts {site.key}, whose weights change",
                    fix="bias=False" if self.bias else "dropout=0",
                )
            )
        return faults

    def rank_at(self, path: str) -> int:
        """The rank at the site `path`."""
        return next((rank for pattern, rank in self.rank_pattern.items() if _named(pattern, path)), self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha at the site `path`."""
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if _named(pattern, path)), self.alpha)

    def scale_at(self, path: str) -> float:
        """The factor s of the change at the site `path`."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.rslora else rank)

    def build(self, site: Site, module: nn.Module) -> Delta:
        """A fresh low-rank change for `site`."""
        rank, scale = self.rank_at(_address(site)), self.scale_at(_address(site))
        if site.kind == "experts":
            return ExpertsLoRADelta(site, module, rank, scale, self.start)
        if site.kind == "embedding":
            return LoRAEmbeddingDelta(site.in_features, site.out_features, rank, scale, output_scale(module))
        delta = LoRADelta(site.in_features, site.out_features, rank, scale, self.dropout, self.bias, self.start)
        if self.start in _FROM_WEIGHT and not delta.lora_A.is_meta:
            delta.begin(*start_of(weight_at(site, module, self.name), self.start, rank, scale))
        elif self.start == "loftq" and not delta.lora_A.is_meta:
            down, up = start_of(missing_at(site, module, self.name), "pissa", rank, scale)
            with torch.no_grad():
                delta.lora_A.copy_(down)
                delta.lora_B.copy_(up)
        return delta

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]  # it depends on a setting
        """Whether nothing changes at first: not where it makes up for what packing lost."""
        return self.start != "loftq"

    def learning_rate_factor(self, parameter: str) -> float:
        """`plus` for B and its bias, one for A."""
        return self.plus if parameter in ("lora_B", "lora_bias") else 1.0

    def bake(self, part: Part) -> Part:
        """A change that started from the weight as a plain LoRA of twice the rank: [A - A0; A0] and [B, B - B0]."""
        delta = part.delta
        if not isinstance(delta, LoRADelta) or delta.start_down is None:
            return part
        method = self.baked
        with torch.device("meta"):
            plain = method.build(part.site, nn.Module())
        assert isinstance(plain, LoRADelta)
        down, up = delta.factors()
        plain.lora_A = nn.Parameter(down.detach(), requires_grad=False)
        plain.lora_B = nn.Parameter(up.detach(), requires_grad=False)
        plain.lora_bias = delta.lora_bias
        return Part(method, part.site, plain)

    @cached_property
    def baked(self) -> LoRA:
        """The plain LoRA that a change from a weight's start is stored as: twice the rank, the same scale."""
        factor = math.sqrt(2) if self.rslora else 2
        settings = {each.name: getattr(self, each.name) for each in dataclasses.fields(LoRA)}
        settings |= {
            "rank": 2 * self.rank,
            "alpha": factor * self.alpha,
            "rank_pattern": {pattern: 2 * rank for pattern, rank in self.rank_pattern.items()},
            # The alpha of every site grows alike, and so does the rank.
            "alpha_pattern": {pattern: factor * alpha for pattern, alpha in self.alpha_pattern.items()},
            "start": "default",
            "plus": 1.0,
        }
        return LoRA(**settings)


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """Rank-stabilised LoRA: LoRA with s = alpha / sqrt(r), so that high ranks learn as fast (Kalajdzievski 2023).

    Example:
        >>> print(RsLoRA(rank=64))
        rslora(rank=64)
    """

    name: ClassVar[str] = "rslora"
    title: ClassVar[str] = "rsLoRA"

    rslora: bool = True


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA+: LoRA in which B learns faster than A, by the factor `plus` (Hayou et al. 2024).

    Example:
        >>> LoRAPlus().learning_rate_factor("lora_B"), LoRAPlus().learning_rate_factor("lora_A")
        (16.0, 1.0)
    """

    name: ClassVar[str] = "loraplus"
    title: ClassVar[str] = "LoRA+"
    learning_rate: ClassVar[float] = 1e-4

    plus: float = 16.0


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from the largest singular directions of each weight (Meng et al. 2024).

    Example:
        >>> print(PiSSA(rank=16))
        pissa(rank=16)
    """

    name: ClassVar[str] = "pissa"
    title: ClassVar[str] = "PiSSA"
    learning_rate: ClassVar[float] = 2.5e-4

    start: str = "pissa"


@dataclass(frozen=True)
class OLoRA(LoRA):
    """LoRA that starts from the QR decomposition of each weight (Bueyuekakyuez 2024).

    Example:
        >>> print(OLoRA(rank=16))
        olora(rank=16)
    """

    name: ClassVar[str] = "olora"
    title: ClassVar[str] = "OLoRA"
    learning_rate: ClassVar[float] = 2.5e-4

    start: str = "olora"


def weight_at(site: Site, module: nn.Module, name: str, stored: Tensor | None = None) -> Tensor:
    """The weight at `site` as a tensor [out, in], of a part of a fused map its rows alone; in the type of the base.

    `stored` is taken in place of what the module holds now (the weight before a merge).
    Raises MethodError (in the method's `name`) where the module holds no weight of floating-point numbers.
    """
    weight = dense(module, stored).detach()
    need_values(name, site.path, weight)
    weight = weight.T if site.kind == "conv1d" else weight
    return weight[columns_of(site.columns, weight.device)] if site.columns else weight


def missing_at(site: Site, module: nn.Module, name: str) -> Tensor:
    """W - Q at `site`: the weight that was packed less what its codes stand for, float32 [out, in], or a part's rows.

    Raises MethodError (in the method's `name`) where the base is not packed or the weight cannot be had.
    """
    weight = source_weight(module) if is_packed(module) else None
    if weight is None:
        raise MethodError(
            Finding(
                "T135",
                f"{name}: start=loftq makes up for what packing lost, and at {site.path} "
                + ("the weight before packing is not known" if is_packed(module) else "nothing is packed"),
                fix="load_base(FOLDER, quantize='nf4'), --quantize nf4" if is_packed(module) else "start=default",
            )
        )
    missing = weight - weight_at(replace(site, columns=()), module, name).float()
    return missing[columns_of(site.columns, missing.device)] if site.columns else missing


def start_of(weight: Tensor, start: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and B0 [out, rank] for a weight [out, in], float32; by singular values (`pissa`) or QR (`olora`).

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> A0, B0 = start_of(weight, "pissa", 1, 2.0)
        >>> (2.0 * B0 @ A0).round().tolist()
        [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    weight = weight.float()
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _address(site: Site) -> str:
    # What patterns name: a module, or one of its parameters where that is what is changed.
    return site.key if site.kind == "experts" else site.path


def _named(pattern: str, path: str) -> bool:
    # PEFT's rule (tuners_utils.get_pattern_key): the pattern ends the path, at a dot or as a whole.
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def draw(down: Tensor, start: str, rank: int) -> None:
    """Fill A at random: uniform in +-1/sqrt(in), or normal with deviation 1/r (`gaussian`)."""
    if start == "gaussian":
        nn.init.normal_(down, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))


class LoRADelta(LinearDelta):
    """The low-rank change s B A x (+ s c) at one linear map; s (B A - B0 A0) x where it starts from the weight."""

    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(
        self, width_in: int, width_out: int, rank: int, scale: float, dropout: float, bias: bool, start: str = "default"
    ) -> None:
        super().__init__()
        self.scale, self.start = scale, start
        self.lora_A = nn.Parameter(torch.empty(rank, width_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(width_out, rank, dtype=torch.float32))
        self.lora_bias = nn.Parameter(torch.zeros(width_out, dtype=torch.float32)) if bias else None
        self.dropout = nn.Dropout(dropout) if dropout else None
        from_weight = start in _FROM_WEIGHT
        self.register_buffer("start_down", torch.empty_like(self.lora_A, requires_grad=False) if from_weight else None)
        self.register_buffer("start_up", torch.empty_like(self.lora_B, requires_grad=False) if from_weight else None)
        if not from_weight:
            draw(self.lora_A, start, rank)

    def begin(self, down: Tensor, up: Tensor) -> None:
        """Start at A = A0 = `down` [rank, in] and B = B0 = `up` [out, rank], where nothing is changed."""
        assert self.start_down is not None
        assert self.start_up is not None
        with torch.no_grad():
            for own, start in ((self.lora_A, down), (self.start_down, down), (self.lora_B, up), (self.start_up, up)):
                own.copy_(start)

    def wake(self) -> None:
        """Start with B normal as A is; not from the weight's own start, where A and B have gradients already."""
        if self.start == "loftq":
            return
        if self.start_down is None:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            with torch.no_grad():
                self.lora_B.mul_(1.1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change without its scale as a product up @ down; [r, in] and [out, r], or twice the rank from a start."""
        if self.start_down is None or self.start_up is None:
            return self.lora_A, self.lora_B
        down = torch.cat([self.lora_A - self.start_down, self.start_down])
        return down, torch.cat([self.lora_B, self.lora_B - self.start_up], dim=1)

    def add(self, x: Tensor) -> Tensor:
        """s B A drop(x), for x of shape [..., in]; the small matrices take the type of x.

        In PEFT's order of operations, so that both give the same bits.
        """
        if self.dropout is not None:
            x = self.dropout(x)
        down, up = self.factors()
        change = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * self.scale
        if self.lora_bias is not None:
            change = change + (self.scale * self.lora_bias).to(x.dtype)
        return change

    def low_rank(self) -> LowRank:
        """The change as what it is."""
        dropout = self.dropout.p if self.dropout is not None and self.training else 0.0
        return LowRank(*self.factors(), self.scale, dropout, self.lora_bias)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, and the bias with s c."""
        if self.lora_bias is not None:
            change = self.scale * self.lora_bias
            bias = change if bias is None else bias + change
        down, up = self.factors()
        return weight + self.scale * (up @ down), bias


class ExpertsLoRADelta(ParameterDelta):
    """A low-rank change for each of E experts that one parameter holds: [E, out, in], or [E, in, out].

    A [E r, in] has an expert's rows together, B [out, r E] has the experts fastest, as PEFT's `target_parameters`.
    """

    def __init__(self, site: Site, module: nn.Module, rank: int, scale: float, start: str = "default") -> None:
        super().__init__()
        base = module._parameters[site.parameter or ""]
        assert base is not None
        need_values("lora", site.key, base)
        self.scale, self.experts = scale, int(base.shape[0])
        self.transposed = bool(getattr(module, "is_transposed", False))
        self.lora_A = nn.Parameter(torch.empty(self.experts * rank, site.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, rank * self.experts, dtype=torch.float32))
        draw(self.lora_A, start, rank)

    def wake(self) -> None:
        """Start with B as A is."""
        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def parameter(self, base: Tensor) -> Tensor:
        """W_e + s B_e A_e for each expert e, in the shape and type of `base`."""
        down = self.lora_A.reshape(self.experts, -1, self.lora_A.shape[1]).to(base.dtype)  # [E, r, in]
        up = self.lora_B.reshape(self.lora_B.shape[0], -1, self.experts).permute(2, 0, 1).to(base.dtype)  # [E, out, r]
        if self.transposed:
            return torch.baddbmm(base, down.mT, up.mT, alpha=self.scale)
        return torch.baddbmm(base, up, down, alpha=self.scale)


class LoRAEmbeddingDelta(LinearDelta):
    """The low-rank change s B A[:, x] at an embedding table of `count` rows of `width`."""

    def __init__(self, count: int, width: int, rank: int, scale: float, output_scale: float) -> None:
        super().__init__()
        self.scale, self.output_scale = scale, output_scale
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, count, dtype=torch.float32))
        self.lora_embedding_B = nn.Parameter(torch.empty(width, rank, dtype=torch.float32))
        nn.init.normal_(self.lora_embedding_B)

    def wake(self) -> None:
        """Start with A as small as an embedding's change should be."""
        nn.init.normal_(self.lora_embedding_A, std=0.02)

    def add(self, x: Tensor) -> Tensor:
        """s B A[:, x] for token ids x of shape [rows, tokens]; gives [rows, tokens, width]."""
        narrow = F.embedding(x, self.lora_embedding_A.T) * (self.scale * self.output_scale)
        return F.linear(narrow, self.lora_embedding_B)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """E + s (B A)^T; what the module multiplies its rows by applies to the sum."""
        return weight + self.scale * (self.lora_embedding_B @ self.lora_embedding_A).T, bias
