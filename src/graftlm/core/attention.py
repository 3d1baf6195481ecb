"""The port `kv`: keys and values of deltas put before those of the tokens, inside a model's own attention call.

transformers looks the attention function up by a name in the attention module's configuration. While a module with
prefixes runs, it is given a copy of its configuration that names the function of this file; that function widens keys,
values and mask, and calls the one that the model would have called. Masks stay as the model made them, so padding,
sliding windows, caches, packed documents and grouped heads keep their meaning; every token sees the whole prefix. The
cache never holds a prefix. An explicit mask is always given: without one, `sdpa` would cut off the last keys.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftlm.core.delta import KeyValueDelta
from graftlm.core.groups import Entries, Group, Rows, total_rows
from graftlm.core.kind import is_encoder_decoder
from graftlm.errors import Finding, RoutingError

if TYPE_CHECKING:
    from graftlm.core.junction import Junction

__all__ = [
    "IMPLEMENTATIONS", "Splice", "attention_function", "implementation_of", "named_attention", "recorded_keys_values",
]  # fmt: skip

_NAME = "graftlm_prefix"
_RECORDER = "graftlm_recorder"
_RECORD = "_graftlm_recorded"
#: The attention implementations that take a mask to which columns can be added.
IMPLEMENTATIONS = ("sdpa", "eager")


def implementation_of(module: nn.Module) -> str | None:
    """The name of the attention implementation that `module` looks up; None where it has no configuration."""
    found: str | None = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return found


def attention_function(module: nn.Module, implementation: str) -> Callable[..., Any] | None:
    """The function that `module` would call under that name; None where it cannot be told."""
    code = sys.modules.get(type(module).__module__)
    table = getattr(code, "ALL_ATTENTION_FUNCTIONS", None)
    if table is None:
        return None
    found: Callable[..., Any] | None = table.get(implementation, None) or getattr(code, "eager_attention_forward", None)
    return found


class Splice:
    """What one attention module is given for one call: prefixes, by groups of rows."""

    def __init__(self, module: nn.Module, junction: Junction, groups: Sequence[Group], x: Tensor) -> None:
        self.junction, self.groups, self.x = junction, groups, x
        self.config: Any = module.config
        self.implementation = str(implementation_of(module))
        # Past the module's own way of setting attributes, which looks for parameters in each.
        module.__dict__["config"] = _substitute(junction, self.config, self.implementation)

    def remove(self, module: nn.Module) -> None:
        """Give the module its own configuration back."""
        module.__dict__["config"] = self.config

    def prefix(self, key: Tensor, apart: bool) -> _Prefix:
        """The prefixes for a call with `key` for all rows; where `apart`, perhaps of the rows alone that have one."""
        x, batch, switch = self.x, self.junction.switch.batch, self.junction.switch
        count = int(key.shape[0])
        kept = self.junction.kept_prefix
        state = (switch.epoch, count, key.dtype, key.device, apart)
        alone = not torch.is_grad_enabled() and not any(d.reads_input for group in self.groups for d in group.prefixes)
        if alone and switch.going_on and kept is not None and kept[0] is self.groups and kept[1] == state:
            found: _Prefix = kept[2]
            return found
        cut = Rows.of(self.groups, count, key.device)
        given = cut.split(x) if x.shape[0] == count else (x,) * len(self.groups)
        parts = list(zip(self.groups, cut.indices, given, cut.sizes, strict=True))
        having = [part for part in parts if part[0].prefixes]
        # Where most rows have a prefix, one call of all is less work.
        entries: Entries | None = None
        if apart and 2 * sum(part[3] for part in having) <= count:
            parts, total = having, total_rows(self.groups)
            entries = Entries([row for part in parts for row in part[0].rows or ()], count, total, key.device)
        lengths = [sum(delta.length for delta in part[0].prefixes) for part in parts]
        longest = max(lengths)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        real: list[Tensor] = []
        for (group, index, own, size), length in zip(parts, lengths, strict=True):
            pair = (key.new_zeros(1, key.shape[1], 0, key.shape[3]),) * 2
            if length:
                pair = _joined(group.prefixes, own, batch.mask_like(x, index), key)
            for pieces, piece in zip((keys, values), pair, strict=True):
                pieces.append(nn.functional.pad(piece, (0, 0, longest - length, 0)).expand(size, -1, -1, -1))
            real.append((torch.arange(longest, device=key.device) >= longest - length).expand(size, -1))
        join = (
            cut.join
            if entries is None
            else partial(_in_order, indices=[part[1] for part in parts if part[1] is not None])
        )
        biased = any(delta.has_bias for part in parts for delta in part[0].prefixes)
        bias = partial(_bias, [(part[0].prefixes, part[3]) for part in parts], longest, join) if biased else None
        made = _Prefix(join(keys), join(values), None if min(lengths) == longest else join(real), entries, bias)
        self.junction.kept_prefix = (self.groups, state, made) if alone else None
        return made


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of prefixes, each [rows, heads, length, width]; shorter ones have theirs at the right end."""

    keys: Tensor
    values: Tensor
    real: Tensor | None  # which virtual tokens are real [rows, length]; None where all are
    entries: Entries | None  # which entries of the batch the rows are; None for all
    #: By the first query's place in each row, how many queries and for how many heads: what is added to the scores.
    bias: Callable[[Tensor, int, int], Tensor] | None


def _bias(
    parts: Sequence[tuple[Sequence[KeyValueDelta], int]], longest: int, join: Callable[[list[Tensor]], Tensor],
    places: Tensor, count: int, heads: int,
) -> Tensor:  # fmt: skip
    """What is added to the scores over the virtual tokens, [rows, heads, count, longest]; `places` are [rows].

    `parts` are the deltas of a group and how many rows it has; `join` puts the rows of the parts into their order.
    """
    whole: Tensor | None = None
    for place in sorted(set(places.tolist())):  # one place, unless rows are padded at the left
        pieces = []
        for deltas, size in parts:
            columns = [
                delta.bias(place, count) if delta.has_bias
                else torch.zeros(heads, count, delta.length, device=places.device)
                for delta in deltas
            ]  # fmt: skip
            columns = columns or [torch.zeros(heads, count, 0, device=places.device)]
            piece = torch.cat([column.float() for column in columns], dim=2)
            pieces.append(nn.functional.pad(piece, (longest - piece.shape[2], 0)).expand(size, -1, -1, -1))
        own = join(pieces)
        whole = own if whole is None else torch.where((places == place)[:, None, None, None], own, whole)
    assert whole is not None
    return whole


def _in_order(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """The entries of several groups in the order in which the batch has them; `indices` are theirs there."""
    whole = torch.cat(list(parts))
    return whole if len(parts) == 1 else whole.index_select(0, torch.cat(list(indices)).argsort())


def _substitute(junction: Junction, config: Any, implementation: str) -> Any:
    """A copy of `config` that names our attention function; kept, and made again where the original changed."""
    kept = junction.substitute
    if kept is None or kept[0] is not config or kept[1] != implementation:
        twin = named_attention(config, _NAME, _attend)
        junction.substitute = kept = (config, implementation, twin)
    return kept[2]


def named_attention(config: Any, name: str, function: Callable[..., Any]) -> Any:
    """A copy of `config` whose attention implementation is `function`, under `name`; for one module, masks stay."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    twin = copy.copy(config)
    twin._attn_implementation_internal = name
    return twin


def _joined(deltas: Sequence[KeyValueDelta], x: Tensor, mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of several deltas, one behind the other, [rows or 1, heads, length, width]."""
    pairs = [delta.keys_values(x, mask) for delta in deltas]
    rows = max((pair[0].shape[0] for pair in pairs if pair[0].dim() == 4), default=1)

    def joined(which: int) -> Tensor:
        parts = [p[which] if p[which].dim() == 4 else p[which].unsqueeze(0) for p in pairs]
        parts = [part.to(like.device, like.dtype).expand(rows, -1, -1, -1) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    return joined(0), joined(1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """The attention call of a module with prefixes."""
    splice: Splice = module.__dict__["_graftlm_junction"].splice
    function = attention_function(module, splice.implementation)
    if splice.implementation not in IMPLEMENTATIONS or function is None:
        raise RoutingError(
            Finding(
                "R112",
                f"a prefix cannot enter attention {splice.implementation!r}",
                fix='model.set_attn_implementation("sdpa")',
            )
        )
    apart = splice.implementation == "sdpa" and query.shape[0] == key.shape[0] and not torch.is_grad_enabled()
    found = splice.prefix(key, apart)
    if found.entries is None:
        return _widened_call(module, function, splice, found, query, key, value, attention_mask, *args, **kwargs)
    # All rows as the model calls them, and those with a prefix again: nothing of the others is copied or widened.
    output, weights = function(module, query, key, value, attention_mask, *args, **kwargs)
    at, count = found.entries, int(key.shape[0])
    query, key, value = (at.take(part) for part in (query, key, value))
    bias = kwargs.get("position_bias")
    if bias is not None and bias.shape[0] == count:
        kwargs["position_bias"] = at.take(bias)
    own, _ = _widened_call(module, function, splice, found, query, key, value, attention_mask, *args, **kwargs)
    at.put(output, own)
    return output, weights


def _widened_call(
    module: nn.Module, function: Callable[..., Any], splice: Splice, found: _Prefix, query: Tensor, key: Tensor,
    value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """The attention call with keys, values and mask widened by the prefixes that were `found` for its rows."""
    switch, length, rows = splice.junction.switch, int(found.keys.shape[2]), found.entries and found.entries.rows
    # One token's mask is that of the layer before, most often.
    alike = attention_mask is not None and query.shape[2] == 1 and found.real is None
    state = (rows, length, int(key.shape[2]))
    if alike and switch.widened[0] is attention_mask and switch.widened[1] == state:
        mask = switch.widened[2]
    else:
        mask = _wide_mask(module, splice, found, query, key, attention_mask, kwargs.get("is_causal"))
        if alike:
            switch.widened = (attention_mask, state, mask)
    bias = kwargs.get("position_bias")
    if bias is not None and found.bias is None:
        kwargs["position_bias"] = nn.functional.pad(bias, (length, 0))
    elif bias is not None and found.bias is not None:
        tokens, count = int(query.shape[2]), int(found.keys.shape[0])
        places = (int(key.shape[2]) - tokens - _left_padding(mask, length)).expand(count).to(key.device)
        front = found.bias(places, tokens, int(query.shape[1])).to(bias.dtype)
        kwargs["position_bias"] = torch.cat([front, bias.expand(front.shape[0], -1, -1, -1)], dim=3)
    keys, values = torch.cat([found.keys, key], dim=2), torch.cat([found.values, value], dim=2)
    return function(module, query, keys, values, mask, *args, **kwargs)


def _wide_mask(
    module: nn.Module, splice: Splice, found: _Prefix, query: Tensor, key: Tensor, mask: Tensor | None,
    causal: bool | None,
) -> Tensor | None:  # fmt: skip
    """The mask of a call whose keys are widened by the prefixes `found`; `mask` is that of all rows, without them."""
    real, length, tokens, seen = found.real, int(found.keys.shape[2]), int(query.shape[2]), int(key.shape[2])
    if mask is None:
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if splice.implementation == "sdpa" and causal and tokens > 1:
            # As sdpa would have it: token i sees keys 0 to i.
            mask = torch.ones(1, 1, tokens, seen, dtype=torch.bool, device=key.device).tril()
    else:
        if found.entries is not None and mask.shape[0] > 1:
            mask = found.entries.take(mask)
        mask = mask[..., :seen]
    if mask is None and real is not None:
        mask = torch.ones(1, 1, 1, seen, dtype=torch.bool, device=key.device)
        if splice.implementation == "eager":
            mask = torch.zeros(1, 1, 1, seen, dtype=query.dtype, device=key.device)
    return None if mask is None else _widened(mask, real, length)


def _left_padding(mask: Tensor | None, length: int) -> Tensor:
    """How many tokens are hidden at the start of each row, [rows or 1], by a mask whose first `length` are virtual."""
    if mask is None:
        return torch.zeros(1, dtype=torch.long)
    seen = mask[:, 0, -1, length:]
    return (seen if seen.dtype == torch.bool else seen == 0).int().argmax(dim=1)


def _widened(mask: Tensor, real: Tensor | None, length: int) -> Tensor:
    """`mask` [rows or 1, heads or 1, tokens or 1, keys] with `length` columns before the first, open where `real`."""
    shape = (*mask.shape[:-1], length)
    boolean = mask.dtype == torch.bool
    if real is None:
        front = mask.new_ones(shape) if boolean else mask.new_zeros(shape)
        return torch.cat([front, mask], dim=-1)
    rows = max(mask.shape[0], real.shape[0])
    mask = mask.expand(rows, *mask.shape[1:])
    seen = real[:, None, None, :].expand(rows, *mask.shape[1:-1], length)
    if not boolean:
        low = torch.finfo(mask.dtype).min
        return torch.cat([mask.new_zeros(seen.shape).masked_fill(~seen, low), mask], dim=-1)
    return torch.cat([seen, mask], dim=-1)


def recorded_keys_values(model: nn.Module, ids: Tensor, paths: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What the attention modules at `paths` compute as keys and values for the token ids [tokens], without gradients.

    Each is [key-value heads, tokens, head width], as the cache would hold it: with its positions, before grouping. An
    encoder-decoder reads the same ids on both sides.
    """
    modules = dict(model.named_modules())
    configs = {path: getattr(modules[path], "config", None) for path in paths}
    rows = ids[None].to(next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = rows
    try:
        for path, config in configs.items():
            module: Any = modules[path]
            module.__dict__[_RECORD] = (str(implementation_of(module)), [])
            module.config = named_attention(config, _RECORDER, _record)
        with torch.no_grad():
            model(**inputs)
        return {path: modules[path].__dict__[_RECORD][1][0] for path in paths}
    finally:
        for path, config in configs.items():
            modules[path].config = config
            modules[path].__dict__.pop(_RECORD, None)


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    implementation, found = module.__dict__[_RECORD]
    found.append((key[0].float(), value[0].float()))
    function = attention_function(module, implementation)
    assert function is not None
    return function(module, query, key, value, *args, **kwargs)
