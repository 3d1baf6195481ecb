r"""Trainable tokens: chosen rows of the embedding are trained, and nothing else (new or re-trained words).

    E'[i] = R[i] for i in `ids`,   E'[i] = E[i] else;   R in R^{k x d}

PEFT's TRAINABLE_TOKENS (its pull request 2376, 2025; no paper). Where the output embedding is tied to the input's, it
is the same matrix, so both change. Start: the base's own rows. Parameters: k d.

No changed matrix is built while it acts: an embedding's output gets R[i] - E[i] added where token i stands, and logits
get h (R[i] - E[i]) at column i; so memory and gradient are those of k rows. The rows are held and stored as they are,
not as differences: a vocabulary that is grown again gets other random rows, and they would be differences to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import Delta, Method, ParameterDelta, Site, Survey, Targets, device_at
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import need_values, output_scale

__all__ = ["TrainableTokens", "TrainableTokensDelta"]


@dataclass(frozen=True)
class TrainableTokens(Method):
    """Train the rows `ids` of the input embedding, and of what is tied to it.

    `ids` are token ids, as `tokenizer.convert_tokens_to_ids` gives them; for new words call
    `model.resize_token_embeddings(len(tokenizer))` first. `targets` may name other embeddings, or an output embedding
    of its own (`targets=[embed,head]`), so that new tokens can be predicted as well.

    Example:
        >>> print(TrainableTokens(ids=[50257, 50258]))
        tokens(ids=[50257,50258])
    """

    name: ClassVar[str] = "tokens"
    title: ClassVar[str] = "trainable tokens"
    learning_rate: ClassVar[float] = 1e-3

    ids: int | Sequence[int] = ()
    targets: Targets = "embed"

    def __post_init__(self) -> None:
        ids = self.rows if not isinstance(self.ids, str) else (self.ids,)
        whole = all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids)
        twice = sorted({each for each in ids if ids.count(each) > 1}) if whole else []
        self.require(
            (whole, f"ids {list(ids)} are no token ids, which are whole numbers from 0", "ids=[5]"),
            (not twice, f"ids has {twice[:1]} twice", ""),
        )

    @property
    def rows(self) -> tuple[int, ...]:
        """The token ids, in the order of the trained rows."""
        return (self.ids,) if isinstance(self.ids, int) else tuple(self.ids)

    def sites(self, survey: Survey) -> list[Site]:
        """The weights of the embeddings that `targets` name; tied ones are one."""
        if not self.rows:
            raise MethodError(Finding("T162", f"{self.name} is given no token ids", fix="tokens(ids=[5])"))
        owners = {place: site for site in survey.parameters for place in site.places}
        found: dict[str, Site] = {}
        faults: list[Finding] = []
        for module in survey.select(self.targets, kinds=("embedding", "linear")):
            site = owners[module.path, "weight"]
            count = module.in_features if module.kind == "embedding" else module.out_features
            found[site.key] = site
            faults += [
                Finding(
                    "T153",
                    f"{self.name}: token {each} is not one of the {count} of {module.path}",
                    fix=f"model.resize_token_embeddings({max(self.rows) + 1}) first",
                )
                for each in self.rows
                if each >= count
            ]
        if faults:
            raise MethodError(faults)
        return list(found.values())

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """A copy of the rows of each matrix, to be trained."""
        found: list[Delta] = []
        for site in sites:
            weight = modules[site.path]._parameters["weight"]
            assert weight is not None
            need_values(self.name, site.key, weight)
            tables = [module for path, _ in site.places if isinstance(module := modules[path], nn.Embedding)]
            scales = {output_scale(table) for table in tables} or {1.0}
            with torch.device(device_at(modules, site.path) if values else torch.device("meta")):
                found.append(TrainableTokensDelta(weight, self.rows, scales.pop() if len(scales) == 1 else None))
        return found


class TrainableTokensDelta(ParameterDelta):
    """Trained rows of one matrix [tokens, width], which may be an embedding's, an output map's, or both.

    `output_scale` is what embeddings multiply their rows by; None where those that share the matrix do not agree.
    """

    def __init__(self, base: Tensor, ids: Sequence[int], output_scale: float | None) -> None:
        super().__init__()
        self.ids, self.output_scale = tuple(ids), output_scale
        self.rows = nn.Parameter(torch.empty(len(self.ids), base.shape[1], dtype=torch.float32))
        if not self.rows.is_meta:
            with torch.no_grad():
                self.rows.copy_(base.detach()[self._index(base.device)])

    def parameter(self, base: Tensor) -> Tensor:
        """The matrix with the trained rows in their places."""
        return base.detach().index_copy(0, self._index(base.device), self.rows.to(base.dtype))

    def adds(self, x: Tensor, rows: bool) -> bool:
        """Whether `add` is cheaper than a changed matrix for token ids or hidden states `x`.

        Looking rows up always is. Logits have to be gone through twice more: worth it where a changed matrix would need
        a product (for some `rows`) or a gradient of its own, or is larger than they are.
        """
        if not x.dtype.is_floating_point:
            return self.output_scale is not None
        return rows or torch.is_grad_enabled() or 2 * (x.numel() // x.shape[-1]) < self.rows.shape[1]

    def add(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """The change of an embedding [..., width] for ids [...], or of logits [..., tokens] for states [..., width]."""
        base = weight().detach()
        index = self._index(base.device)
        change = self.rows - base[index].float()
        if x.dtype.is_floating_point:
            columns = F.linear(x, change.to(x.dtype))
            return columns.new_zeros(*x.shape[:-1], base.shape[0]).index_copy(-1, index, columns)
        assert self.output_scale is not None
        ordered, places = torch.sort(index)
        at = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
        found = F.embedding(places[at], change * self.output_scale)
        return found * (ordered[at] == x).unsqueeze(-1)

    def _index(self, device: torch.device) -> Tensor:
        """The ids as a tensor, int64 [k]; kept, since making one waits for the device."""
        kept: Tensor | None = self.__dict__.get("_at")
        if kept is None or kept.device != device:
            self.__dict__["_at"] = kept = torch.tensor(self.ids, dtype=torch.int64, device=device)
        return kept
