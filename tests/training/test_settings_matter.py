"""No dead setting: each setting of the schema changes what a run does, writes or refuses, or is excused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.errors import GraftError
from graftlm.settings import SETTINGS, RunSettings
from graftlm.training import Run, train
from graftlm.training.decisions import decide_length
from graftlm.training.early import context_of
from training.tiny_runs import (
    Tiny,
    answered_rows,
    labelled_rows,
    metrics_of,
    rows_for,
    same,
    save_llama,
    weights,
    write_jsonl,
)

#: Setting -> a value that must lead to other weights than the default does.
OTHER_WEIGHTS: dict[str, Any] = {
    "train.epochs": 3.0,
    "train.steps": 3,
    "train.learning_rate": 0.01,
    "train.batch": 8,
    "train.max_length": 24,
    "train.schedule": "cosine",
    "train.warmup": 0.5,
    "train.weight_decay": 0.5,
    "train.max_grad_norm": 0.05,
    "train.seed": 1,
    "data.max_rows": 10,
    "data.eval_share": 0.5,
    "data.map": {"prompt": "completion", "completion": "prompt"},
    "data.template": "plain",
    "method": "lora(rank=3)",
    "model.dtype": "bfloat16",
}
#: Setting -> why no run here can show it.
EXCUSED = {
    "model.revision": "names a commit of a hub; there is no network here. It is handed to transformers and written down.",
    "model.trust_remote_code": "runs code of the model's author; tests/models shows that it is off",
}
#: Setting -> the test below that shows what it does.
SHOWN = {
    "data.path", "data.eval_path", "data.format", "data.drop_bad_rows", "data.merge_labels", "data.waive", "model.name",
    "model.quantize", "model.device_map", "model.max_memory", "model.offload_folder", "train.accumulate", "train.eval_every", "train.save_every", "train.keep_checkpoints",
    "train.early_stopping", "train.recompute", "train.cache_bottom", "train.threads", "train.optimizer",  # tests/training/test_optimizers
    "generate.max_new_tokens",
    "generate.temperature", "generate.top_p", "generate.samples", "output",
    "task", "train.packing", "preferences.beta", "preferences.loss", "preferences.smoothing", "preferences.wanted_weight",
    "preferences.unwanted_weight",  # of rewards: tests/training/test_rewards
    "reinforcement.reward", "reinforcement.answers", "reinforcement.kl_weight", "reinforcement.clip",
    "reinforcement.updates", "reinforcement.discount", "reinforcement.gae_lambda", "reinforcement.value_weight",
    "reinforcement.value_clip",
    "start", "train.track", "data.test",  # tests/training/test_{starting,tracking,last_test}
    "data.prompt", "data.label_words", "data.group", "data.mixture",  # tests/data/test_data_{prompting,sources}
    "data.stream", "data.buffer", "train.group_by_length",  # tests/training/test_streaming
}  # fmt: skip


def test_every_setting_is_accounted_for() -> None:
    assert set(SETTINGS) == set(OTHER_WEIGHTS) | SHOWN | set(EXCUSED)
    assert not set(OTHER_WEIGHTS) & SHOWN


@pytest.fixture(scope="module")
def default_weights(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("default")
    data = write_jsonl(folder / "answered.jsonl", answered_rows())
    with pytest.MonkeyPatch.context() as patch:
        return data, weights(_run(data, tiny_base, folder / "run", patch, {}))


def _run(data: Path, base: Path, out: Path | str, patch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Run:
    from training.tiny_runs import LORA, leave_out_the_slow

    leave_out_the_slow(patch.setattr)
    given: dict[str, Any] = {
        "train.epochs": 2.0, "train.batch": 4, "train.threads": 1, "generate.samples": 0, "method": LORA, **settings
    }  # fmt: skip
    if "train.steps" in settings:
        del given["train.epochs"]
    return train(data, base=base, output=out or None, quiet=True, **given)


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_another_value_leads_to_other_weights(
    name: str, default_weights: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = default_weights
    run = _run(data, tiny_base, tmp_path / "run", monkeypatch, {name: OTHER_WEIGHTS[name]})
    assert not same(weights(run), before)
    section, _, key = name.rpartition(".")
    settings = run.record["settings"]
    assert (settings[section] if section else settings)[key] == OTHER_WEIGHTS[name]


def test_the_same_settings_lead_to_the_same_weights_and_scores(
    default_weights: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = default_weights
    one = _run(data, tiny_base, tmp_path / "one", monkeypatch, {})
    torch.rand(3)  # what was drawn before does not matter
    other = _run(data, tiny_base, tmp_path / "other", monkeypatch, {"train.accumulate": 1})
    assert same(weights(one), before)
    assert same(weights(other), before)
    assert one.record["results"] == other.record["results"]


def test_data_path_and_model_name(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    one = tiny(answered, out="one")
    other = tiny(write_jsonl(tmp_path / "other.jsonl", answered_rows(24)), out="other")
    third = tiny(answered, out="third", base=save_llama(tmp_path / "base", layers=2))
    assert not same(weights(one), weights(other))
    assert len(weights(third)) == 2 * len(weights(one))


def test_task(tiny: Tiny, labelled: Path) -> None:
    tasks = [tiny(labelled, task=task, out=task).task for task in ("auto", "classify", "lm")]
    assert tasks == ["classify", "classify", "lm"]


@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("dpo", {"beta": 0.5, "loss": "ipo", "smoothing": 0.3}),
        ("kto", {"beta": 0.5, "wanted_weight": 3.0, "unwanted_weight": 3.0}),
    ],
)
def test_preferences(task: str, values: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_for(task))
    before = weights(tiny(data, steps=3, learning_rate=0.02, out="default"))
    for name, value in values.items():
        found = weights(tiny(data, steps=3, learning_rate=0.02, out=name, **{f"preferences.{name}": value}))
        assert not same(found, before), name


def test_train_packing(tiny: Tiny, answered: Path, labelled: Path) -> None:
    plain = tiny(answered, out="plain", max_length=64)
    packed = tiny(answered, out="packed", max_length=64, packing=True)
    assert packed.record["steps"] < plain.record["steps"]
    assert "packed into" in packed.record["data"]["loss_line"]
    assert packed.record["results"]["eval_rows"] == plain.record["results"]["eval_rows"]
    for settings in ({"method": "prompt(length=4)"}, {"data": labelled, "task": "classify"}):
        with pytest.raises(GraftError, match="U136"):
            tiny(settings.pop("data", answered), out="refused", packing=True, **settings)


def test_data_eval_path(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"New {n}", "completion": "Yes"} for n in range(3)])
    record = tiny(answered, eval_path=str(held)).record["data"]
    assert (record["train_rows"], record["eval_rows"], len(record["sha256"])) == (20, 3, 2)


def test_data_format(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    odd = tmp_path / "rows.dat"
    odd.write_bytes(answered.read_bytes())
    with pytest.raises(GraftError):
        tiny(odd)
    assert tiny(odd, format="jsonl").record["status"] == "done"


def test_data_drop_bad_rows(tiny: Tiny, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*answered_rows(), {"prompt": "x", "completion": None}])
    with pytest.raises(GraftError, match="D120"):
        tiny(data)
    run = tiny(data, drop_bad_rows=True)
    left_out = [json.loads(line) for line in (run.folder / "data" / "rejected.jsonl").read_text().splitlines()]
    assert len(left_out) == 1
    assert "21" in left_out[0]["place"]


def test_data_merge_labels_and_waive(tiny: Tiny, tmp_path: Path) -> None:
    rows = labelled_rows() + [{"text": f"Send {n} back", "label": "Return"} for n in range(4)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(GraftError, match="D126"):
        tiny(data)
    assert len(tiny(data, merge_labels=True, out="merged").record["results"]["labels"]) == 2
    assert len(tiny(data, waive="D126", out="waived").record["results"]["labels"]) == 3


@pytest.mark.parametrize("codes", ["D105", "D999", "nonsense"])
def test_waiving_what_cannot_be_waived_is_refused(codes: str, tiny: Tiny, answered: Path) -> None:
    with pytest.raises(GraftError, match=codes):
        tiny(answered, waive=codes)


def test_model_quantize_packs_the_base_and_is_remembered(tiny: Tiny, answered: Path) -> None:
    from graftlm.quantisation import quantized
    from graftlm.training import open_adapter

    run = tiny(answered, quantize="int8")
    packed = [path for path, _ in quantized(run.model)]
    assert packed
    opened = open_adapter(run.folder)
    assert [path for path, _ in quantized(opened.model)] == packed
    assert str(opened.adapter.method) == str(run.adapter.method)


def test_model_device_map_lays_parts_out_on_disk(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    from graftlm.training import open_adapter

    base = save_llama(tmp_path / "base", layers=3, intermediate_size=4096)
    # Room for the embeddings and the first blocks.
    placed = {"device_map": "auto", "max_memory": {"cpu": "1100KB"}, "offload_folder": str(tmp_path / "disk")}
    run = tiny(answered, base=base, quantize="nf4", **placed)
    assert "disk" in run.model.hf_device_map.values()
    assert list((tmp_path / "disk").iterdir())
    assert run.record["results"]["scores"]
    opened = open_adapter(run.folder)  # on the same base, all in memory
    assert not hasattr(opened.model, "hf_device_map")
    for own, other in zip(opened.adapter.parameters(), run.adapter.parameters(), strict=True):
        assert torch.equal(own, other)


def test_train_accumulate_divides_the_micro_batch(tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.training import GraftTrainer

    sizes: list[int] = []
    real = GraftTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return real(self, model, inputs, *args, **options)

    monkeypatch.setattr(GraftTrainer, "compute_loss", compute_loss)
    tiny(answered, steps=2, batch=4, accumulate=2)
    assert sizes == [2, 2, 2, 2]


def test_evaluations_and_checkpoints_come_when_asked_for(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, steps=6, eval_every=3, save_every=2, keep_checkpoints=2)
    assert [row["step"] for row in metrics_of(run.folder) if "eval_loss" in row] == [3, 6]
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    run = tiny(answered, out="one", steps=6, save_every=2, keep_checkpoints=1)
    assert [row["step"] for row in metrics_of(run.folder) if "eval_loss" in row] == [4, 6]  # an epoch has four steps
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["checkpoint-6"]


def test_train_early_stopping_stops(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, steps=80, eval_every=2, early_stopping=2, learning_rate=0.1)
    losses = {row["step"]: row["eval_loss"] for row in metrics_of(run.folder) if "eval_loss" in row}
    assert run.record["steps"] == max(losses) < 80
    assert run.record["results"]["scores"][0]["loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    best = min(losses, key=losses.__getitem__)
    line = f"stopped early, after {max(losses)} of 80 steps: no gain in 2 evaluations; step {best} is kept"
    assert run.record["kept"]["line"].startswith(line)
    assert (run.record["kept"]["step"], run.record["kept"]["of_steps"]) == (best, 80)
    assert line in (run.folder / "log.txt").read_text()


def test_the_step_that_is_kept_is_told_where_none_stopped_early(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, steps=4, eval_every=2, early_stopping=10, learning_rate=0.1)
    assert run.record["kept"]["line"].startswith(f"step {run.record['kept']['step']} is kept, the best of those")
    assert "kept" not in tiny(answered, out="plain", steps=2).record


def test_train_cache_bottom_passes_blocks_over(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    """Rows that were read are not computed again below the lowest change, and nothing else changes."""
    from graftlm.training import GraftTrainer

    base = save_llama(tmp_path / "base", layers=3)
    asked = {"base": base, "method": "lora(rank=2,layers=-1)", "steps": 12, "batch": 4, "eval_share": 0.2}
    calls: list[int] = []
    real = GraftTrainer.training_step

    def counted(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        calls.append(0)
        handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda *_: calls.__setitem__(-1, calls[-1] + 1)
        )
        try:
            return real(self, model, *args, **options)
        finally:
            handle.remove()

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraftTrainer, "training_step", counted)
        for kept in (False, True):
            calls.clear()
            run = tiny(answered, out=f"kept-{kept}", cache_bottom=kept, **asked)
            found[kept] = run, list(calls), [row["loss"] for row in metrics_of(run.folder) if "loss" in row]
    assert found[False][1] == [1] * 12
    computed = found[True][1]
    per_pass = 12 - computed.count(0) - 1  # and one batch more, to compare
    assert computed == [1] * (per_pass + 1) + [0] * (11 - per_pass)
    assert per_pass == 4
    assert found[True][2] == pytest.approx(found[False][2], rel=1e-5)
    one, other = (weights(found[kept][0]) for kept in (True, False))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4)
    assert found[True][0].record["decided"]["cached_blocks"] == 2


@pytest.mark.parametrize(
    ("code", "said", "given"),
    [
        ("U171", "the run is one pass", {"steps": 2}),
        ("U171", "no row is read twice", {"task": "grpo", "reward": "regex:a", "max_new_tokens": 2, "answers": 2}),
        ("U171", "acts in the first block", {"method": "lora(rank=2)"}),
        ("U172", "GB are free", {}),
    ],
)
def test_train_cache_bottom_is_refused_where_it_can_do_nothing(
    code: str,
    said: str,
    given: dict[str, Any],
    tiny: Tiny,
    answered: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = save_llama(tmp_path / "base", layers=2)
    if code == "U172":
        monkeypatch.setattr("graftlm.training.keeping.length_of", lambda _: 10**12)
    with pytest.raises(GraftError) as caught:
        tiny(
            answered,
            base=base,
            cache_bottom=True,
            **{"method": "lora(rank=2,layers=-1)", "epochs": 2.0, "steps": None, **given},
        )
    assert [(code, said)] == [(f.code, said) for f in caught.value.findings if said in f.message]
    assert not (tmp_path / "run").exists()


def test_train_recompute_blocks_computes_twice(tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    calls: list[int] = []
    real = LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.training and hidden_states.device.type != "meta":  # the plan's step has no values
            calls.append(1)
        return real(self, hidden_states, *args, **options)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    counts = []
    for at, settings in enumerate(({}, {"recompute": "blocks"})):
        calls.clear()
        tiny(answered, out=str(at), steps=2, **settings)
        counts.append(len(calls))
    assert counts == [2, 4]


def test_train_recompute_feed_forward_parts(tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.kernels import fusing

    asked: list[bool] = []
    real = fusing.feed_forward

    def feed_forward(*args: Any, recompute: bool, **options: Any) -> Any:
        asked.append(recompute)
        return real(*args, recompute=recompute, **options)

    monkeypatch.setattr(fusing, "feed_forward", feed_forward)
    for level in ("none", "feedforward"):
        asked.clear()
        tiny(answered, out=level, steps=2, recompute=level)
        assert set(asked) == {level == "feedforward"}


def test_train_threads(tiny: Tiny, answered: Path) -> None:
    try:
        assert tiny(answered, threads=2).record["environment"]["threads"] == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_generate(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    def samples(name: str, **settings: Any) -> list[dict[str, str]]:
        run = tiny(answered, out=name, **{"samples": 2, "max_new_tokens": 8, **settings})
        return [json.loads(line) for line in (run.folder / "eval" / "samples.jsonl").read_text().splitlines()]

    default = samples("default")
    assert len(default) == 2
    assert len(samples("three", samples=3)) == 3
    assert samples("none", samples=0) == []
    shorter = samples("shorter", max_new_tokens=2)
    assert len(shorter[0]["tuned"]) < len(default[0]["tuned"])
    warm = samples("warm", temperature=1.5)
    assert warm != default
    assert warm == samples("warm-again", temperature=1.5)
    assert samples("narrow", temperature=1.5, top_p=0.05) != warm


def test_output(tiny_base: Path, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [_run(answered, tiny_base, "", monkeypatch, {}) for _ in range(2)]
    assert [str(run.folder) for run in runs] == ["runs/answered-1", "runs/answered-2"]
    rows = _run(answered_rows(), tiny_base, "", monkeypatch, {})
    assert str(rows.folder) == "runs/rows-1"
    assert _run(answered, tiny_base, "mine", monkeypatch, {}).folder == Path("mine")


# --- what is decided where nothing is said ---


def test_a_row_may_be_as_long_as_the_base_can_read(tmp_path: Path, answered: Path, tiny: Tiny) -> None:
    long = save_llama(tmp_path / "long", max_position_embeddings=4096)
    run = tiny(answered, base=long, max_length=2048)
    assert run.record["settings"]["train"]["max_length"] == 2048
    with pytest.raises(GraftError, match="4097 is beyond the base's context") as caught:
        tiny(answered, base=long, max_length=4097, out="longer")
    assert caught.value.findings[0].fix == "--max-length 4096"


@pytest.mark.parametrize(
    ("config", "context", "length"),
    [
        ({"max_position_embeddings": 128}, 128, 128),
        ({"max_position_embeddings": 32768}, 32768, 1024),
        ({"max_position_embeddings": 514, "model_type": "roberta"}, 512, 512),
        ({}, 1 << 30, 1024),
    ],
)
def test_lengths(config: dict[str, Any], context: int, length: int) -> None:
    from types import SimpleNamespace

    assert context_of(SimpleNamespace(**config)) == context
    assert decide_length(SimpleNamespace(**config)) == length


def test_what_was_decided_is_written_down(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    run = tiny(answered, epochs=None)
    assert run.record["decided"] == {"learning_rate": 0.0025, "epochs": 10.0}
    assert run.record["steps"] == 40
    assert RunSettings(**run.record["settings"]).train.epochs is None
