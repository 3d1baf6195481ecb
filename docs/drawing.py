"""Draws where a method acts: the stack of layers, one layer of it with every map, and what is trained there.

What is drawn comes from the deltas that the method builds on a real model, a BERT classifier of four layers: their
sites, their ports, and which steps of a site they define. A new method needs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

__all__ = ["classifier", "drawing_of"]

# Greys and one colour that can be read on white and on black: a file cannot follow the page's switch between them.
_STYLE = (
    "text{font:11.5px system-ui,sans-serif;fill:#7b8490}.s{font-size:10.5px}.on{fill:#fff;font-weight:600}"
    ".frozen{fill:none;stroke:#9aa3ad;stroke-width:1.2}.line{fill:none;stroke:#9aa3ad;stroke-width:1.2}"
    ".trained{fill:#0b8a79;stroke:none}.solid{fill:#9aa3ad}.path{fill:none;stroke:#0f9d8a;stroke-width:1.6}"
    ".touched{fill:#0f9d8a;fill-opacity:.22;stroke:#0f9d8a;stroke-width:1.4}"
)
_LAYERS = 4
_HEIGHT = 24
_WIDTH = 800

#: The maps of a layer: title, place in the drawing (left, top, width), place in the model.
_MAPS = {
    "attention.self.query": ("query", 78, 122, 56),
    "attention.self.key": ("key", 78, 170, 56),
    "attention.self.value": ("value", 78, 218, 56),
    "attention.output.dense": ("output", 268, 170, 56),
    "attention.output.LayerNorm": ("norm", 398, 170, 44),
    "intermediate.dense": ("up", 484, 170, 40),
    "output.dense": ("down", 566, 170, 44),
    "output.LayerNorm": ("norm", 684, 170, 44),
}
_MIDDLE = 182  # the height of the stream
_ENTRY, _ATTENTION, _ADD, _SPLIT, _ADD_2 = 40, (186, 66), 378, 460, 664
_LEGEND = {
    "frozen": "frozen",
    "whole": "trained copy",
    "bias": "trained bias",
    "low-rank": "low-rank change",
    "drawn": "low-rank change, drawn and frozen",
    "ranked": "factor of each rank",
    "scale": "trained factors",
    "values": "some trained values",
    "rows": "trained rows",
    "mask": "values set to zero",
    "adapter": "bottleneck",
    "virtual": "virtual tokens",
    "encoded": "map that makes them",
    "mixed": "frozen prompts of other tasks, mixed in",
    "gate": "gate",
}


@cache
def classifier() -> Any:
    """A BERT classifier of four layers, without values."""
    import torch
    import transformers as tf

    config = tf.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=_LAYERS, num_attention_heads=4, vocab_size=64,
        num_labels=8,
    )  # fmt: skip
    with torch.device("meta"):
        return tf.BertForSequenceClassification(config)


def drawing_of(name: str, method: Any) -> str:
    """An SVG of where `method` acts; raises GraftError where it does not fit a classifier."""
    from graftlm.core.adapter import parts_of

    parts = parts_of(classifier(), method)
    marks: dict[str, set[str]] = {}
    layers: dict[int | None, int] = {}
    for part in parts:
        layers[part.site.layer] = layers.get(part.site.layer, 0) + 1
        for mark in _marks(part):
            marks.setdefault(_place(part), set()).add(mark)
    numbered = [layer for layer in layers if layer is not None]
    shown = max(numbered, default=_LAYERS - 1)
    body = [*_stack(marks, parts, frozenset(numbered), shown), *_layer(marks, shown)]
    used = {"frozen", *(mark for found in marks.values() for mark in found if mark != "bias" or "whole" not in found)}
    if "bias" in _embeddings(marks):
        used.add("bias")
    body += _legend([mark for mark in _LEGEND if mark in {_shown_as(each) for each in used}])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} 330" width="{_WIDTH}" role="img" '
        f'aria-label="Where {name} acts in a classifier of four layers">\n<style>{_STYLE}</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


# --- what a delta does at its site ----------------------------------------------------------------------------------


def _place(part: Any) -> str:
    """Where a delta is drawn: a module's path, or layer and role of what is no module of its own."""
    site = part.site
    if site.kind in ("sublayer", "stream", "attention", "sequence"):
        return f"{site.layer}:{site.kind}:{site.role or ''}"
    return str(site.path)


def _marks(part: Any) -> set[str]:
    """The marks of one delta, and of what is wrapped in it."""
    from graftlm.core import Delta

    delta = part.delta
    # A wrapper (a gate) holds another delta, or calls it.
    inner = [child for child in delta.modules() if child is not delta and isinstance(child, Delta)]
    if inner:
        return {"gate", *(mark for child in inner for mark in _own_marks(part.site, child))}
    return _own_marks(part.site, delta)


def _own_marks(site: Any, delta: Any) -> set[str]:
    from graftlm.core import WholeParameterDelta
    from graftlm.core.delta import acts

    gate = {"gate"} if any("gate" in name for name, _ in delta.named_parameters()) else set()
    tensors = [tensor for name, tensor in (*delta.named_parameters(), *delta.named_buffers()) if "gate" not in name]
    if delta.port == "kv":
        return {"virtual", *gate}
    if delta.port == "embed":
        made = {"encoded"} if list(delta.children()) else set()
        mixed = {"mixed"} if any(tensor.dim() > 2 for tensor in tensors) else set()
        return {f"virtual-{delta.position}", *gate, *(mixed or made)}
    if delta.port == "branch":
        return {"adapter-beside" if delta.reads_input and site.kind == "sublayer" else "adapter", *gate}
    if delta.port == "param":
        if isinstance(delta, WholeParameterDelta):
            return {"bias" if (site.parameter or "").endswith("bias") else "whole"}
        if not list(delta.parameters()):
            return {"mask"}
        if any(name == "rows" for name, _ in delta.named_parameters()):
            return {"rows"}
        return {"values"} if all(tensor.dim() <= 1 for tensor in tensors) else {"low-rank"}
    found = set(gate)
    wide = [tensor for tensor in tensors if tensor.dim() > 1 and min(tensor.shape) > 1]
    if acts(delta, "add") or acts(delta, "add_over"):
        # VeRA's vectors stand between and behind maps that all sites share.
        whole = len(wide) > 1 or len(list(delta.parameters())) > 1
        found |= _low_rank(site, delta) if whole else {"rows" if site.kind == "embedding" else "bias"}
    if acts(delta, "before"):
        found.add("scale-in")
    if acts(delta, "after"):
        found.add("bias" if any("bias" in name for name, _ in delta.named_parameters()) else "scale")
    return found


def _low_rank(site: Any, delta: Any) -> set[str]:
    """A change of two maps, and which vectors are trained between and behind them."""
    trained = list(delta.parameters())
    found = {"low-rank" if any(tensor.dim() > 1 for tensor in trained) else "drawn"}
    lengths = {len(tensor) for tensor in trained if tensor.dim() == 1}
    return found | {"scale" if length == site.out_features else "ranked" for length in lengths}


def _shown_as(mark: str) -> str:
    if mark.startswith("virtual"):
        return "virtual"
    return {"scale-in": "scale", "adapter-beside": "adapter"}.get(mark, mark)


# --- shapes ---------------------------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, how: str = "", anchor: str = "middle") -> str:
    return f'<text class="{how}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'


def _rect(how: str, x: float, y: float, width: float, height: float, round_: float = 3) -> str:
    return f'<rect class="{how}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}"/>'


def _path(how: str, points: str) -> str:
    return f'<path class="{how}" d="{points}"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line with a head at its right end."""
    return _path("line", f"M{x1:g} {y1:g} L{x2:g} {y2:g} M{x2 - 5:g} {y2 - 3:g} L{x2:g} {y2:g} L{x2 - 5:g} {y2 + 3:g}")


def _bow(x: float, y: float, wide: float = 13, high: float = 7, how: str = "trained") -> str:
    """Two maps with a narrow place between them, around (x, y)."""
    left = f"M{x - wide:g} {y - high:g} L{x - 1:g} {y - 2:g} V{y + 2:g} L{x - wide:g} {y + high:g} Z"
    right = f"M{x + wide:g} {y - high:g} L{x + 1:g} {y - 2:g} V{y + 2:g} L{x + wide:g} {y + high:g} Z"
    return _path(how, f"{left} {right}")


def _dot(x: float, y: float) -> str:
    """A factor for each rank, in the narrow place of a bow around (x, y)."""
    return f'<circle class="trained" cx="{x:g}" cy="{y:g}" r="4.5" style="stroke:#fff"/>'


def _sources(x: float, y: float) -> str:
    """Frozen prompts of other tasks: three rows of tokens."""
    return "".join(_rect("frozen", x + 11 * number, y + 8 * row, 8, 5, 1) for row in range(3) for number in range(3))


def _bottleneck(x: float, y: float) -> str:
    """A bottleneck adapter around (x, y): two maps with a bend between them."""
    return _rect("touched", x - 17, y - 13, 34, 26, 4) + _bow(x, y, 12, 8)


def _gate(x: float, y: float) -> str:
    diamond = f"M{x - 8:g} {y:g} L{x:g} {y - 8:g} L{x + 8:g} {y:g} L{x:g} {y + 8:g} Z"
    return _path("trained", diamond) + _text(x, y + 3.5, "g", "on s")


def _add(x: float) -> str:
    circle = f'<circle class="frozen" cx="{x:g}" cy="{_MIDDLE}" r="9"/>'
    return circle + _path("line", f"M{x - 5:g} {_MIDDLE} H{x + 5:g} M{x:g} {_MIDDLE - 5} V{_MIDDLE + 5}")


def _factor(x: float, y: float) -> str:
    cross = f"M{x - 3:g} {y - 3:g} L{x + 3:g} {y + 3:g} M{x + 3:g} {y - 3:g} L{x - 3:g} {y + 3:g}"
    return f'<circle class="trained" cx="{x:g}" cy="{y:g}" r="7"/><path d="{cross}" stroke="#fff" stroke-width="1.5"/>'


def _virtual(x: float, y: float, count: int = 3, size: float = 9) -> str:
    return "".join(_rect("trained", x + number * (size + 2), y, size, size, 1.5) for number in range(count))


def _box(x: float, y: float, width: float, title: str, marks: set[str]) -> str:
    """A module with what is trained of it or beside it."""
    drawn = []
    middle = y + _HEIGHT / 2
    if "whole" in marks:
        drawn.append(_rect("trained", x, y, width, _HEIGHT))
    else:
        drawn.append(_rect("frozen", x, y, width, _HEIGHT))
        if "mask" in marks:
            # Above and below the title, which stays readable.
            steps = [x + 4 + 7 * number for number in range(int((width - 8) // 7))]
            for edge in (y + 6, y + _HEIGHT - 1):
                drawn.append(_path("path", " ".join(f"M{at:g} {edge:g} l5 -5" for at in steps)))
        if "values" in marks:
            spots = [(0.1, 4), (0.28, 19), (0.46, 3), (0.62, 19), (0.8, 4), (0.9, 17)]
            drawn += [_rect("trained", x + share * width - 2, y + down - 2, 5, 5, 1) for share, down in spots]
        if "rows" in marks:
            drawn.append(_rect("trained", x, y + _HEIGHT - 6, width, 6, 2))
        if "bias" in marks:
            drawn.append(_rect("trained", x + width - 6, y, 6, _HEIGHT, 2))
    drawn.append(_text(x + width / 2 - (3 if "bias" in marks and "whole" not in marks else 0), middle + 4, title,
                       "on" if "whole" in marks else ""))  # fmt: skip
    if "low-rank" in marks or "drawn" in marks:
        top = y - 10
        drawn.append(_path("path", f"M{x - 5:g} {middle:g} V{top:g} H{x + width + 5:g} V{middle:g}"))
        drawn.append(_bow(x + width / 2, top, how="trained" if "low-rank" in marks else "solid"))
    if "ranked" in marks:
        drawn.append(_dot(x + width / 2, y - 10))
    if "scale" in marks:
        drawn.append(_factor(x + width + 9, middle))
    if "scale-in" in marks:
        drawn.append(_factor(x - 8, middle - 13))
    if "gate" in marks:
        drawn.append(_gate(x + width + 1, y - 9))
    return "".join(drawn)


# --- the stack and the layer ----------------------------------------------------------------------------------------


def _under(marks: dict[str, set[str]], path: str) -> set[str]:
    return {mark for at, found in marks.items() if at == path or at.startswith(path + ".") for mark in found}


def _embeddings(marks: dict[str, set[str]]) -> set[str]:
    """The marks of the tables; a norm trained behind them leaves the tables as they are, and is a strip."""
    path = "bert.embeddings.LayerNorm"
    rest = {at: found for at, found in marks.items() if at != path}
    return _under(rest, "bert.embeddings") | ({"bias"} if path in marks else set())


def _stack(marks: dict[str, set[str]], parts: Sequence[Any], touched: frozenset[int], shown: int) -> list[str]:
    """The row on top: tokens, embeddings, layers, head."""
    del parts
    y, body = 30, []
    own = marks.get("None:sequence:", set()) | {m for at, ms in marks.items() if ":sequence:" in at for m in ms}
    where = next((mark.partition("-")[2] for mark in own if mark.startswith("virtual")), "")
    cells = ["token"] * 5
    virtual = ["virtual"] * 3
    cells = {
        "": cells,
        "start": virtual + cells,
        "after-bos": cells[:1] + virtual + cells[1:],
        "end": cells + virtual,
        "slots": cells[:2] + virtual[:1] + cells[2:4] + virtual[1:] + cells[4:],
    }[where]
    body.append(_text(16, y - 10, "tokens", "s", "start"))
    for number, cell in enumerate(cells):
        how = "trained" if cell == "virtual" else "frozen"
        body.append(_rect(how, 16 + 14 * number, y + 4, 11, 16, 2))
    first = 16 + 14 * (cells.index("virtual") if where else 0)
    if "encoded" in own or "mixed" in own:
        body.append(_path("path", f"M{first + 19} {y + 34} V{y + 22}"))
        body.append(_bow(first + 19, y + 40) if "encoded" in own else _sources(first + 4, y + 36))
    if "gate" in own:
        body.append(_gate(16 + 14 * len(cells) + 8, y + 12))
    at = 150
    body.append(_arrow(24 + 14 * len(cells), y + 12, at - 2, y + 12))
    body.append(_box(at, y, 84, "embeddings", _embeddings(marks)))
    x = at + 84
    for layer in range(_LAYERS):
        body.append(_arrow(x, y + 12, x + 24, y + 12))
        body.append(_rect("touched" if layer in touched else "frozen", x + 26, y, 58, _HEIGHT))
        body.append(_text(x + 55, y + 16, f"layer {layer}"))
        if layer == shown:
            body.append(
                _path("line", f"M{x + 26} {y + _HEIGHT} L8 {y + 62} M{x + 84} {y + _HEIGHT} L{_WIDTH - 8} {y + 62}")
            )
        x += 84
    body.append(_arrow(x, y + 12, x + 24, y + 12))
    body.append(_box(x + 26, y, 50, "head", _under(marks, "classifier")))
    return body


def _layer(marks: dict[str, set[str]], layer: int) -> list[str]:
    """One layer: attention and its maps, the feed-forward part, both with their residual adds and norms."""
    prefix = f"bert.encoder.layer.{layer}."
    top, bottom = 92, 286
    body = [
        f'<rect class="line" x="8" y="{top}" width="{_WIDTH - 16}" height="{bottom - top}" rx="6" '
        'stroke-dasharray="2 3"/>'
    ]
    body.append(_path("line", f"M10 {_MIDDLE} H{_ENTRY}"))
    for place in ("query", "key", "value"):
        _, x, y, width = _MAPS[f"attention.self.{place}"]
        body.append(_path("line", f"M{_ENTRY} {_MIDDLE} V{y + 12} H{x}"))
        body.append(_path("line", f"M{x + width} {y + 12} H{_ATTENTION[0]}"))
    left, wide = _ATTENTION
    body.append(_rect("frozen", left, 116, wide, 132, 5))
    body.append(_text(left + wide / 2, _MIDDLE + 4, "attention"))
    body.append(_path("line", f"M{left + wide} {_MIDDLE} H268 M324 {_MIDDLE} H{_ADD - 9}"))
    body.append(_add(_ADD))
    body.append(_path("line", f"M{_ENTRY} {_MIDDLE} V266 H{_ADD} V{_MIDDLE + 9}"))
    body.append(
        _path(
            "line", f"M{_ADD + 9} {_MIDDLE} H398 M442 {_MIDDLE} H484 M524 {_MIDDLE} H566 M610 {_MIDDLE} H{_ADD_2 - 9}"
        )
    )
    body.append(
        f'<circle class="frozen" cx="545" cy="{_MIDDLE}" r="8"/>'
        + _path("line", f"M540 {_MIDDLE + 2} H545 L549 {_MIDDLE - 4}")
    )
    body.append(_path("line", f"M{_SPLIT} {_MIDDLE} V236 H{_ADD_2} V{_MIDDLE + 9}"))
    body.append(_add(_ADD_2))
    body.append(_path("line", f"M{_ADD_2 + 9} {_MIDDLE} H684"))
    body.append(_arrow(728, _MIDDLE, _WIDTH - 10, _MIDDLE))
    body.append(_text(180, 279, "added to what it read", "s"))
    for place, (title, x, y, width) in _MAPS.items():
        body.append(_box(x, y, width, title, _under(marks, prefix + place)))
    kv = marks.get(f"{layer}:attention:attention", set())
    if "virtual" in kv:
        for y, said in ((170, "P&#8342;"), (218, "P&#7525;")):
            body.append(_virtual(146, y + 8, 3, 9) + _text(162, y + 4, said, "s"))
        if "gate" in kv:
            body.append(_gate(180, 205))
    body += _branches(marks, layer)
    return body


def _branches(marks: dict[str, set[str]], layer: int) -> list[str]:
    """Adapters behind sublayers, beside them, and on the stream."""
    body = []
    for role, x, entry, add, high in (("attention", 346, _ENTRY, _ADD, 104), ("ffn", 637, _SPLIT, _ADD_2, 128)):
        found = marks.get(f"{layer}:sublayer:{role}", set())
        if "adapter" in found:
            body.append(_bottleneck(x, _MIDDLE))
        if "adapter-beside" in found:
            body.append(_path("path", f"M{entry} {_MIDDLE} V{high} H{add} V{_MIDDLE - 9}"))
            body.append(
                _rect("touched", (entry + add) / 2 - 17, high - 12, 34, 24, 4) + _bow((entry + add) / 2, high, 12, 8)
            )
        if "gate" in found:
            body.append(_gate(x, _MIDDLE - 20))
    stream = marks.get(f"{layer}:stream:ffn", set())
    if stream:
        body.append(_bottleneck(758, _MIDDLE))
        if "gate" in stream:
            body.append(_gate(758, _MIDDLE - 20))
    return body


def _legend(marks: Sequence[str]) -> list[str]:
    body, x, y = [], 12.0, 300
    symbols: dict[str, Callable[[float], str]] = {
        "frozen": lambda x: _rect("frozen", x, y, 24, 18),
        "whole": lambda x: _rect("trained", x, y, 24, 18),
        "bias": lambda x: _rect("frozen", x, y, 24, 18) + _rect("trained", x + 18, y, 6, 18, 2),
        "low-rank": lambda x: _bow(x + 13, y + 9),
        "drawn": lambda x: _bow(x + 13, y + 9, how="solid"),
        "ranked": lambda x: _dot(x + 13, y + 9),
        "scale": lambda x: _factor(x + 14, y + 9),
        "values": lambda x: _rect("frozen", x, y, 24, 18) + "".join(
            _rect("trained", x + right, y + down, 5, 5, 1) for right, down in ((3, 3), (11, 10), (17, 4))
        ),
        "rows": lambda x: _rect("frozen", x, y, 24, 18) + _rect("trained", x, y + 12, 24, 6, 2),
        "mask": lambda x: _rect("frozen", x, y, 24, 18)
        + _path("path", f"M{x + 3} {y + 18} l7 -7 M{x + 12} {y + 18} l7 -7"),
        "adapter": lambda x: _rect("touched", x - 3, y - 3, 30, 24, 4) + _bow(x + 12, y + 9, 11, 7),
        "virtual": lambda x: _virtual(x, y + 4, 2, 10),
        "encoded": lambda x: _bow(x + 13, y + 9),
        "mixed": lambda x: _sources(x - 2, y - 1),
        "gate": lambda x: _gate(x + 14, y + 9),
    }  # fmt: skip
    for mark in marks:
        said = _LEGEND[mark]
        body.append(symbols[mark](x) + _text(x + 32, y + 13, said, "", "start"))
        x += 50 + 6.1 * len(said)
    return body
