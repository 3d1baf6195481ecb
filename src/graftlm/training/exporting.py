"""`export`: a run's adapter in another layout, proven on the rows that the run held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftlm.errors import AdapterError, Finding, GraftError
from graftlm.formats.exporting import Exported, export_adapter
from graftlm.models import resolve_base
from graftlm.training.opening import Opened, open_adapter

__all__ = ["export"]

#: What an adapter without a run is proven on.
_TEXTS = (
    "Where is my order?",
    "The weather was fine, and the two of them walked along the river until it was dark.",
    "1, 2, 3, 4, 5, 6, 7, 8",
    "I would like to return a lamp that came broken. What do I have to do?",
)


def export(
    path: str | Path, folder: str | Path, *, to: Any = "merged", base: str | None = None, rows: int = 8
) -> Exported:
    """Write the adapter of a run (or an adapter's folder) into `folder`; `to` is merged, peft or vllm.

    The rows that it is proven on are those that the run held out, the first `rows` of them; an adapter without a run is
    proven on a few texts. Raises as `export_adapter`.

    Example:
        >>> export("runs/faq-1", "exports/faq", to="merged").difference                         # doctest: +SKIP
    """
    opened = open_adapter(path, base=base)
    if opened.adapter is None:
        raise AdapterError(Finding("A240", f"{path} is a base model: there is no adapter to export", fix="a run"))
    labels = [opened.labels.name(at) for at in range(len(opened.labels))] if opened.labels else None
    return export_adapter(
        opened.adapter,
        opened.tokenizer,
        folder,
        to=to,
        rows=_rows(Path(path), opened)[:rows],
        base=resolve_base(name) if (name := str(base or opened.facts.get("base") or "")) else "",
        labels=labels,
        template=opened.template.source if opened.template else None,
        facts=opened.facts,
    )


def _rows(path: Path, opened: Opened) -> list[list[int]]:
    from graftlm.training.run import held_out_of

    try:
        held = held_out_of(path, opened).eval
        # Rows with several answers hold a sequence for each.
        return [list(one["input_ids"]) for item in held for one in item.get("sequences", (item,))]
    except GraftError:  # an adapter without a run, or data that are gone
        return [list(opened.tokenizer(text)["input_ids"]) for text in _TEXTS]
