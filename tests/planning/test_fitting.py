"""What fits into a machine: limits that are limits, changes that change what they say, serving counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import rich.console
import torch
import transformers as tf

import graftlm
from graftlm.errors import GraftError
from graftlm.planning import Asked, Fitting, asked, fitting, memory_bytes, serving
from graftlm.planning.fitting import largest
from graftlm.planning.serving import cache_bytes
from graftlm.planning.step import Shape
from models_for_tests import tiny


def small(**changes: Any) -> Asked:
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=2048,
    )  # fmt: skip
    return asked(config, **{"method": "lora(rank=4)", "batch": 4, "length": 32, **changes})


@pytest.fixture(scope="module")
def roomy() -> Fitting:
    """What fits into far more than is needed; a fitting is a dozen and a half of plans, so it is made once."""
    return fitting(small(), "24GB")


@pytest.mark.parametrize("bend", [0.0, 0.01])
@pytest.mark.parametrize("room", [90, 150, 5_000, 1_000_000])
def test_the_largest_is_a_limit(room: int, bend: float) -> None:
    def size(n: int) -> int:
        return int(100 + 7 * n + bend * n * n)

    found = largest(size, room, 8, 16, 50_000)
    assert found == 0 or size(found) <= room
    assert size(found + 1 + found // 50) > room or found == 50_000


def test_beyond_what_is_run_the_line_tells() -> None:
    ran: list[int] = []

    def size(n: int) -> int:
        ran.append(n)
        return 100 + 7 * n

    assert largest(size, 10_000, 8, 16, 50_000, run=100) == (10_000 - 100) // 7
    assert max(ran) <= 100


@pytest.mark.slow
def test_what_is_told_to_fit_fits_and_a_little_more_does_not() -> None:
    step = small()
    room = 2 * step.plan().total_bytes - 480_000_000  # room for about twice the step's own memory
    found = fitting(step, room)
    assert found.fits
    assert found.within is found.options[0]
    for name, least in (("batch", 4), ("length", 128), ("rank", 4)):
        most = found.largest[name]
        assert most >= least
        at = {"method": f"lora(rank={most})"} if name == "rank" else {name: most}
        more = int(1.05 * most) // 8 * 8 + 8
        over = {"method": f"lora(rank={more})"} if name == "rank" else {name: more}
        assert small(**at).plan().fits(room), name
        assert not small(**over).plan().fits(room) or most in (64, 2048), name  # as wide or long as the base is


def test_changes_come_cheapest_first(roomy: Fitting) -> None:
    assert roomy.fits
    assert roomy.within is roomy.options[0]
    changes = [option.changes for option in roomy.options]
    assert changes[0] == ""
    assert changes[1:4] == [
        "--set train.recompute=feedforward", "--set train.accumulate=2", "--set train.recompute=blocks",
    ]  # fmt: skip
    assert changes[-3:-1] == ["--method 'ia3'", "--method 'full'"]
    assert "examples in the prompt" in changes[-1]
    # Of the cumulative ladder every step needs less than the one before, but for what libraries hold (code of products in
    # bfloat16, more than so small a model).
    ladder = [o.total_bytes - o.plan.terms["runtime"] for o in roomy.options if "train.accumulate=4" in o.changes]
    assert ladder == sorted(ladder, reverse=True)
    assert len(ladder) == 3


def test_the_first_change_that_fits_is_named(roomy: Fitting) -> None:
    found = fitting(small(), roomy.asked.total_bytes - 1)
    assert not found.fits
    assert found.within is not None
    assert found.within.changes == next(o.changes for o in found.options if o.total_bytes <= found.memory_bytes)


def test_the_flags_of_an_option_make_its_plan(cli: Callable[..., Any], tmp_path: Any, roomy: Fitting) -> None:
    small().config.save_pretrained(tmp_path)
    base = str(tmp_path / "config.json")
    words = ["plan", "-m", base, "--method", "lora(rank=4)", "--batch", "4", "--max-length", "32", "--json"]
    changes = "--set train.recompute=blocks --set train.accumulate=4"
    option = next(o for o in roomy.options if o.changes == changes)
    told = json.loads(cli(*words, *option.changes.split()).out)
    assert told["total_bytes"] == option.total_bytes
    assert told["flops"] == option.plan.flops


def test_nothing_fits_into_less_than_python_takes() -> None:
    found = fitting(small(), "400MB")
    assert (found.within, dict(found.largest)) == (None, {})
    assert "nothing of this fits" in str(found)


def test_an_encoder_is_not_prompted() -> None:
    step = asked(tiny("bert").config, "ia3", length=16)
    assert not any(option.shots for option in fitting(step, "24GB").options)


def test_quantised_full_fine_tuning_is_not_offered() -> None:
    found = fitting(small(method="full"), "24GB")
    for option in found.options:
        assert not (option.plan.method == "full" and option.plan.shape.quantize), option.changes


def test_a_cache_is_keys_and_values_of_every_layer() -> None:
    step = small(length=32)
    by_hand = 1 * 2 * 2 * 16 * 4  # layers, keys and values, heads of them, width, bytes
    found = serving(step, adapters=10)
    assert found.cache_bytes_per_token == by_hand
    assert found.terms["cache"] == 4 * 32 * by_hand
    assert found.terms["adapters"] == 10 * found.adapter_bytes == 10 * 4 * step.plan().trainable
    assert found.total_bytes == sum(found.terms.values())
    assert found.adapters_per_gb == pytest.approx(1e9 / found.adapter_bytes)
    model = tf.AutoModelForCausalLM.from_config(step.config)
    kept = model(torch.ones(1, 32, dtype=torch.long), use_cache=True).past_key_values
    assert sum(e.nbytes for layer in kept.layers for e in (layer.keys, layer.values)) == 32 * by_hand


def test_a_window_bounds_the_cache() -> None:
    config = tf.MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, sliding_window=16,
    )  # fmt: skip
    assert cache_bytes(config, Shape(length=64)) < cache_bytes(config, Shape(length=16)) * 2


def test_verb_and_python_tell_what_fits(
    cli: Callable[..., Any], tmp_path: Any, capsys: pytest.CaptureFixture[str], roomy: Fitting
) -> None:
    small().config.save_pretrained(tmp_path)
    base = str(tmp_path / "config.json")
    words = ["--method", "lora(rank=4)", "--batch", "4", "--max-length", "32", "--memory", "24GB", "--serve"]
    told = json.loads(cli("plan", "-m", base, *words, "--json").out)
    assert told["memory_bytes"] == memory_bytes("24GB")
    assert told["fits"] is True
    assert told["largest"] == dict(roomy.largest)
    assert told["largest"]["batch"] >= 4
    assert told["serving"]["total_bytes"] > 0
    assert told["options"][0]["total_bytes"] == told["total_bytes"]
    plan = graftlm.plan(base, "lora(rank=4)", batch=4, length=32, memory="24GB")
    assert plan.fitting is not None
    assert plan.to_dict() == {name: value for name, value in told.items() if name != "serving"}
    assert str(plan).endswith(str(plan.fitting))
    rich.console.Console(width=80).print(plan)
    assert "largest that fits: batch" in capsys.readouterr().out


def test_without_a_memory_nothing_is_fitted() -> None:
    assert graftlm.plan(small().config, "lora(rank=4)", length=32).fitting is None
    with pytest.raises(GraftError, match="no amount of memory"):
        graftlm.plan(small().config, "lora(rank=4)", memory="much")


def test_what_fits_is_told_in_words(roomy: Fitting) -> None:
    assert "of keys and values a token" in str(serving(small(), roomy.asked))
    assert str(roomy).startswith("fits into 24.0 GB")
    assert "largest that fits: batch" in str(roomy)
