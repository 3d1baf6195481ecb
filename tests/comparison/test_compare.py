"""Comparisons on tiny bases: repeatable, resumable, fair, and refused before anything is trained."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from graftlm.comparison import Comparison, bench, compare
from graftlm.comparison.bench import Bench, flops_of, open_bench
from graftlm.comparison.budgets import count, sized
from graftlm.comparison.comparing import next_factor
from graftlm.comparison.incontext import in_context, prompted
from graftlm.comparison.settings import ComparisonSettings, read_budget
from graftlm.comparison.summary import break_even, pareto, summarised
from graftlm.data import Collator, prepare
from graftlm.errors import Finding, GraftError, RunError
from graftlm.evaluation import losses
from graftlm.methods import read_method
from graftlm.models import load_base
from graftlm.objectives import CausalLM
from graftlm.training import trainer
from graftlm.training.early import data_of
from graftlm.training.measures import MEASURES, measure_of
from training.tiny_runs import answered_rows, labelled_rows, rows_for, texts, write_jsonl

Compare = Callable[..., Comparison]


@pytest.fixture
def small(tiny_bert: Path, tmp_path: Path) -> Compare:
    """`compare` of two methods on 40 labelled rows; seconds."""
    rows = write_jsonl(tmp_path / "rows.jsonl", labelled_rows(40))

    def run(out: str = "out", **settings: Any) -> Comparison:
        given: dict[str, Any] = {
            "base": tiny_bert, "methods": ["lora(rank=2)", "bitfit"], "full": False, "seeds": 2, "trials": 2,
            "steps": 3, "batch": 4, "threads": 1, "waive": ("D129",),
        }  # fmt: skip
        return compare(rows, output=tmp_path / out, quiet=True, **(given | settings))

    return run


def numbers(found: Comparison) -> str:
    """The summary without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(inner) for key, inner in value.items() if "seconds" not in key}
        return [timeless(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(timeless(found.record["summary"]), sort_keys=True)


def test_two_comparisons_give_the_same_numbers_and_leave_the_base_as_it_was(small: Compare) -> None:
    one, other = small("one"), small("other")
    assert numbers(one) == numbers(other)
    base = one.record["base"]
    assert base["sha256_before"] == base["sha256_after"]
    assert {c["name"] for c in one.contestants} == {"lora-rank-2", "bitfit", "probe", "tfidf", "majority"}
    for contestant in one.contestants:
        assert contestant["low"] <= contestant["score"] <= contestant["high"]
        assert contestant["kind"] == "baseline" or contestant["cost"]["memory_bytes"] > 0
    assert [pair["verdict"] for pair in one.pairs]
    by_seed = next(c for c in one.contestants if c["name"] == "bitfit")
    runs = [json.loads((one.folder / "runs" / f"bitfit-{seed}.json").read_text()) for seed in (0, 1)]
    assert by_seed["by_seed"] == [pytest.approx(np.mean(run["values"])) for run in runs]


def test_one_that_was_stopped_goes_on_as_if_it_had_not_been(small: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small("whole")
    fitted, calls = Bench.fitted, []

    def stopping(self: Bench, *args: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return fitted(self, *args, **options)

    monkeypatch.setattr(Bench, "fitted", stopping)
    with pytest.raises(KeyboardInterrupt):
        small("parts")
    again = small("parts")
    assert len(calls) == 5 + 1 + 3, "what was finished is not done again"
    assert numbers(again) == numbers(whole)
    assert numbers(small("parts")) == numbers(whole)
    assert len(calls) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="the base is shared by fork")
def test_processes_beside_one_another_give_the_same_numbers(
    small: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, where = Bench.scored, tmp_path / "where"

    def noting(self: Bench, items: Any) -> Any:
        with where.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return scored(self, items)

    monkeypatch.setattr(Bench, "scored", noting)
    beside = small("beside", jobs=2)
    noted = where.read_text().split()
    assert len(noted) == 8
    assert str(os.getpid()) not in noted, "nothing was trained here"
    assert numbers(beside) == numbers(small("alone"))


@pytest.mark.skipif(sys.platform != "linux", reason="the base is shared by fork")
def test_a_process_that_is_killed_is_told_of_and_loses_nothing(small: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = Bench.scored

    def killed(self: Bench, items: Any) -> Any:
        if items is self.test:
            os.kill(os.getpid(), signal.SIGKILL)
        return scored(self, items)

    with monkeypatch.context() as patched:
        patched.setattr(Bench, "scored", killed)
        with pytest.raises(GraftError, match="ended from outside") as caught:
            small("killed", jobs=2)
    assert caught.value.findings[0].code == "U159"
    assert numbers(small("killed")) == numbers(small("alone"))


def test_what_a_classifier_forgets_is_seen_on_another_task(small: Compare, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", labelled_rows(30))
    found = small(other=str(other), methods=["lora(rank=2)", "head"], seeds=1, trials=1)
    known = {row["name"]: row.get("other") for row in found.contestants}
    assert known["head"] == known["probe"], "a head leaves the body as it was"
    assert 0 <= known["lora-rank-2"] <= 1
    assert known["tfidf"] is None
    (headed,) = (row["other_change"] for row in found.contestants if row["name"] == "head")
    assert headed == {"value": 0, "low": 0, "high": 0}
    assert "Another task" in found.report.read_text()


def test_what_is_forgotten_is_told_of_tasks_whose_baselines_are_no_model(tiny_bert: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "n.jsonl", [{"text": f"number {at}", "score": at % 5} for at in range(40)])
    other = write_jsonl(tmp_path / "other.jsonl", labelled_rows(30))
    found = compare(
        rows, base=tiny_bert, methods=["lora(rank=2)", "head"], full=False, seeds=1, trials=1, steps=2, batch=4, quiet=True,
        other=str(other), output=tmp_path / "out", threads=1, waive=("D129",),
    )  # fmt: skip
    tuned = next(row for row in found.contestants if row["name"].startswith("lora"))
    assert tuned["other_change"]["low"] <= tuned["other_change"]["value"] <= tuned["other_change"]["high"]
    assert "Another task" in found.report.read_text()


def test_another_task_is_asked_with_the_adapter_on(
    small: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[float]] = {}

    def noting(model: Any, known: Any, asked: Any, collate: Any) -> list[int]:
        ids = {key: collate(asked[:2])[key] for key in ("input_ids", "attention_mask")}
        last = model.base_model(**ids)[0].detach().flatten()  # normed: the sum of its squares is always the same
        seen.setdefault(len(asked), []).append(float((last * torch.linspace(0, 1, len(last))).sum()))
        return [0] * len(asked)

    monkeypatch.setattr(bench, "probe_baseline", noting)
    other = write_jsonl(tmp_path / "other.jsonl", labelled_rows(30))
    small(other=str(other), methods=["lora(rank=2)", "head"], seeds=1, trials=1)
    tuned, headed, untouched = seen[15]
    assert tuned != untouched == headed


def test_the_test_rows_are_scored_once_and_no_learning_rate_is_chosen_by_them(
    small: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, seen = Bench.scored, []

    def noting(self: Bench, items: Any) -> Any:
        seen.append("test" if items is self.test else "validation" if items is self.validation else "other")
        return scored(self, items)

    monkeypatch.setattr(Bench, "scored", noting)
    small()
    assert seen == ["validation"] * 4 + ["test"] * 4


def test_a_rate_that_breaks_training_down_is_out_and_the_comparison_goes_on(
    small: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Bench.fitted

    def breaking(self: Bench, method: Any, *, factor: float = 1.0, **options: Any) -> Any:
        if factor == 3.0:
            raise RunError(Finding("U113", "the loss is nan at step 2"))
        return fitted(self, method, factor=factor, **options)

    monkeypatch.setattr(Bench, "fitted", breaking)
    found = small()
    assert [c["factor"] for c in found.contestants if c["kind"] == "trained"] == [1.0, 1.0]
    assert "the loss is nan at step 2" in (found.folder / "log.txt").read_text()


def test_a_loss_that_explodes_does_not_stop_a_comparison(small: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_TIMES", -100)  # every loss is an explosion
    assert len(small(steps=9, trials=1, seeds=1).contestants) == 5


def test_a_folder_with_another_comparison_is_left_alone(small: Compare, tmp_path: Path) -> None:
    small()
    before = (tmp_path / "out" / "comparison.json").read_bytes()
    with pytest.raises(GraftError, match="seeds: 2 there, 3 asked for") as caught:
        small(seeds=3)
    assert caught.value.findings[0].code == "U152"
    assert (tmp_path / "out" / "comparison.json").read_bytes() == before
    record = json.loads(before)
    del record["settings"]["format"]  # as of a version that did not have the setting yet
    (tmp_path / "out" / "comparison.json").write_text(json.dumps(record))
    assert small().record["settings"]["format"] == "auto"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(GraftError, match="no comparison and not empty"):
        small("mine")


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("comparison.json", "{", "no JSON"),
        ("comparison.json", '{"settings": {}}', "no data, base, started"),
        ("runs/bitfit-1.json", "[]", "no object"),
        ("runs/bitfit-1.json", '{"values": [1]}', "no counts"),
        ("runs/bitfit-1.json", '{"values": [1], "counts": [1], "general": 4.5}', "general is not told row by row"),
        ("trials/bitfit/1.json", '{"value": 1}', "no factor"),
    ],
)
def test_a_damaged_file_of_a_comparison_is_named(
    file: str, text: str, why: str, small: Compare, tmp_path: Path
) -> None:
    scores = {row["name"]: row["score"] for row in small().contestants}
    place = tmp_path / "out" / file
    place.write_text(text)
    with pytest.raises(GraftError, match=why) as caught:
        small()
    assert [finding.code for finding in caught.value.findings] == ["U160"]
    assert f"rm {place}" in caught.value.findings[0].fix
    assert place.read_text() == text
    if file != "comparison.json":
        place.unlink()
        assert {row["name"]: row["score"] for row in small().contestants} == scores


def test_everything_that_is_wrong_is_said_before_anything_is_trained(
    small: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "fitted", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(GraftError) as caught:
        small(methods=["lorra", "lora", "ia3"], budget="100")
    codes = [finding.code for finding in caught.value.findings]
    assert codes == ["T101", "U151", "U151"]
    assert "at its smallest" in str(caught.value)
    for settings, why in (
        ({"methods": ["lora", "lora"]}, "named twice"),
        ({"methods": ["lora"]}, "one contestant alone"),
        ({"budget": "many"}, "no share of the base"),
        ({"seeds": 0, "trials": 0}, "seeds is 0"),
        ({"shots": (2,)}, "is an encoder"),
        ({"general": "bundled:messages"}, "Bert is none"),
    ):
        with pytest.raises(GraftError, match=why):
            small(**settings)
    assert not (tmp_path / "out").exists()


def test_optuna_is_asked_for_by_name(small: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(GraftError, match=r"graftlm\[compare\]"):
        small(trials=4)


def test_tags_without_the_library_that_scores_them_are_not_compared(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_for("tag", 24))
    with pytest.raises(GraftError, match=r"graftlm\[scores\]"):
        compare(rows, base=tiny_bert, methods=["lora", "head"], output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_few_trials_are_the_same_for_all_and_go_to_the_better_side() -> None:
    assert next_factor([]) == 1.0
    assert next_factor([(1.0, 0.5)]) == 3.0
    assert next_factor([(1.0, 0.5), (3.0, 0.4)]) == 8.0
    assert next_factor([(1.0, 0.5), (3.0, 0.6)]) == 0.333


def test_the_next_rate_depends_on_what_was_seen_and_on_nothing_else() -> None:
    history = [(1.0, 0.5), (3.0, 0.3), (8.0, 0.35)]
    found = next_factor(history)
    assert found == next_factor(list(history))
    assert 1 / 8 <= found <= 8


# --- budgets ---


@pytest.mark.parametrize("text", ["lora", "adalora", "series", "parallel", "prefix", "prompt", "sparse", "lora+bitfit"])
def test_sizes_are_the_largest_within_the_budget(text: str, answered: Path, tiny_base: Path) -> None:
    model = open_bench(ComparisonSettings(data=str(answered), base=str(tiny_base))).model
    method, budget = read_method(text), 900
    found = sized(model, method, budget)
    assert count(model, found) <= budget
    part = found.parts[0]
    key = next(key for key in ("rank", "width", "length", "fraction") if hasattr(part, key))
    step = 1e-3 if key == "fraction" else 1
    larger = read_method(str(found).replace(f"{key}={getattr(part, key)}", f"{key}={getattr(part, key) + step}"))
    assert count(model, larger) > budget
    if hasattr(part, "alpha"):
        assert part.alpha / part.rank == method.parts[0].alpha / method.parts[0].rank


def test_budgets_are_read_as_people_write_them() -> None:
    assert read_budget("0.3 %", 1000) == 3
    assert read_budget("1.5M", 1) == 1_500_000
    assert read_budget("12_000", 1) == 12_000
    for wrong in ("", "x", "0", "-3", "0%"):
        with pytest.raises(GraftError, match="U155"):
            read_budget(wrong, 1000)


# --- in-context ---


@pytest.fixture
def asking(tiny_base: Path, tmp_path: Path) -> Bench:
    rows = write_jsonl(tmp_path / "answers.jsonl", answered_rows(20))
    return open_bench(ComparisonSettings(data=str(rows), base=str(tiny_base), shots=(2,)))


def test_a_cached_prompt_gives_the_same_losses_for_less(asking: Bench) -> None:
    asked = prompted(asking, 2, seed=0)
    assert asked.shared > 10
    found = in_context(asking.model, asking, asked)
    assert found.cache_difference < 1e-3
    assert found.cached_query_flops < 0.7 * found.query_flops
    assert found.cache_bytes > 0
    plain = asking.scored(asking.test)
    none = in_context(asking.model, asking, prompted(asking, 0, seed=0))
    np.testing.assert_allclose(none.scored.values, plain.values, rtol=1e-5)
    assert not np.allclose(found.scored.values, plain.values, rtol=1e-2), "the examples make no difference"
    assert [len(item["labels"]) - item["labels"].count(-100) for item in asked.items] == list(plain.counts)


def test_labels_are_chosen_by_rank(tiny_base: Path, labelled: Path) -> None:
    settings = ComparisonSettings(data=str(labelled), base=str(tiny_base), waive=("D129",))
    ready = open_bench(settings)
    asked = prompted(ready, 2, seed=1)
    assert len(asked.items) == 2 * len(ready.test)
    from graftlm.models import load_base

    found = in_context(load_base(tiny_base)[0], ready, asked)
    assert set(found.scored.predicted or ()) <= {0, 1}
    assert found.scored.mean == pytest.approx(np.mean(found.scored.values))


def test_a_prompt_beyond_the_context_is_refused(asking: Bench) -> None:
    with pytest.raises(GraftError, match="the base reads 128") as caught:
        prompted(asking, 12, seed=0)
    assert caught.value.findings[0].fix.startswith("--shots")


def test_attention_is_counted_on_a_cpu() -> None:
    query = torch.randn(1, 2, 8, 4)
    found = flops_of(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert found == 2 * 2 * (2 * 8 * 8 * 4)  # two products, two heads, a multiply and an add


def test_answers_with_prompting_forgetting_and_full_fine_tuning(tiny_base: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", answered_rows(24))
    general = tmp_path / "general.txt"
    general.write_text(texts(8))
    found = compare(
        rows, base=tiny_base, methods=["lora"], seeds=2, trials=1, steps=3, batch=4, shots=(1,), quiet=True,
        general=str(general), output=tmp_path / "out", budget="400",
    )  # fmt: skip
    by_name = {row["name"]: row for row in found.contestants}
    assert set(by_name) == {"lora", "full", "base", "in-context-1"}
    assert by_name["full"]["general"] != by_name["lora"]["general"]
    for name in ("full", "lora"):
        change = by_name[name]["general_change"]
        assert change["low"] <= change["value"] <= change["high"]
        assert change["value"] == pytest.approx(by_name[name]["general"] - by_name["base"]["general"])
    assert "general_change" not in by_name["base"]
    assert by_name["lora"]["cost"]["beside_head"] <= 400 < by_name["full"]["cost"]["beside_head"]
    paid = by_name["full"]["break_even"]["in-context-1"]
    assert paid["plain"] is not None
    assert paid["cached"] is None or paid["cached"] > paid["plain"]
    page = found.report.read_text()
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    for said in ("Training or prompting", "What was forgotten", "bit-identical before and after", "on the front"):
        assert said.lower() in page.lower()
    table = (found.folder / "table.csv").read_text().splitlines()
    assert len(table) == 1 + len(found.contestants)
    assert "\\toprule" in (found.folder / "table.tex").read_text()
    assert (found.folder / "table.md").read_text().count("\n") == 2 + len(found.contestants)


@pytest.mark.parametrize("config", [transformers.BertConfig(), transformers.T5Config(), transformers.BartConfig()])
def test_texts_are_for_causal_bases_alone(config: Any) -> None:
    with pytest.raises(RunError, match="is none") as caught:
        bench._writer(ComparisonSettings(), None, config)
    assert caught.value.findings[0].code == "U156"


def test_what_a_classifier_on_a_causal_base_forgets(tiny_base: Path, tmp_path: Path) -> None:
    """Its body writes on with the base's own output map; columns of the other files have flags of their own."""
    rows = write_jsonl(tmp_path / "rows.jsonl", labelled_rows(40))
    general = write_jsonl(tmp_path / "general.jsonl", [{"line": text} for text in texts(8).splitlines() if text])
    other = write_jsonl(
        tmp_path / "other.jsonl", [{"line": f"{r['text']}!", "kind": r["label"]} for r in labelled_rows(24)]
    )

    def compared(**settings: Any) -> Comparison:
        return compare(
            rows, base=tiny_base, methods=["lora", "prefix"], seeds=1, trials=1, steps=3, batch=4, quiet=True,
            general=str(general), other=str(other), output=tmp_path / "out", **settings,
        )  # fmt: skip

    with pytest.raises(GraftError) as caught:
        compared(general_mapping={"text": "lines"})
    assert "--general-map text=" in str(caught.value)
    with pytest.raises(GraftError) as caught:
        compared(general_mapping={"text": "line"}, other_mapping={"text": "lines", "label": "kind"})
    assert "--other-map text=" in str(caught.value)
    found = compared(general_mapping={"text": "line"}, other_mapping={"text": "line", "label": "kind"})
    by_name = {row["name"]: row for row in found.contestants}
    model, tokenizer = load_base(str(tiny_base))
    items = prepare(
        data_of(str(general)), mapping={"text": "line"}, eval_share=0, task="lm", tokenizer=tokenizer, max_length=128
    ).train
    untouched = losses(model, CausalLM.of(model), items, Collator(tokenizer.pad_token_id, max_length=128)).mean
    assert by_name["probe"]["general"] == pytest.approx(untouched, rel=1e-5)
    assert len({row["general"] for row in found.contestants if row.get("general") is not None}) == 4
    assert "What was forgotten" in found.report.read_text()
    assert found.record["base"]["sha256_before"] == found.record["base"]["sha256_after"]


# --- tasks ---

_BASES = {"seq2seq": "tiny_t5", "dpo": "tiny_base", "tfew": "tiny_base", "lm": "tiny_base", "sft": "tiny_base"}


@pytest.mark.parametrize("task", sorted(MEASURES))
def test_every_task_is_compared(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made = [{"text": text} for text in texts(24).split("\n\n")] if task in ("lm", "mlm") else rows_for(task, 24)
    rows = write_jsonl(tmp_path / "rows.jsonl", made)
    found = compare(
        rows, base=request.getfixturevalue(_BASES.get(task, "tiny_bert")), methods=["lora(rank=2)"], seeds=2, trials=2,
        steps=2, batch=4, task=task, quiet=True, output=tmp_path / "out", threads=1, waive=("D129", "D131"),
    )  # fmt: skip
    by_name = {row["name"]: row for row in found.contestants}
    assert {"lora-rank-2", "full"} < by_name.keys(), "no baseline"
    assert by_name["full"]["score"] != by_name["lora-rank-2"]["score"] or MEASURES[task].higher_is_better
    assert found.record["base"]["sha256_before"] == found.record["base"]["sha256_after"]
    assert by_name["lora-rank-2"]["cost"]["query_flops"] > 0
    assert MEASURES[task].title in found.report.read_text()


def test_rows_with_several_labels_are_compared(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "labels": [row["label"], "urgent"] if at % 3 else []}
        for at, row in enumerate(labelled_rows(24))
    ]
    found = compare(
        write_jsonl(tmp_path / "rows.jsonl", rows), base=tiny_bert, methods=["bitfit"], seeds=1, trials=1, steps=2,
        batch=4, quiet=True, output=tmp_path / "out", waive=("D129",),
    )  # fmt: skip
    assert found.record["summary"]["measure"] == "share of labels right"
    assert {row["name"] for row in found.contestants} == {"bitfit", "full", "probe", "tfidf", "majority"}


def test_tasks_in_which_a_row_has_no_score_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_for("kto", 24))
    with pytest.raises(GraftError, match="rows are for kto") as caught:
        compare(rows, base=tiny_base, methods=["lora", "ia3"], output=tmp_path / "out", quiet=True)
    assert caught.value.findings[0].code == "U150"
    with pytest.raises(GraftError, match="fix: --task reward"):
        ComparisonSettings(task="rewards")


def test_what_rows_add_to_a_ratio_is_the_ratio_and_has_its_error() -> None:
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 5, size=(4000, 60))
    values = draw.binomial(counts, 0.6)
    measure = MEASURES["tag"]
    scores = values.sum(1) / counts.sum(1)
    by_row = np.array([measure.by_row(v, c) for v, c in zip(values, counts, strict=True)])
    np.testing.assert_allclose(by_row.mean(1), scores)
    errors = by_row.std(1, ddof=1) / np.sqrt(60)
    assert errors.mean() == pytest.approx(scores.std(), rel=0.05)


# --- the summary ---


def run(name: str, seed: int, values: Any) -> dict[str, Any]:
    values = [float(value) for value in values]
    return {"contestant": name, "seed": seed, "values": values, "counts": [1] * len(values), "predicted": None}


def test_the_summary_sees_what_is_there_and_not_what_is_not() -> None:
    draw = np.random.default_rng(0)
    difficulty = draw.random(300)
    runs = [
        run(name, seed, (difficulty + 0.3 * draw.random(300) < skill))
        for name, skill in (("good", 0.95), ("same", 0.95), ("bad", 0.6))
        for seed in range(3)
    ]
    runs.append(run("majority", 0, difficulty < 0.5))
    lines = [{"name": name, "title": name, "kind": "trained"} for name in ("bad", "good", "same")]
    lines.append({"name": "majority", "title": "majority", "kind": "baseline"})
    found = summarised(lines, runs, measure_of("classify"), truth=[0] * 300, labels=1)
    verdicts = {frozenset((pair["one"], pair["other"])): pair["verdict"] for pair in found["pairs"]}
    assert verdicts[frozenset(("good", "same"))] == "not distinguishable"
    assert verdicts[frozenset(("good", "bad"))] != "not distinguishable"
    assert verdicts[frozenset(("same", "bad"))] != "not distinguishable"
    assert found["best_baseline"] == "majority"
    assert {a["one"]: a["verdict"] for a in found["against_baseline"]}["good"] == "better"
    assert found["contestants"][-2]["name"] == "bad" or found["contestants"][-1]["name"] == "bad"


def test_a_change_of_what_was_known_has_an_interval_over_seeds_and_rows() -> None:
    draw = np.random.default_rng(1)
    known = draw.normal(3, 1, 200)
    runs = [run("base", 0, np.zeros(10)) | {"general": list(known)}]
    for name, change in (("much", 0.5), ("nothing", 0.0)):
        for seed in range(3):
            own = known + change + draw.normal(0, 0.2, 200) + draw.normal(0, 0.02)
            runs.append(run(name, seed, np.zeros(10)) | {"general": list(own)})
    lines = [{"name": name, "title": name, "kind": "trained"} for name in ("much", "nothing")]
    lines.append({"name": "base", "title": "base", "kind": "baseline"})
    found = {row["name"]: row for row in summarised(lines, runs, measure_of("classify"))["contestants"]}
    assert found["base"]["general"] == pytest.approx(known.mean())
    much, nothing = found["much"]["general_change"], found["nothing"]["general_change"]
    assert 0.3 < much["low"] < 0.5 < much["high"] < 0.7
    assert nothing["low"] < 0 < nothing["high"]


def test_fronts_and_break_even() -> None:
    points = [("a", 0.9, 10.0), ("b", 0.9, 10.0), ("c", 0.95, 100.0), ("d", 0.8, 20.0)]
    assert pareto(points) == ["a", "b", "c"]
    assert pareto([(name, -score, cost) for name, score, cost in points], higher_is_better=False) == ["a", "b", "c"]
    assert break_even(500, 2, 7) == 100
    assert break_even(500, 7, 7) is None


def test_costs_are_counted(small: Compare) -> None:
    cost = next(c for c in small().contestants if c["name"] == "bitfit")["cost"]
    assert cost["parameters"] > cost["beside_head"] > 0
    assert cost["train_flops"] > 3 * cost["query_flops"]
    assert bench._NOTHING.parameters == 0


def test_what_one_contestant_held_is_given_back(labelled: Path, tiny_bert: Path) -> None:
    ready = open_bench(ComparisonSettings(data=str(labelled), base=str(tiny_bert), steps=1, waive=("D129",)))
    alive = []
    for _ in range(3):
        with ready.fitted(read_method("full"), seed=0, counted=True):
            pass
        gc.collect()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects()
                if isinstance(t, torch.Tensor)}  # fmt: skip
        alive.append(sum(held.values()))
    assert alive[2] == alive[1], "each contestant left its tensors behind"


def test_new_heads_are_a_regression_on_request_and_the_base_is_as_it_was(labelled: Path, tiny_bert: Path) -> None:
    losses = {}
    for head in ("probe", "fresh"):
        settings = ComparisonSettings(
            data=str(labelled), base=str(tiny_bert), steps=1, head=head, waive=("D129",), methods=("head",)
        )
        there = open_bench(settings)
        before = {name: value.clone() for name, value in there.model.state_dict().items()}
        with there._fresh_head(0):
            losses[head] = there.scored(there.train).mean_nats
        assert all(torch.equal(value, before[name]) for name, value in there.model.state_dict().items())
    assert losses["probe"] < losses["fresh"]
    with pytest.raises(GraftError, match="wanted probe or fresh"):
        ComparisonSettings(head="none")
