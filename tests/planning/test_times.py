"""The time of a planned step: what it is made of, what is kept, and that it is told of runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from graftlm.core import attach
from graftlm.kernels import fuse
from graftlm.methods import read_method
from graftlm.planning import Speed, asked, calibrate, calibration, said_time, speed_of, time_of
from graftlm.planning.step import objective_of
from graftlm.training import progress as progress_module
from graftlm.training.progress import Progress

SPEED = Speed(flops_per_s=1e11, bytes_per_s=1e10, numbers_per_s=1e8, call_s=1e-5)


def tiny_step(**changes: Any) -> Any:
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    return asked(config, **{"method": "lora(rank=4)", "batch": 4, "length": 32, **changes})


def test_a_step_is_products_bytes_and_calls() -> None:
    plan = tiny_step().plan()
    phases = [plan.traced.flops, plan.traced.moved_bytes, plan.traced.calls]
    flops, moved, calls = (each["forward"] + each["backward"] for each in phases)
    expected = flops / 1e11 + moved / 1e10 + calls * 1e-5 + 36 * plan.trainable / 1e10
    assert SPEED.step_s(plan) == pytest.approx(expected)
    parts = tiny_step(accumulate=4).plan()
    assert SPEED.step_s(parts) > SPEED.step_s(plan)  # as many products, more calls
    assert parts.flops == pytest.approx(plan.flops, rel=0.01)


def test_dropout_draws_a_number_for_every_entry_that_it_sees() -> None:
    config = tf.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    drawn = asked(config, "ia3", batch=3, length=32).plan().traced.drawn
    hidden, scores, pooled = 3 * 32 * 64, 3 * 4 * 32 * 32, 3 * 64
    assert drawn == {"forward": hidden * (1 + 2 * 2) + 2 * scores + pooled}
    assert not tiny_step().plan().traced.drawn


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[str] = []

    def once(device: str, dtype: torch.dtype) -> Speed:
        measured.append(f"{device} {dtype}")
        return SPEED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "calibrate", once)
    assert [speed_of("cpu", torch.float32) for _ in range(3)] == [SPEED] * 3
    assert speed_of("cpu", torch.bfloat16) == SPEED
    assert measured == ["cpu torch.float32", "cpu torch.bfloat16"]
    place = tmp_path / "graftlm" / "speed.json"
    assert len(json.loads(place.read_text())) == 2
    assert [each.name for each in place.parent.iterdir()] == ["speed.json"]
    place.write_text("{ broken")
    assert speed_of("cpu", torch.float32) == SPEED
    assert len(measured) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))  # a file, where a folder is wanted
    assert speed_of("cpu", torch.float32) == SPEED


@pytest.mark.slow
def test_a_step_of_another_model_takes_what_is_told() -> None:
    """Processor time on one thread; a factor of two, because other work on the machine shares its caches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speed = calibrate("cpu", torch.float32, clock=time.process_time)
        config = tf.GPT2Config(n_embd=192, n_layer=3, n_head=6, vocab_size=1024, pad_token_id=0)
        told = speed.step_s(asked(config, "lora(rank=8)", batch=4, length=128).plan())
        model = tf.AutoModelForCausalLM.from_config(config)
        attach(model, read_method("lora(rank=8)"))
        objective, ids = objective_of("lm", model), torch.full((4, 128), 5)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        times = []
        with fuse(model.train()):
            for _ in range(4):
                began_s = time.process_time()
                objective.loss_sum(objective.outputs(model, batch), batch).backward()
                times.append(time.process_time() - began_s)
        assert min(times) / 2 < told < 2 * min(times)
    finally:
        torch.set_num_threads(threads)


def test_a_machine_that_is_not_here_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step = tiny_step(device="cuda")
    assert time_of(step, step.plan()) is None


def test_a_plan_of_rows_tells_the_time_of_the_run(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration, "speed_of", lambda device, dtype: SPEED)
    rows = tmp_path / "rows.jsonl"
    texts = [f"{at} " + "word " * long for at, long in enumerate((4, 8, 12, 60) * 8)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["plan", str(rows), "--method", "lora(rank=2)", "--batch", "8", "--epochs", "3", "--json"]
    told = json.loads(cli(*words).out)
    assert told["steps"] == 3 * 4  # 26 rows to train on
    assert told["seconds"] < 0.7 * told["steps"] * told["step_seconds"]  # most rows are short
    assert json.loads(cli(*words[:-3], "--steps", "5", "--json").out)["steps"] == 5
    assert "seconds" not in json.loads(cli(*words, "--memory", "24GB").out)


def test_what_is_left_is_told_without_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now_s)
    voice = SimpleNamespace(console=SimpleNamespace(is_terminal=False, quiet=True), say=lambda *_: None)
    shown = Progress(voice, tmp_path / "metrics.jsonl", "tokens")  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=0, max_steps=100)
    shown.on_train_begin(None, state, None)
    for step in range(1, 11):
        now_s += 12.0 if step == 1 else 2.0
        state.global_step = step
        shown.on_step_end(None, state, None)
    assert shown._line(state).endswith("ETA 3:00")


def test_times_are_said_as_people_say_them() -> None:
    assert [said_time(s) for s in (0.004, 89, 91, 3600, 36_000)] == ["0.004 s", "89 s", "2 min", "60 min", "10 h 0 min"]
