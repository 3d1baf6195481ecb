"""The time of a planned step: what it is made of, what is kept, and that it is told of runs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from graftlm.core import attach
from graftlm.kernels import fuse, given_back_bytes, native
from graftlm.methods import read_method
from graftlm.planning import Speed, asked, said_time, speed_of, time_of
from graftlm.planning.operations import Operation, output_bytes, smaller
from graftlm.planning.step import objective_of

SIZE = given_back_bytes("none")


class Known(Speed):
    """A device on which every operation takes a millisecond."""

    def _measured(self, operation: Operation, given_back: int) -> float:
        del operation, given_back
        return 1e-3


def known_speed() -> Known:
    return Known("cpu", call_s=1e-4, update_s=1e-6, tensor_s=1e-5)


def tiny_step(**changes: Any) -> Any:
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    return asked(config, **{"method": "lora(rank=4)", "batch": 4, "length": 32, **changes})


def test_a_step_is_its_operations_their_calls_and_the_update() -> None:
    plan = tiny_step().plan()
    calls = sum(plan.traced.operations[phase].total() for phase in ("forward", "backward"))
    assert plan.traced.trained_tensors == 2 * 4 * 2
    expected = calls * 1.1e-3 + plan.trainable * 1e-6 + 16 * 1e-5
    assert known_speed().step_s(plan) == pytest.approx(expected)
    parts = tiny_step(accumulate=4).plan()
    assert known_speed().step_s(parts) > 3 * known_speed().step_s(plan)  # as many products, more calls


def test_an_operation_is_measured_once() -> None:
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 1.0
        return now_s

    x = torch.ones(8, 8)
    one = Operation.of(torch.ops.aten.mm.default, (x, x), {})
    speed = Speed("cpu", 0.0, 0.0, 0.0, clock=clock)
    assert speed.of(one, SIZE) == 1.0  # by this clock one second lies between any two looks at it
    looked = now_s
    assert speed.of(one, SIZE) == 1.0
    assert now_s == looked


def test_operations_are_measured_with_the_memory_given_back_that_training_gives_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_for: list[int] = []
    monkeypatch.setattr(native, "give_back_large_memory", asked_for.append)
    monkeypatch.setattr(native, "_asked", [2**21])
    speed, x = Speed("cpu", 0.0, 0.0, 0.0), torch.empty(4096, 4096, device="meta")
    small = Operation.of(torch.ops.aten.mm.default, (torch.ones(8, 8), torch.ones(8, 8)), {})
    large = Operation.of(torch.ops.aten.mm.default, (x, x), {})
    assert speed.of(small, 2**20) > 0
    assert asked_for == [2**20, 2**21]  # and then as it was
    assert speed.of(large, 2**20) > 0
    less, share = smaller(large, 3e8 * torch.get_num_threads(), 1.6e8)
    assert share > 1
    assert asked_for[2:] == [2**20 * output_bytes(less) // (4 * 4096**2), 2**21]
    speed = known_speed()
    for recompute in ("none", "blocks"):
        speed.step_s(tiny_step(recompute=recompute).plan())
    assert {given_back for given_back, _ in speed.seconds} == {2**24, 2**20}


def test_dropout_is_drawn_where_it_is_measured_and_numbers_stay_as_they_were() -> None:
    config = tf.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    plan = asked(config, "ia3", batch=3, length=32).plan()
    drawn = [one for one in plan.traced.operations["forward"] if "dropout" in one.name or "bernoulli" in one.name]
    assert drawn
    speed = known_speed()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Speed("cpu", 0.0, 0.0, 0.0).step_s(plan)
    assert torch.equal(torch.rand(3), expected)
    assert all(speed.of(one, SIZE) for one in drawn)


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[str] = []

    def once(device: str) -> Speed:
        measured.append(device)
        return known_speed()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Speed, "measured", once)
    x = torch.ones(8, 8)
    one = Operation.of(torch.ops.aten.mm.default, (x, x), {})
    for _ in range(3):
        with speed_of("cpu") as speed:
            assert (speed.call_s, speed.update_s, speed.tensor_s) == (1e-4, 1e-6, 1e-5)
            took_s = speed.of(one, SIZE)
    assert measured == ["cpu"]
    with speed_of("cpu") as speed:
        assert speed.seconds == {(SIZE, one): took_s}
    place = tmp_path / "graftlm" / "speed.json"
    assert [each.name for each in place.parent.iterdir()] == ["speed.json"]
    place.write_text("{ broken")
    with speed_of("cpu"):
        assert measured == ["cpu", "cpu"]
    assert len(json.loads(place.read_text())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))  # a file, where a folder is wanted
    with speed_of("cpu") as speed:
        assert speed.call_s == 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_another_model_takes_what_is_told(dtype: str) -> None:
    """Processor time on one thread; 40 %, because other work on the machine shares its caches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speed = Speed.measured("cpu", clock=time.process_time)
        config = tf.GPT2Config(n_embd=192, n_layer=3, n_head=6, vocab_size=1024, pad_token_id=0)
        told = speed.step_s(asked(config, "lora(rank=8)", batch=4, length=128, dtype=dtype).plan())
        model = tf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        attach(model, read_method("lora(rank=8)"))
        objective, ids = objective_of("lm", model), torch.full((4, 128), 5)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        times = []
        with fuse(model.train()):
            for _ in range(7):
                began_s = time.process_time()
                objective.loss_sum(objective.outputs(model, batch), batch).backward()
                times.append(time.process_time() - began_s)
        assert told == pytest.approx(statistics.median(times[1:]), rel=0.4)
    finally:
        torch.set_num_threads(threads)


def test_a_machine_that_is_not_here_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step = tiny_step(device="cuda")
    assert time_of(step, step.plan()) is None


def test_a_plan_of_rows_tells_the_time_of_the_run(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Speed, "measured", lambda device: known_speed())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    texts = [f"{at} " + "word " * long for at, long in enumerate((4, 8, 12, 60) * 8)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["plan", str(rows), "--method", "lora(rank=2)", "--batch", "8", "--epochs", "3", "--json"]
    told = json.loads(cli(*words).out)
    assert told["steps"] == 3 * 4  # 26 rows to train on
    assert told["seconds"] < 0.7 * told["steps"] * told["step_seconds"]  # most rows are short
    assert json.loads(cli(*words[:-3], "--steps", "5", "--json").out)["steps"] == 5
    assert "seconds" not in json.loads(cli(*words, "--memory", "24GB").out)


def test_times_are_said_as_people_say_them() -> None:
    assert [said_time(s) for s in (0.004, 89, 91, 3600, 36_000)] == ["0.004 s", "89 s", "2 min", "60 min", "10 h 0 min"]
