"""Runs that start from an adapter: they go on where it was left, or leave it as it is under a new one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.errors import GraftError
from graftlm.training import Run, open_adapter
from training.test_checkpoints import stopped
from training.tiny_runs import Tiny, answered_rows, labelled_rows, rows_for, same, save_llama, weights, write_jsonl

ASKED = "lora(rank=2,targets=all-linear)"


@pytest.fixture
def first(tiny: Tiny, answered: Path) -> Run:
    """A run on answered rows, of another method than the default."""
    return tiny(answered, out="first", method=ASKED, template="plain")


def _started(tiny: Tiny, data: Path, start: Run, out: str, **more: Any) -> Run:
    """A run from `start` that is told neither base nor method, unless `more` says it."""
    return tiny(data, **{"out": out, "base": None, "method": None, "start": str(start.folder), "samples": 0, **more})


def test_it_goes_on_where_the_adapter_was_left(first: Run, tiny: Tiny, answered: Path) -> None:
    """Method, base and template come from its files; steps of hardly any length leave its values."""
    before = weights(first)
    run = _started(tiny, answered, first, "on", steps=3, learning_rate=1e-7)
    assert run.record["method"] == str(first.adapter.method)
    assert run.record["base"]["fingerprint"] == first.record["base"]["fingerprint"]
    told = {name: value for name, value in run.record["start"].items() if name != "sha256"}
    assert told == {"folder": str(first.folder / "adapter"), "method": ASKED, "kept": False}
    after = weights(run)
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    assert not same(after, before)  # and is trained
    facts = open_adapter(run.folder).facts
    assert facts["template"]["name"] == "plain"
    assert facts["base"] == open_adapter(first.folder).facts["base"]


def test_a_new_adapter_on_top_leaves_it_as_it_is(first: Run, tiny: Tiny, answered: Path) -> None:
    run = _started(tiny, answered, first, "top", steps=2, learning_rate=0.01, method="prompt(length=3)")
    before, after = weights(first), weights(run)
    assert run.record["method"] == ASKED + "+prompt(length=3)"
    state = run.adapter.state()
    for name, tensor in first.adapter.state().items():
        assert torch.equal(state[name], tensor), name
    assert len(state) == len(before) + 1 == len(after) + 0
    again = open_adapter(run.folder)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(again.model(ids).logits, run.model(ids).logits)
    assert not torch.equal(again.model(ids).logits, open_adapter(first.folder).model(ids).logits)


def test_what_cannot_stand_on_top_is_refused(first: Run, tiny: Tiny, answered: Path) -> None:
    with pytest.raises(
        GraftError, match=r"cannot go on top of .*names twice.*U149.\n  fix: graftlm export .* --to merged -o OUT"
    ):
        _started(tiny, answered, first, "twice", method="lora(rank=2)")


def test_preferences_are_told_against_the_adapter_that_they_start_from(first: Run, tiny: Tiny, tmp_path: Path) -> None:
    """Not against the base: the first loss is log 2, since nothing has changed yet."""
    from training.tiny_runs import metrics_of

    data = write_jsonl(tmp_path / "pairs.jsonl", rows_for("dpo"))
    run = _started(tiny, data, first, "dpo", steps=2, learning_rate=1e-7)
    losses = [row["loss"] for row in metrics_of(run.folder) if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert (run.folder / "start" / "adapter_config.json").is_file()


def test_another_base_and_other_settings_are_refused(first: Run, tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", initializer_range=0.1)
    with pytest.raises(GraftError, match="A213"):
        _started(tiny, answered, first, "base", base=other)
    with pytest.raises(GraftError, match="U148"):
        _started(tiny, answered, first, "template", template="turns")
    with pytest.raises(GraftError, match="U144"):
        tiny(answered, start=str(tmp_path / "nothing"), out="nothing")


def test_a_classifier_goes_on_with_its_labels(tiny: Tiny, labelled: Path, tmp_path: Path) -> None:
    first = tiny(labelled, out="first")
    rows = [row for row in labelled_rows() if row["label"] == "return"] + [
        {"text": f"Where is it, {at}?", "label": "track"} for at in range(10)
    ]
    run = _started(tiny, write_jsonl(tmp_path / "more.jsonl", rows), first, "more", steps=1)
    assert run.record["results"]["labels"] == first.record["results"]["labels"]
    strange = write_jsonl(tmp_path / "strange.jsonl", [{**row, "label": "other"} for row in rows])
    with pytest.raises(GraftError, match="D132"):
        _started(tiny, strange, first, "strange")
    with pytest.raises(GraftError, match="U148"):
        _started(tiny, labelled, first, "task", task="lm")


def test_a_resumed_run_starts_from_the_same(first: Run, tiny: Tiny, answered: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "save_every": 2, "method": "ia3"}
    whole = _started(tiny, answered, first, "whole", **settings)
    broken = _started(tiny, answered, first, "broken", **settings)
    for path in (broken.folder / "checkpoints" / "checkpoint-4").iterdir():
        path.unlink()
    (broken.folder / "checkpoints" / "checkpoint-4").rmdir()
    record = json.loads((broken.folder / "run.json").read_text())
    (broken.folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    resumed = tiny(out="broken", resume_only=True)
    assert same(weights(resumed), weights(whole))


def test_an_adapter_of_pefts_is_trained_on(first: Run, tiny: Tiny, tiny_base: Path, tmp_path: Path) -> None:
    """A folder without our file: the method is read from PEFT's words, the base is said."""
    import shutil

    folder = tmp_path / "peft"
    shutil.copytree(first.folder / "adapter", folder)
    (folder / "graftlm.json").unlink()
    data = write_jsonl(tmp_path / "rows.jsonl", answered_rows())
    run = tiny(data, start=str(folder), method=None, base=tiny_base, out="on", steps=1, learning_rate=1e-7, samples=0)
    before, after = weights(first), weights(run)
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_it_is_taken_up_only_from_the_adapter_that_it_began_with(
    first: Run, tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"steps": 6, "save_every": 2}
    whole = _started(tiny, answered, first, "whole", **given)

    def again(data: Path, **more: Any) -> Run:
        return _started(tiny, data, first, **more)

    for out in ("run", "other"):
        with monkeypatch.context() as patch:
            stopped(again, answered, 2, patch, out=out, **given)
    rest = _started(tiny, answered, first, "run", resume=True, **given)
    assert same(weights(rest), weights(whole))
    tiny(answered, out="again", method=ASKED, template="plain", seed=1)
    shutil.copytree(first.folder.parent / "again" / "adapter", first.folder / "adapter", dirs_exist_ok=True)
    with pytest.raises(GraftError, match="the adapter to start from .* changed since .*U109"):
        _started(tiny, answered, first, "other", resume=True, **given)
