"""The port `embed`: virtual tokens put among a row's own where embeddings enter a stack, and taken out of its output.

Each row is laid out afresh so that its virtual tokens stand next to its own tokens, never before padding: with the
default place a left-padded row is [padding, virtual, tokens] and a right-padded one [virtual, tokens, padding]. Rows
that have fewer virtual tokens than others are filled up, at the left in causal stacks (the next token is generated at
the right end), at the right in others. Positions count virtual tokens like any other. The output has the input's
length again, so labels, pooling and slicing outside the stack mean what they meant. A cache remembers the layout that
it was filled under, and later steps extend it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftlm.core.groups import Group, Rows, check_count, total_rows
from graftlm.errors import Finding, RoutingError

if TYPE_CHECKING:
    from graftlm.core.junction import Junction

__all__ = ["Layout", "check_cache", "positions_by_mask", "takes"]

_MARK = "_graftlm_layout"


@dataclass(frozen=True)
class _Remembered:
    """The layout under which a cache was filled."""

    lengths: tuple[int, ...]  # virtual tokens of each row
    longest: int
    tokens: int  # the rows' own width at that time
    mask: Tensor | None  # [rows, tokens + longest]


def takes(module: nn.Module, name: str) -> bool:
    """Whether `module` can be called with an argument of that name."""
    return name in _names_of(module)


def check_cache(kwargs: Mapping[str, Any]) -> None:
    """Raise RoutingError where a cache that holds virtual tokens is used with adapters that have none."""
    if getattr(kwargs.get("past_key_values"), _MARK, None) is not None:
        raise _other_cache()


def positions_by_mask(
    module: nn.Module, groups: Sequence[Group], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The call with positions of real tokens where the model would count padding; None where it needs none.

    Rotary positions only count as differences, so a model without prefixes may count left padding. The keys of a
    prefix stand at fixed positions: rows that have one start at position 0, as `generate` has it for all.
    """
    given = _by_name(module, args, kwargs)
    mask = given.get("attention_mask")
    if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if not takes(module, "position_ids") or _padded_positions(module) is not None:
        return None
    source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if not isinstance(source, Tensor) or mask.shape[0] != source.shape[0] or mask.shape[1] < source.shape[1]:
        return None
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if groups[0].rows is not None:
        by_row = _by_row(groups, int(mask.shape[0]))
        prefixed = torch.tensor([group.prefixed for group in by_row], device=mask.device)
        positions = torch.where(prefixed[:, None], positions, columns)
    return (), {**given, "position_ids": positions[:, mask.shape[1] - source.shape[1] :]}


def _other_cache() -> RoutingError:
    return RoutingError(
        Finding("R113", "the cache was filled under other virtual tokens than these adapters have",
                fix="start anew without past_key_values after use(...)")
    )  # fmt: skip


class Layout:
    """One call of a stack with virtual tokens: its arguments, and the way back to the rows' own length."""

    def __init__(self, inputs: dict[str, Any], back: Tensor | None, remembered: _Remembered | None) -> None:
        self.inputs, self._back, self._remembered = inputs, back, remembered

    @classmethod
    def of(
        cls, module: nn.Module, junction: Junction, groups: Sequence[Group], args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Layout:  # fmt: skip
        """The layout for a call of `module` with these arguments. Raises RoutingError where there is none."""
        given = _by_name(module, args, kwargs)
        source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if not isinstance(source, Tensor) or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
            raise RoutingError(
                Finding(
                    "R115",
                    "virtual tokens need rows of tokens and a mask of shape [rows, tokens]; packed documents and "
                    "masks of other shapes have no place for them",
                    fix="packing off",
                )
            )
        rows, tokens = int(source.shape[0]), int(source.shape[1])
        by_row = _by_row(groups, rows)
        lengths = [group.inserted for group in by_row]
        shift = torch.tensor([group.shift for group in by_row], device=source.device)
        longest = max(lengths)
        filled = int(cache.get_seq_length()) if cache is not None else 0
        if filled and (longest or getattr(cache, _MARK, None) is not None):
            return cls._later(module, given, cache, lengths, shift, tokens, filled)
        if not filled:
            _put_in_slots(module, junction, groups, given)
        if not longest:
            _move(module, given, shift, tokens, filled)
            return cls(given, None, None)
        return cls._first(module, junction, groups, by_row, given, lengths, shift)

    @classmethod
    def _first(
        cls, module: nn.Module, junction: Junction, groups: Sequence[Group], by_row: Sequence[Group],
        given: dict[str, Any], lengths: Sequence[int], shift: Tensor,
    ) -> Layout:  # fmt: skip
        embeddings = _embedded(module, given)
        mask: Tensor | None = given.get("attention_mask")
        rows, tokens, width = embeddings.shape
        longest = max(lengths)
        order = _Order.of(by_row, mask, rows, tokens, longest, junction.causal, embeddings.device)
        cut = Rows.of(groups, rows, embeddings.device)
        virtual = cut.join(
            [
                nn.functional.pad(torch.cat(pieces, dim=1), (0, 0, 0, longest - group.inserted))
                if (pieces := _vectors(group, own, own_mask))
                else own.new_zeros(own.shape[0], longest, width)
                for group, own, own_mask in zip(groups, cut.split(embeddings), _masks(cut, mask), strict=True)
            ]
        )
        given = dict(given)
        given.pop("input_ids", None)
        together = torch.cat([embeddings, virtual], dim=1)
        given["inputs_embeds"] = together.gather(1, order.order[:, :, None].expand(-1, -1, width))
        full = all(length == longest for length in lengths)
        if junction.causal and not full and not takes(module, "position_ids") and _learned_positions(module):
            raise RoutingError(
                Finding(
                    "R116",
                    f"{type(module).__name__} counts positions by column, so rows with different numbers of virtual "
                    "tokens cannot stand in one batch",
                    fix="use(model, NAME), or prompts of one length",
                )
            )
        positions = given.get("position_ids")
        if mask is not None or not full:
            given["attention_mask"] = order.mask if mask is None else order.mask.to(mask.dtype)
        if takes(module, "position_ids") and not (mask is None and full and positions is None and not shift.any()):
            given["position_ids"] = order.positions(_positions(module, given, mask, positions, tokens)) + shift[:, None]
        elif shift.any():
            raise _no_positions(module)
        if (types := given.get("token_type_ids")) is not None:
            wide = torch.cat([types, types[:, :1].expand(-1, longest)], dim=1)
            given["token_type_ids"] = wide.gather(1, order.order)
        junction.switch.batch.mask = order.mask if mask is not None or not full else None
        remembered = _Remembered(tuple(lengths), longest, tokens, given.get("attention_mask"))
        return cls(given, None if junction.keeps_virtual else order.back, remembered)

    @classmethod
    def _later(
        cls, module: nn.Module, given: dict[str, Any], cache: Any, lengths: Sequence[int], shift: Tensor, tokens: int,
        filled: int,
    ) -> Layout:  # fmt: skip
        """Tokens behind those in the cache: no virtual ones are added, the mask is extended."""
        known: _Remembered | None = getattr(cache, _MARK, None)
        if known is None or known.lengths != tuple(lengths):
            raise _other_cache()
        mask = given.get("attention_mask")
        longest = known.longest
        device = shift.device
        if mask is not None or known.mask is not None:
            front = known.mask
            if front is None:
                front = torch.ones(len(lengths), known.tokens + longest, dtype=torch.long, device=device)
            behind = filled + tokens - front.shape[1]
            if mask is None:
                more = front.new_ones(front.shape[0], behind)
            else:
                more = mask[:, known.tokens :].to(front)
            given["attention_mask"] = torch.cat([front, more], dim=1)
        moved = torch.tensor(lengths, device=device) + shift
        if takes(module, "position_ids"):
            positions = given.get("position_ids")
            if positions is None:
                positions = torch.arange(tokens, device=device)[None] + (filled - longest)
            given["position_ids"] = positions + moved[:, None]
        return cls(given, None, None)

    def trim(self, output: Any) -> Any:
        """`output` with the rows' own tokens only; its cache remembers the layout."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._remembered is not None:
            setattr(cache, _MARK, self._remembered)
        if self._back is None:
            return output
        if isinstance(output, tuple):
            return (self._own(output[0]), *output[1:])
        output.last_hidden_state = self._own(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._own(states) for states in output.hidden_states)
        return output

    def _own(self, states: Tensor) -> Tensor:
        assert self._back is not None
        return states.gather(1, self._back[:, :, None].expand(-1, -1, states.shape[-1]))

    @staticmethod
    def memory(encoder: Junction, groups: Sequence[Group], states: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of an encoder's output that has virtual tokens, out of the mask of its rows' own tokens."""
        rows = int(states.shape[0])
        by_row = _by_row(groups, rows)
        lengths = [group.inserted for group in by_row]
        longest = max(lengths)
        if not longest or (mask is None and min(lengths) == longest):
            return mask
        if mask is not None and mask.shape[1] == states.shape[1]:
            return mask
        tokens = int(states.shape[1]) - longest
        order = _Order.of(by_row, mask, rows, tokens, longest, encoder.causal, states.device)
        return order.mask if mask is None else order.mask.to(mask.dtype)


@dataclass(frozen=True)
class _Order:
    """Where everything goes: `order` [rows, tokens + longest] names, for each place, a token (its column) or a virtual
    token (`tokens` + its number); `back` [rows, tokens] is the place of each token's output."""

    order: Tensor
    mask: Tensor
    back: Tensor
    anchors: Tensor  # [rows, longest]: the column at which each virtual token is put in
    at_end: Tensor  # [rows, longest]
    tokens: int

    @classmethod
    def of(
        cls, by_row: Sequence[Group], mask: Tensor | None, rows: int, tokens: int, longest: int, causal: bool,
        device: torch.device,
    ) -> _Order:  # fmt: skip
        real = torch.ones(rows, tokens, dtype=torch.bool, device=device) if mask is None else mask.bool()
        columns = torch.arange(tokens, device=device)
        first = real.long().argmax(dim=1)
        last = tokens - real.flip(1).long().argmax(dim=1)  # behind the last real token
        # Everything is sorted by a key: a token by its column, a virtual token just before the column it is put in at.
        anchors = torch.zeros(rows, longest, dtype=torch.long, device=device)
        used = torch.zeros(rows, longest, dtype=torch.bool, device=device)
        at_end = torch.zeros(rows, longest, dtype=torch.bool, device=device)
        for kind in {id(group): group for group in by_row}.values():
            mine = torch.tensor([group is kind for group in by_row], device=device)
            start = 0
            for delta in kind.prompts:
                if delta.position == "slots":
                    continue
                stop = start + delta.length
                place = {"start": first, "after-bos": first + 1, "end": last if causal else last - 1}[delta.position]
                anchors[:, start:stop] = torch.where(mine[:, None], place[:, None], anchors[:, start:stop])
                used[mine, start:stop] = True
                at_end[mine, start:stop] = delta.position == "end"
                start = stop
        idle = -1 if causal else 2 * tokens + 2
        keys = torch.cat(
            [(2 * columns + 1).expand(rows, -1), torch.where(used, 2 * anchors, torch.full_like(anchors, idle))], dim=1
        )
        order = keys.argsort(dim=1, stable=True)
        places = order.argsort(dim=1)
        back = places[:, :tokens]
        if causal and bool(at_end.any()):
            # What follows is predicted from the last virtual token: it speaks for the row's last token.
            behind = torch.where(at_end, places[:, tokens:], torch.full_like(anchors, -1)).amax(dim=1)
            speaks = at_end.any(dim=1)[:, None] & (columns == (last - 1)[:, None])
            back = torch.where(speaks, behind[:, None], back)
        return cls(order, torch.cat([real, used], dim=1).gather(1, order), back, anchors, at_end, tokens)

    def positions(self, own: Tensor) -> Tensor:
        """Position ids in the new order for the tokens' `own` [rows or 1, tokens]; virtual tokens move what follows."""
        rows = self.order.shape[0]
        own = own.expand(rows, -1)
        before = own.gather(1, (self.anchors - 1).clamp(0, self.tokens - 1)) + 1
        here = own.gather(1, self.anchors.clamp(0, self.tokens - 1))
        start = torch.where(self.at_end | (self.anchors >= self.tokens), before, here)
        ordered = torch.cat([own, start], dim=1).gather(1, self.order)
        virtual = (self.order >= self.tokens) & self.mask
        count = virtual.long().cumsum(dim=1) - virtual.long()
        filler = (self.order >= self.tokens) & ~self.mask
        return (ordered + count).masked_fill(filler, 0)


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_names_of(module), args, strict=False)), **kwargs} if args else dict(kwargs)


def _names_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of its forward; reading a signature takes longer than a small module takes to run."""
    own = module.__dict__.get("forward")
    return tuple(inspect.signature(own).parameters) if own is not None else _names_in(type(module).forward)


@functools.lru_cache(maxsize=64)
def _names_in(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(types.MethodType(forward, object())).parameters)


def _masks(cut: Rows, mask: Tensor | None) -> Sequence[Tensor | None]:
    """Which tokens are real, by group."""
    return [None] * len(cut.sizes) if mask is None else cut.split(mask.bool())


def _vectors(group: Group, embeddings: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What a group puts in between its rows' tokens, each [rows, length, width]."""
    return [
        delta.tokens(embeddings, mask).to(embeddings).expand(embeddings.shape[0], -1, -1)
        for delta in group.prompts
        if delta.position != "slots"
    ]


def _by_row(groups: Sequence[Group], rows: int) -> list[Group]:
    """The group of each of `rows` rows. Raises RoutingError where rows cannot be told apart."""
    if groups[0].rows is None:
        return [groups[0]] * rows
    total = total_rows(groups)
    check_count(rows, total)
    by_row = {row: group for group in groups for row in group.rows or ()}
    each = rows // total
    return [by_row[row] for row in range(total) for _ in range(each)]


def _embedded(module: nn.Module, given: Mapping[str, Any]) -> Tensor:
    if given.get("inputs_embeds") is not None:
        embeddings: Tensor = given["inputs_embeds"]
        return embeddings
    table: Any = module.get_input_embeddings()  # type: ignore[operator]
    found: Tensor = table(given["input_ids"])
    return found


def _put_in_slots(module: nn.Module, junction: Junction, groups: Sequence[Group], given: dict[str, Any]) -> None:
    """Replace the tokens that mark a slot by virtual tokens."""
    if not any(delta.position == "slots" for group in groups for delta in group.prompts):
        return
    ids = given.get("input_ids")
    if ids is None:
        raise RoutingError(
            Finding("R114", f"the slots at {junction.path or 'the model'} are token ids, and none were given")
        )
    cut = Rows.of(groups, int(ids.shape[0]), ids.device)
    parts = list(cut.split(_embedded(module, given)))
    masks = _masks(cut, given.get("attention_mask"))
    for place, (group, own_ids, own_mask) in enumerate(zip(groups, cut.split(ids), masks, strict=True)):
        for delta in group.prompts:
            if delta.position != "slots":
                continue
            marked = own_ids == delta.slot_token
            counts = marked.sum(dim=1)
            if bool((counts != delta.length).any()):
                row = int((counts != delta.length).nonzero()[0])
                raise RoutingError(
                    Finding(
                        "R114",
                        f"row {row} has {int(counts[row])} slots (token {delta.slot_token}), the prompt has "
                        f"{delta.length} virtual tokens",
                    )
                )
            own = parts[place]
            virtual = delta.tokens(own, own_mask).to(own).expand(own.shape[0], -1, -1)
            parts[place] = own.masked_scatter(marked[:, :, None].expand_as(own), virtual)
    given["inputs_embeds"] = cut.join(parts)
    given.pop("input_ids", None)


def _move(module: nn.Module, given: dict[str, Any], shift: Tensor, tokens: int, filled: int) -> None:
    """Move the positions of all tokens by `shift` [rows]."""
    if not bool(shift.any()):
        return
    if not takes(module, "position_ids"):
        raise _no_positions(module)
    positions = given.get("position_ids")
    if positions is None:
        positions = _positions(module, given, given.get("attention_mask"), None, tokens) + filled
    given["position_ids"] = positions + shift[:, None]


def _no_positions(module: nn.Module) -> RoutingError:
    return RoutingError(
        Finding("R116", f"the positions of {type(module).__name__} cannot be moved, as the adapter's prefix asks")
    )


def _positions(
    module: nn.Module, given: Mapping[str, Any], mask: Tensor | None, positions: Tensor | None, tokens: int
) -> Tensor:
    """The position ids [rows or 1, tokens] that the model would use for the rows' own tokens."""
    if positions is not None:
        if mask is None and positions.dim() == 2 and bool((positions[:, 1:] < positions[:, :-1]).any()):
            raise RoutingError(
                Finding("R115", "packed documents have no place for virtual tokens before each", fix="packing off")
            )
        return positions
    source: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    padding = _padded_positions(module)
    if padding is not None:  # RoBERTa and its kin count real tokens, from behind the padding's own index
        real = torch.ones(source.shape[0], tokens, device=source.device, dtype=torch.long) if mask is None else mask
        return real.long().cumsum(dim=1) * real.long() + padding
    return torch.arange(tokens, device=source.device)[None]


def _learned_positions(module: nn.Module) -> bool:
    return any("position" in path and isinstance(inner, nn.Embedding) for path, inner in module.named_modules())


def _padded_positions(module: nn.Module) -> int | None:
    for path, inner in module.named_modules():
        if "position" in path and isinstance(inner, nn.Embedding) and inner.padding_idx is not None:
            return int(inner.padding_idx)
    return None
