"""Writes the generated parts of the docs: help of the verbs, settings and costs of methods, codes, columns, figures.

A page holds regions between `<!-- generated: WHAT -->` and `<!-- end -->`; everything around them is written by hand.
`python docs/generate.py` fills all regions and draws the figures; with `--check` it writes nothing and ends with status
1 if any is not current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
REGION = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


# --- what regions hold ----------------------------------------------------------------------------------------------


def help_of(verb: str) -> str:
    """The help that `graftlm VERB --help` prints, 90 columns wide."""
    import click

    from graftlm.cli.program import program

    wide = {"terminal_width": 90, "max_content_width": 90}
    context = click.Context(program, info_name="graftlm", **{**program.context_settings, **wide})
    command = program if verb == "graftlm" else program.get_command(context, verb)
    assert command is not None
    if verb != "graftlm":
        context = click.Context(command, parent=context, info_name=verb, **{**command.context_settings, **wide})
    return f"```text\n{command.get_help(context).rstrip()}\n```\n"


def verbs() -> str:
    """A table of all verbs."""
    from graftlm.cli.program import VERBS

    rows = [(f"[{verb}](verbs/{verb}.md)", line) for verb, line in VERBS.items()]
    return table(("verb", "what it does"), rows)


def methods() -> str:
    """A table of all methods."""
    from graftlm.methods import METHODS

    rows = [(f"[{name}]({name}.md)", first_sentence(kind)) for name, kind in METHODS.items()]
    return table(("method", "what it does"), rows)


def settings_of(name: str) -> str:
    """The settings of a method with their defaults, and its learning rate."""
    import dataclasses

    from graftlm.methods import METHODS

    kind = METHODS[name]
    rows = []
    for field in dataclasses.fields(kind):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        rows.append((f"`{field.name}`", f"`{default!r}`", SETTINGS_TEXT[field.name]))
    text = table(("setting", "by itself", "what it says"), rows) if rows else "It has no settings.\n"
    low, high = kind.learning_rate_range
    return f"{text}\nLearning rate at a width of 2000: {kind.learning_rate:g}, usually {low:g} to {high:g}.\n"


def cost_of(name: str) -> str:
    """What a method would train of models of known shapes."""
    return table(("base", "parameters", "trained", "share", "adapter file"), list(_costs(name)))


def run_settings() -> str:
    """Every setting of a run file."""
    from graftlm.settings import SETTINGS

    rows = []
    for name, setting in SETTINGS.items():
        flags = "".join(f"<br>`{flag}`" for flag in setting.flags)
        said = setting.text + (f": {', '.join(setting.choices)}" if setting.choices else "")
        said += f" (usually {setting.usual_text})" if isinstance(setting.usual, tuple) else ""
        by_itself = "" if setting.default in (None, {}) else f"`{_yaml(setting.default)}`"
        rows.append((f"`{name}`{flags}", said, by_itself))
    return table(("setting", "what it says", "by itself"), rows)


def codes() -> str:
    """Every code of an error, by kind."""
    from graftlm.cli.explain import known_codes

    parts: list[str] = []
    kind = None
    rows: list[tuple[str, ...]] = []
    for code in known_codes().values():
        if code.code[:2] != kind:
            if rows:
                parts.append(table(("code", "meaning"), rows))
            kind, rows = code.code[:2], []
            parts.append(f"### {kind}xx\n\n{code.kind + '.' if code.kind else 'Others.'}\n")
        rows.append((f"`{code.code}`", escaped(code.meaning)))
    parts.append(table(("code", "meaning"), rows))
    return "\n".join(parts)


def columns() -> str:
    """The names of columns that are understood."""
    from graftlm.data.recognise import ROLES

    return table(("role", "column names"), [(f"`{role}`", ", ".join(names)) for role, names in ROLES.items()])


def templates() -> str:
    """The built-in chat templates."""
    from graftlm.data.templates import BUILT_IN

    return "\n".join(f"`{name}`\n\n```jinja\n{text}\n```\n" for name, text in BUILT_IN.items())


WHAT: dict[str, Callable[..., str]] = {
    "codes": codes,
    "columns": columns,
    "cost": cost_of,
    "help": help_of,
    "methods": methods,
    "run settings": run_settings,
    "settings": settings_of,
    "templates": templates,
    "verbs": verbs,
}

SETTINGS_TEXT = {
    "alpha": "the change is multiplied by alpha / rank",
    "alpha_pattern": "another alpha for single sites: name, suffix or pattern to alpha",
    "bias": "train a bias beside each change as well",
    "dropout": "share of the inputs of the change that is dropped in training",
    "exclude": "sites to leave out, named as in `targets`",
    "layers": "layers to restrict it to: `-4:` (the last four), `0-3`, `5`, `0,2,4`",
    "rank": "the number of directions a change can use; parameters grow with it",
    "rank_pattern": "another rank for single sites: name, suffix or pattern to rank",
    "rslora": "multiply by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones",
    "targets": "sites: a role (`query`), a group (`attention`, `ffn`, `all-linear`), a name, a pattern, or a list",
}


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """`text` as a cell of a table."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", text)


def first_sentence(kind: type) -> str:
    """The first paragraph of a docstring, on one line."""
    return escaped(" ".join((kind.__doc__ or "").partition("\n\n")[0].split()))


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- what methods cost ----------------------------------------------------------------------------------------------


@cache
def _models() -> dict[str, Any]:
    """Models of well-known shapes on the meta device: sizes without values."""
    import torch
    import transformers as tf

    shapes: dict[str, Callable[[], Any]] = {
        "BERT base, classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(num_labels=8)),
        "GPT-2 small": lambda: tf.GPT2LMHeadModel(tf.GPT2Config()),
        "Llama, 1.2 B": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            )
        ),
    }  # fmt: skip
    with torch.device("meta"):
        return {name: make() for name, make in shapes.items()}


def _costs(name: str) -> Iterator[tuple[str, str, str, str, str]]:
    from graftlm.core import attach
    from graftlm.errors import GraftError
    from graftlm.methods import METHODS

    for base, model in _models().items():
        total = sum(parameter.numel() for parameter in model.parameters())
        try:
            adapter = attach(model, METHODS[name]())
        except GraftError as error:
            yield base, _spaced(total), escaped(error.findings[0].message.partition(": ")[2]), "", ""
            continue
        count = adapter.parameter_count
        adapter.detach()
        yield base, _spaced(total), _spaced(count), f"{100 * count / total:.2f} %", f"{4 * count / 1e6:,.1f} MB"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


# --- figures --------------------------------------------------------------------------------------------------------

_PARTS = ("query", "key", "value", "output", "norm", "up", "down", "norm")
_WIDTH, _HEIGHT, _GAP, _LEFT, _TOP = 58, 26, 6, 96, 34
# One grey that can be read on white and on black: a file cannot follow the page's switch between them.
_STYLE = (
    "text{font:11.5px system-ui,sans-serif;fill:#7b8490}"
    ".frozen{fill:none;stroke:#9aa3ad;stroke-width:1.2}.trained{fill:#0f9d8a}"
)


def figure_of(name: str) -> str:
    """An SVG of a four-layer BERT classifier: what is frozen, trained in a copy, or has a low-rank change beside it."""
    import torch
    import transformers as tf

    from graftlm.core import ParameterDelta, attach
    from graftlm.methods import METHODS

    config = tf.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=64, num_labels=8
    )
    with torch.device("meta"):
        model = tf.BertForSequenceClassification(config)
    marks: dict[str, set[str]] = {}
    for part in attach(model, METHODS[name]()).parts:
        kind = part.site.parameter or "" if isinstance(part.delta, ParameterDelta) else "beside"
        marks.setdefault(part.site.path, set()).add(kind)

    def mark(path: str) -> str:
        found = {kind for at, kinds in marks.items() if at == path or at.startswith(path + ".") for kind in kinds}
        if "beside" in found:
            return "beside"
        return "whole" if "weight" in found else "bias" if found else "frozen"

    places = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
              "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")  # fmt: skip
    body: list[str] = []
    for column, title in enumerate(_PARTS):
        x = _LEFT + column * (_WIDTH + _GAP) + _WIDTH / 2
        body.append(f'<text x="{x:g}" y="{_TOP - 10}" text-anchor="middle">{title}</text>')
    rows = [("head", ("classifier",))]
    rows += [(f"layer {at}", tuple(f"bert.encoder.layer.{at}.{place}" for place in places)) for at in (3, 2, 1, 0)]
    rows += [("embeddings", ("bert.embeddings.word_embeddings",))]
    for row, (title, paths) in enumerate(rows):
        y = _TOP + row * (_HEIGHT + _GAP)
        body.append(f'<text x="{_LEFT - 10}" y="{y + _HEIGHT / 2 + 4:g}" text-anchor="end">{title}</text>')
        for column, path in enumerate(paths):
            wide = _WIDTH if len(paths) > 1 else len(_PARTS) * (_WIDTH + _GAP) - _GAP
            body.append(_cell(_LEFT + column * (_WIDTH + _GAP), y, wide, mark(path)))
    bottom = _TOP + len(rows) * (_HEIGHT + _GAP) + 14
    x = 20.0
    legend = {
        "frozen": "frozen",
        "whole": "trained copy",
        "bias": "bias trained",
        "beside": "low-rank change beside it",
    }
    for state, said in legend.items():
        body.append(_cell(x, bottom, 30, state))
        body.append(f'<text x="{x + 36:g}" y="{bottom + _HEIGHT / 2 + 4:g}">{said}</text>')
        x += 50 + 6.6 * len(said)
    width, height = _LEFT + len(_PARTS) * (_WIDTH + _GAP) + 6, bottom + _HEIGHT + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="What {name} trains of a four-layer classifier">\n<style>{_STYLE}</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _cell(x: float, y: float, width: float, state: str) -> str:
    parts = [f'<rect class="frozen" x="{x:g}" y="{y:g}" width="{width:g}" height="{_HEIGHT}" rx="3"/>']
    if state == "whole":
        parts = [f'<rect class="trained" x="{x:g}" y="{y:g}" width="{width:g}" height="{_HEIGHT}" rx="3"/>']
    elif state == "bias":
        parts.append(f'<rect class="trained" x="{x + width - 7:g}" y="{y:g}" width="7" height="{_HEIGHT}" rx="2"/>')
    elif state == "beside":
        inner = min(width, _WIDTH) - 18
        parts.append(f'<rect class="trained" x="{x + 4:g}" y="{y + 4:g}" width="5" height="{_HEIGHT - 8}" rx="1"/>')
        parts.append(f'<rect class="trained" x="{x + 12:g}" y="{y + 4:g}" width="{inner:g}" height="5" rx="1"/>')
    return "".join(parts)


# --- filling --------------------------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """`text` with every region as it should be."""

    def fill(region: re.Match[str]) -> str:
        words = region[2].split()
        what = " ".join(words) if " ".join(words) in WHAT else words[0]
        arguments = [] if what == " ".join(words) else words[1:]
        return f"{region[1]}\n{WHAT[what](*arguments)}\n{region[3]}"

    return REGION.sub(fill, text)


def main(check: bool) -> int:
    """Fill every page, or with `check` tell which are not current."""
    from graftlm.methods import METHODS

    wanted = {page: filled(page.read_text(encoding="utf-8")) for page in sorted(DOCS.rglob("*.md"))}
    wanted |= {DOCS / "figures" / f"{name}.svg": figure_of(name) for name in METHODS}
    stale = []
    for page, text in wanted.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            stale.append(page.relative_to(DOCS.parent))
            if not check:
                page.write_text(text, encoding="utf-8")
    for page in stale:
        print(f"{page} {'is not current: run python docs/generate.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
