"""Writes the generated parts of the docs: help of the verbs, settings and costs of methods, codes, columns, figures.

A page holds regions between `<!-- generated: WHAT -->` and `<!-- end -->`; everything around them is written by hand.
`python docs/generate.py` fills all regions and draws the figures; with `--check` it writes nothing and ends with status
1 if any is not current.
"""

from __future__ import annotations

import contextlib
import itertools
import json
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
    """A table of all methods: what they do, and what can be done with them."""
    from graftlm.methods import METHODS

    rows = []
    for name, kind in METHODS.items():
        port, merges, starts, stored = _tried(name)
        rate = f"{kind().learning_rate:g}" if len(_example(name).parts) == 1 else "of each part"
        rows.append((_link(name), first_sentence(kind), port, merges, starts, stored, rate))
    head = ("method", "what it does", "port", "merges", "starts as the base", "PEFT's file", "rate")
    return table(head, rows)


def architectures() -> str:
    """Which method fits which architecture, as the conformance tests have it."""
    from graftlm.methods import METHODS

    cases = _cases()
    models = list(cases.MODELS)
    rows = []
    for name in METHODS:
        codes = [cases.REFUSALS.get((name, model)) for model in models]
        each = [" ".join(f"[{one}](../errors.md#{one.lower()})" for one in (code or "").split()) for code in codes]
        rows.append((_link(name), *(text or "yes" for text in each)))
    text = table(("method", *(model.replace("_", " ") for model in models)), rows)
    return f'<div class="matrix" markdown>\n\n{text}\n</div>\n'


def sums() -> str:
    """Which methods cannot be summed as they are by themselves, tried on a classifier."""
    from graftlm.methods import METHODS

    keys = {name: _keys(name) for name in METHODS}
    groups: list[set[str]] = []
    for first in METHODS:
        for second in METHODS:
            if first < second and keys[first] & keys[second] and _refused(first, second):
                joined = [group for group in groups if group & {first, second}]
                groups = [group for group in groups if group not in joined]
                groups.append({first, second}.union(*joined))
    lines = [f"- {', '.join(_link(name) for name in sorted(group))}" for group in sorted(groups, key=sorted)]
    return "\n".join(lines) + "\n"


def measured(name: str) -> str:
    """What the benchmark of all methods found for one, by data set."""
    results = _results()
    if not results:
        return "Not measured yet; `python -m benchmarks.methods` does it.\n"
    return results_of(results, name)


def every_method() -> str:
    """The tables of the benchmark of all methods."""
    results = _results()
    _on_path(DOCS.parent)
    from benchmarks import methods as benchmark

    return benchmark.table(results) if results else "Not measured yet.\n"


def real_data() -> str:
    """The table of every task on real data."""
    _on_path(DOCS.parent)
    from benchmarks import real as benchmark

    return benchmark.table(benchmark.results())


def rates_tried() -> str:
    """The scores on validation rows at several learning rates, by task and method."""
    found = json.loads((DOCS.parent / "benchmarks" / "results" / "method_rates.json").read_text(encoding="utf-8"))
    by = sorted({run["times"] for run in found["runs"]})
    scores: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for run in found["runs"]:
        if "learning_rate" in run:
            told = scores.setdefault((run["task"], run["method"]), {})
            told[run["times"]] = (run["score"], run["learning_rate"])
    rows = []
    for (task, name), told in sorted(scores.items()):
        percent = found["tasks"][task]["metric"] == "accuracy"
        shown = [f"{100 * told[t][0]:.1f}" if percent else f"{told[t][0]:.3f}" for t in by if t in told]
        cells = iter(shown)
        times, (_, rate) = next(iter(told.items()))
        rows.append(
            (
                found["tasks"][task]["title"], f"`{found['methods'][name]}`", f"{rate / times:.2g}",
                *(next(cells) if t in told else "" for t in by),
            )
        )  # fmt: skip
    return table(("data and base", "method", "rate then", *(f"rate x {t:g}" for t in by)), rows)


def settings_of(name: str) -> str:
    """The settings of a method with their defaults, and its learning rate; of a variant what it changes."""
    import dataclasses

    from graftlm.methods import METHODS

    kind = METHODS[name]
    parent = next((cls for cls in kind.__mro__[1:] if cls in METHODS.values()), None)
    before = {field.name: _default(field) for field in dataclasses.fields(parent)} if parent else {}
    rows = []
    for field in dataclasses.fields(kind):
        default = _default(field)
        if parent is None or field.name not in before or before[field.name] != default:
            rows.append((f"`{field.name}`", f"`{default!r}`", _says(name, field.name)))
    text = table(("setting", "by itself", "what it says"), rows) if rows else ""
    if parent is not None:
        also = f"The settings are those of {_link(parent.name)}"  # type: ignore[attr-defined]
        text = f"{also}, but for:\n\n{text}" if rows else f"{also}.\n"
    low, high = kind.learning_rate_range
    rate = f"Learning rate at a width of 2000: {kind().learning_rate:g}, usually {low:g} to {high:g}."
    return f"{text or f'It has no settings.{chr(10)}'}\n{rate}\n"


def _default(field: Any) -> Any:
    import dataclasses

    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


#: What a person must still write, as found while filling.
_wanted: list[str] = []


def _says(method: str, setting: str) -> str:
    found = SETTINGS_TEXT.get(f"{method}.{setting}", SETTINGS_TEXT.get(setting))
    if found is None:
        _wanted.append(f"say in SETTINGS_TEXT of docs/generate.py what {method}.{setting} means")
    return found or ""


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
        rows.append((f'<a id="{code.code.lower()}"></a>`{code.code}`', escaped(code.meaning)))
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
    "architectures": architectures,
    "codes": codes,
    "columns": columns,
    "cost": cost_of,
    "every method": every_method,
    "real data": real_data,
    "rates tried": rates_tried,
    "help": help_of,
    "measured": measured,
    "methods": methods,
    "run settings": run_settings,
    "settings": settings_of,
    "sums": sums,
    "templates": templates,
    "verbs": verbs,
}

#: What a setting says; under `method.setting` where it means something of its own there.
SETTINGS_TEXT = {
    "adalora.begin": "share of the run after which ranks are handed out",
    "adalora.end": "share of the run after which they stay",
    "adalora.every": "steps between two allocations",
    "adalora.orthogonality": "factor of the penalty that keeps A's rows and B's columns apart",
    "adalora.rank": "the rank of every site at the start",
    "adalora.smoothing": "how slowly importances move, from 0",
    "adalora.target_rank": "the rank of a site at the end, on average",
    "prune.begin": "share of the run at which zeros begin to grow, with `initial`",
    "prune.end": "share of the run at which they are all there",
    "prune.initial": "share of zeros at the start; the final one by itself",
    "prune.pattern": "keep n of every m inputs, such as `2:4`, in place of `sparsity`",
    "prune.scope": "compare scores within each output `row`, within a `tensor`, or over all weights (`global`)",
    "prune.score": "`magnitude`, or `wanda` from data",
    "prune.sparsity": "share of entries that count as zero",
    "sparse.fraction": "share of the targeted entries, heads or layers that are trained",
    "sparse.threshold": "train what has at least this score, in place of a share",
    "sparse.unit": "what is chosen: single entries (`entry`), whole attention heads (`head`) or layers (`layer`)",
    "sparse.scope": "compare scores over all weights (`global`), or in each `tensor`",
    "sparse.score": "magnitude, random, gradient, snip, empirical-fisher or fisher",
    "tokens.ids": "the token ids whose rows are trained, as a list",
    "tokens.targets": "embeddings (or an output embedding that is not tied): a role, a name, a pattern, or a list",
    "vera.seed": "the shared maps are drawn from it",
    "vera.start": "what l_d starts at",
    "activation": "between the two maps: gelu, identity, leaky_relu, relu, silu, tanh",
    "alpha": "the change is multiplied by alpha / rank",
    "alpha_pattern": "another alpha for single sites: name, suffix or pattern to alpha",
    "attempt.bottleneck": "inner width of the network that weighs the prompts",
    "attempt.length": "virtual tokens of each prompt",
    "attempt.mix_target": "mix the trained prompt in as well",
    "attempt.sources": "how many trained prompts there are to mix",
    "attempt.temperature": "larger is softer: the weights are a softmax over scores / temperature",
    "bias": "train a bias beside each change as well",
    "bitfit.add": "give maps without a bias one of zero",
    "bitfit.norms": "give normalisations without a shift one of zero",
    "bitfit.targets": "restrict it to the biases of these modules; all outside the head by itself",
    "dropout": "share of the inputs of the change that is dropped in training",
    "exclude": "sites to leave out, named as in `targets`",
    "head.outputs": "swap the last map for a fresh one with this many outputs",
    "head.start": "`base`: as it is; `fresh`: drawn anew; `probe`: a regression on some training rows",
    "ia3.feedforward": "maps of which the input is scaled",
    "gated.method": "the method behind the gates",
    "ia3.targets": "maps of which the output is scaled",
    "last.count": "how many layers, counted from the output",
    "layers": "layers to restrict it to: `-4:` (the last four), `0-3`, `5`, `0,2,4`",
    "length": "virtual tokens",
    "mam.mlp": "inner width of the network that computes the prefix while training",
    "mam.scale": "the adapters' changes are multiplied by it",
    "mam.width": "width of the adapters' bottlenecks",
    "parallel.dropout": "share of the bottleneck that is dropped in training",
    "parallel.scale": "the change is multiplied by it",
    "parallel.targets": "sublayers: `ffn`, `attention`, `cross`, or either of a stack (`encoder/ffn`)",
    "plus": "B learns at this many times the rate of A",
    "position": "where the virtual tokens stand: start, after-bos, end, or slots (in place of `slot_token`)",
    "prefix.dropout": "share of the prefix that is dropped in training",
    "prefix.mlp": "inner width of the network that computes the prefix while training; 0 for none",
    "prefix.positions": "`own`: tokens keep their positions; `shifted`: they are counted behind the prefix, as in PEFT",
    "prefix.start": "`random`, or `tokens`: what the model itself computes for `tokens`",
    "prefix.targets": "attention calls: `attention`, `cross`, or either of a stack; all by itself",
    "prefix.tokens": "token ids to start from, cycled to `length`",
    "prompt.labels": "token ids of each label, for `start=labels`",
    "prompt.start": "vocabulary (rows of the 5,000 most frequent tokens), uniform, text (`tokens`), or labels",
    "prompt.tokens": "token ids for `start=text`, cycled or cut to `length`",
    "ptuning.dropout": "dropout between the layers of the LSTM",
    "ptuning.encoder": "the network: lstm or mlp",
    "ptuning.hidden": "its width; 0 for the authors' own",
    "rank": "the number of directions a change can use; parameters grow with it",
    "rank_pattern": "another rank for single sites: name, suffix or pattern to rank",
    "reduction": "the width as a fraction of the model's: 16 for a sixteenth; goes before `width`",
    "rezero.method": "the method behind the gates",
    "rezero.shared": "one gate a layer instead of one a site",
    "rezero.start": "what the gates start at",
    "rslora": "multiply by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones",
    "series.dropout": "share of the bottleneck that is dropped in training",
    "series.start": "`identity`: the second map is zero; `near-identity`: both are tiny, as in the paper",
    "series.variant": "houlsby, pfeiffer or lin: see above",
    "slot_token": "id of the token whose places are taken, for `position=slots`",
    "stack": "of an encoder-decoder: `encoder`, or `both`",
    "start": "how A and B begin: default, gaussian, pissa, olora, loftq",
    "targets": "sites: a role (`query`), a group (`attention`, `ffn`, `all-linear`), a name, a pattern, or a list",
    "unipelt.mlp": "inner width of the network that computes the prefix while training",
    "width": "width of the bottleneck",
}


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """`text` as a cell of a table; what stands between backticks is code and stays."""
    plain = [re.sub(r"([|<>*_\[\]])", r"\\\1", part) for part in text.split("`")[::2]]
    code = [f"`{part}`" for part in text.split("`")[1::2]]
    return "".join(part for pair in itertools.zip_longest(plain, code, fillvalue="") for part in pair)


def first_sentence(kind: type) -> str:
    """The first paragraph of a docstring, on one line."""
    return escaped(" ".join((kind.__doc__ or "").partition("\n\n")[0].split()))


def page_of(name: str) -> tuple[Path, str]:
    """The page of a method, and the heading on it where several methods share one; "" where it has its own."""
    own = DOCS / "methods" / f"{name}.md"
    if own.exists():
        return own, ""
    for page in sorted((DOCS / "methods").glob("*.md")):
        if f"{{#{name}}}" in page.read_text(encoding="utf-8"):
            return page, name
    return own, ""


def _link(name: str) -> str:
    page, heading = page_of(name)
    return f"[{name}]({page.name}{'#' if heading else ''}{heading})"


def _on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _cases() -> Any:
    """The grid of the conformance tests: examples, refusals and models."""
    _on_path(DOCS.parent / "tests")
    from conformance import cases

    return cases


def _results() -> Any:
    file = DOCS.parent / "benchmarks" / "results" / "methods.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def results_of(results: Any, name: str) -> str:
    """A table of the results of one method, in every form that was measured, with full fine-tuning beside it."""
    texts: dict[str, str] = results["methods"]
    own = [key for key in texts if key == name or key.startswith(f"{name}-")]
    own = own or [key for key in texts if name in key.split("+")]
    rows, notes = [], []
    for task, told in results["tasks"].items():
        found = results["summary"].get(task, {})
        times, digits, unit = (100, 1, " %") if told["metric"] == "accuracy" else (1, 3, " nats")

        def shown(value: float | None, form: str = "{}", sign: str = "", by: int = times, digits: int = digits) -> str:
            return "" if value is None else form.format(f"{by * value:{sign}.{digits}f}")

        mine = [key for key in own if key in found]
        for key in [*mine, *(["full"] if mine and "full" in found and "full" not in mine else [])]:
            row = found[key]
            rows.append(
                (
                    told["title"], f"`{row['text']}`", row["seeds"], shown(row["score"]) + unit
                    + shown(row["score_sd"], " ± {}"), shown(row["gain"], sign="+") + shown(row["gain_se"], " ± {}"),
                    f"{100 * row['trainable_share']:.2f} %", f"{row['adapter_bytes'] / 1e3:,.0f} kB",
                    f"{row['peak_bytes'] / 1e6:,.0f} MB", f"{1000 * row['step_seconds']:.0f} ms",
                )
            )  # fmt: skip
            if row.get("why"):
                notes.append(f"{told['title']}: {escaped(row['why'])}\n")
    if not rows:
        return "Not among the results yet: [every method](../benchmarks.md#every-method).\n"
    head = ("data and base", "method", "seeds", "score", "gain", "trained", "file", "memory", "step")
    said = (
        "Score: accuracy in %, or loss in nats a token, ± standard deviation over seeds. Gain over the frozen base "
        "with its head ± standard error; without one, one seed was run. Memory beyond the base; processor time a step, "
        "one thread ([benchmarks](../benchmarks.md#every-method)).\n"
    )
    return "\n".join([table(head, rows), said, *notes])


@cache
def _tried(name: str) -> tuple[str, str, str, str]:
    """Ports, whether it merges, whether it starts as the base, PEFT's name in its file: all of them tried."""
    import tempfile

    import torch

    from graftlm.core import attach
    from graftlm.errors import NotMergeable

    method = _cases().EXAMPLES[name]
    from models_for_tests import inputs_for, tiny

    torch.manual_seed(0)
    model = tiny(next(each for each in ("qwen2", "bert") if (name, each) not in _cases().REFUSALS))
    batch = inputs_for(model)
    batch["labels"] = batch["input_ids"] if model.can_generate() else torch.tensor([0, 1, 0])
    adapter = attach(model, method, samples=[batch])
    ports = sorted({part.delta.port for part in adapter.parts})
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter")
        config = json.loads((Path(folder) / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    try:
        adapter.merge()
        merges = "yes"
    except NotMergeable:
        merges = "no"
    starts = "yes" if all(part.starts_as_identity for part in method.parts) else "no"
    stored = config["peft_type"]
    return ", ".join(ports), merges, starts, "-" if stored == "GRAFTLM" else stored


@cache
def _keys(name: str) -> frozenset[str]:
    """The names of a method's tensors on a classifier."""
    from graftlm.core.adapter import parts_of

    parts = parts_of(_classifier(), _example(name))
    return frozenset(f"{part.site.key}.{tensor}" for part in parts for tensor in part.delta.state_dict())


def _refused(first: str, second: str) -> bool:
    from graftlm.core.adapter import parts_of
    from graftlm.errors import MethodError

    try:
        parts_of(_classifier(), _example(first) + _example(second))
    except MethodError as error:
        return error.findings[0].code == "T105"
    return False


def _classifier() -> Any:
    _on_path(DOCS)
    from drawing import classifier

    return classifier()


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
    from graftlm.core.adapter import parts_of
    from graftlm.errors import GraftError

    method = _example(name)
    for base, model in _models().items():
        total = sum(parameter.numel() for parameter in model.parameters())
        try:
            parts = parts_of(model, method)
        except GraftError as error:
            yield base, _spaced(total), escaped(error.findings[0].message.partition(": ")[2]), "", ""
            continue
        count = sum(p.numel() for p in {id(p): p for part in parts for p in part.delta.parameters()}.values())
        kept = [part.method.bake(part).delta.state_dict() for part in parts]
        size = sum(tensor.numel() * tensor.element_size() for state in kept for tensor in state.values())
        yield base, _spaced(total), _spaced(count), f"{100 * count / total:.2f} %", f"{size / 1e6:,.1f} MB"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


# --- figures --------------------------------------------------------------------------------------------------------


def figure_of(name: str) -> str:
    """An SVG of where a method acts, or (`ports`) of one method at each port."""
    from graftlm.methods import read_method

    _on_path(DOCS)
    from drawing import drawing_of

    title, text = DRAWN.get(name, (name, ""))
    return drawing_of(title, read_method(text) if text else _example(name))


#: Title and method of the figures that do not show a method as it is by itself.
DRAWN = {
    "ports": ("one method at each port", "lora(targets=[query,value])+series+prefix+prompt+modules(norm)"),
    "modules": ("modules", "modules([embed,head])"),
}


def _example(name: str) -> Any:
    """A method as it is by itself, or, where it asks for settings, as the tests have it."""
    from graftlm.core.adapter import parts_of
    from graftlm.errors import GraftError
    from graftlm.methods import METHODS

    with contextlib.suppress(GraftError, TypeError):
        method = METHODS[name]()
        parts_of(_classifier(), method)
        return method
    return _cases().EXAMPLES[name]


def figures() -> dict[Path, str]:
    """Every figure that is drawn, by its file."""
    from graftlm.methods import METHODS

    names = ["ports", *(name for name in METHODS if page_of(name)[1] == "")]
    return {DOCS / "figures" / f"{name}.svg": figure_of(name) for name in names}


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
    """Fill every page, or with `check` tell which are not current; a method without a page is a fault in both."""
    from graftlm.methods import METHODS

    wanted = {page: filled(page.read_text(encoding="utf-8")) for page in sorted(DOCS.rglob("*.md"))}
    wanted |= figures()
    missing = [name for name in METHODS if not page_of(name)[0].exists()]
    for name in missing:
        print(f"write docs/methods/{name}.md, or a heading with {{#{name}}} on another page there: {name} has neither")
    stale = []
    for page, text in wanted.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            stale.append(page.relative_to(DOCS.parent))
            if not check:
                page.write_text(text, encoding="utf-8")
    for line in dict.fromkeys(_wanted):
        print(line)
    for page in stale:
        print(f"{page} {'is not current: run python docs/generate.py' if check else 'written'}")
    return 1 if missing or _wanted or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
