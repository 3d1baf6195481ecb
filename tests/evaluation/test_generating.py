"""Writing: batches equal single prompts, streams equal whole answers, and the routing in force decides who writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from graftlm.core import attach, use
from graftlm.data import Template
from graftlm.evaluation import generate_texts, stream_text
from graftlm.evaluation.generating import draw_of, sample_answers
from graftlm.methods import LoRA
from graftlm.models import load_base
from models_for_tests import VOCABULARY, tiny

ASKED = ["Hello", "Where is the lamp that I bought last week?", "I would like to return my kettle, please.", "No"]


@pytest.fixture(scope="module")
def speaker(tiny_base: Path) -> tuple[Any, Any, Template]:
    """A model with an adapter that says something else than its base."""
    torch.manual_seed(0)
    model, tokenizer = load_base(tiny_base)
    adapter = attach(model, LoRA(rank=2, targets="all-linear"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, tokenizer, Template.of(tokenizer, chat=True)


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("chat", [True, False])
def test_a_batch_says_what_single_prompts_say(chat: bool, speaker: Any) -> None:
    model, tokenizer, template = speaker
    prompts: list[Any] = [turns(text) for text in ASKED] if chat else list(ASKED)
    chosen = template if chat else None
    together = generate_texts(model, tokenizer, chosen, prompts, max_new_tokens=12)
    apart = [generate_texts(model, tokenizer, chosen, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == apart
    assert generate_texts(model, tokenizer, chosen, prompts, max_new_tokens=12, batch=3) == together
    assert len(set(together)) > 1


def test_what_is_written_is_what_the_logits_say(speaker: Any) -> None:
    model, tokenizer, template = speaker
    ids = template.encode(tokenizer, turns(ASKED[1]))
    with torch.no_grad():
        for _ in range(6):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    wanted = tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()
    assert generate_texts(model, tokenizer, template, [turns(ASKED[1])], max_new_tokens=6) == [wanted]


def test_the_routing_in_force_decides(speaker: Any) -> None:
    model, tokenizer, template = speaker
    prompts = [turns(text) for text in ASKED]
    tuned = generate_texts(model, tokenizer, template, prompts, max_new_tokens=8)
    with use(model, None):
        base = generate_texts(model, tokenizer, template, prompts, max_new_tokens=8)
        streamed = "".join(stream_text(model, tokenizer, template, prompts[0], max_new_tokens=8)).strip()
    assert tuned != base
    assert streamed == base[0]
    assert generate_texts(model, tokenizer, template, prompts, max_new_tokens=8) == tuned


def _says(model: Any, token: int, other: int, after: int) -> Any:
    """Make `other` the likeliest token `after` times, then `token`; gives the hook's handle."""
    left = [after]

    def change(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        logits = logits.clone()
        logits[..., token if left[0] < 0 else other] += 1e4
        return logits

    return model.lm_head.register_forward_hook(change)


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_writing_stops_at_the_end_of_the_turn(way: str, speaker: Any) -> None:
    model, tokenizer, template = speaker
    (end, *_) = template.stop_ids(tokenizer)
    word = tokenizer("lamp")["input_ids"][-1 if tokenizer("lamp")["input_ids"][-1] != tokenizer.eos_token_id else -2]
    hook = _says(model, end, word, 3)
    try:
        if way == "whole":
            (said,) = generate_texts(model, tokenizer, template, [turns("Hi")], max_new_tokens=20)
        else:
            said = "".join(stream_text(model, tokenizer, template, turns("Hi"), max_new_tokens=20)).strip()
    finally:
        hook.remove()
    assert said == tokenizer.decode([word] * 3).strip()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 4}, {"temperature": 0.9, "top_p": 0.5}])
def test_a_stream_adds_up_to_the_whole_answer(options: dict[str, Any], speaker: Any) -> None:
    model, tokenizer, template = speaker
    for asked in ASKED:
        pieces = list(stream_text(model, tokenizer, template, turns(asked), max_new_tokens=16, **options))
        whole = generate_texts(model, tokenizer, template, [turns(asked)], max_new_tokens=16, **options)
        assert "".join(pieces).strip() == whole[0]


def test_seeds(speaker: Any) -> None:
    model, tokenizer, template = speaker

    def said(seed: int) -> list[str]:
        return generate_texts(model, tokenizer, template, [turns("Hi")], temperature=1.5, seed=seed, max_new_tokens=12)

    assert said(0) == said(0) != said(1)


def test_writing_leaves_mode_and_random_state_alone(speaker: Any) -> None:
    model, tokenizer, template = speaker
    model.train()
    before = torch.get_rng_state()
    generate_texts(model, tokenizer, template, [turns("Hi")], temperature=1.0, max_new_tokens=4)
    list(stream_text(model, tokenizer, template, turns("Hi"), temperature=1.0, max_new_tokens=4))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()


def _slow(monkeypatch: pytest.MonkeyPatch, model: Any, steps: list[int]) -> None:
    real = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        steps.append(1)
        time.sleep(0.01)
        return real(*args, **options)

    monkeypatch.setattr(model, "forward", forward)


def test_closing_a_stream_stops_the_writing(speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, template = speaker
    steps: list[int] = []
    _slow(monkeypatch, model, steps)
    threads = set(threading.enumerate())
    stream: Iterator[str] = stream_text(model, tokenizer, template, turns("Tell me more"), max_new_tokens=90)
    next(stream)
    assert len(set(threading.enumerate()) - threads) == 1
    stream.close()
    assert set(threading.enumerate()) <= threads
    made = len(steps)
    assert made < 60
    time.sleep(0.05)
    assert len(steps) == made


def test_an_error_while_streaming_reaches_the_reader(speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, template = speaker

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        list(stream_text(model, tokenizer, template, turns("Hi")))


def test_a_conversation_longer_than_the_context_keeps_its_end(speaker: Any) -> None:
    model, tokenizer, template = speaker
    (said,) = generate_texts(model, tokenizer, template, [turns("lamp " * 400 + "kettle")], max_new_tokens=5)
    assert isinstance(said, str)


def test_messages_need_a_template(speaker: Any) -> None:
    model, tokenizer, _ = speaker
    with pytest.raises(ValueError, match="template"):
        generate_texts(model, tokenizer, None, [turns("Hi")])


# --- sampled answers ------------------------------------------------------------------------------------------------


def test_sampled_tokens_have_the_model_s_own_distribution() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # far from even
    prompt, many = [5, 9, 7], 4000
    draws = [draw_of(0, at) for at in range(many)]
    found = sample_answers(model, _Numbers(), None, [prompt] * many, draws=draws, max_new_tokens=1, batch=500)
    counts = torch.bincount(torch.tensor([ids[0] for ids in found]), minlength=VOCABULARY).double()
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0, -1].double().softmax(0) * many
    often = wanted >= 5
    assert often.sum() > 3
    groups = [torch.cat([each[often], each[~often].sum()[None]]) for each in (counts, wanted)]
    excess = ((groups[0] - groups[1]).square() / groups[1].clamp(min=1)).sum()
    assert excess < stats.chi2.ppf(0.9999, len(groups[0]) - 1)


def test_a_sampled_answer_depends_on_its_draw_alone() -> None:
    model = tiny("llama")
    prompts = [[5, 9, 7], [8], [4, 4, 4, 11, 13], [6, 6]]
    draws = [draw_of(3, at) for at in range(4)]
    state = torch.random.get_rng_state()
    together = sample_answers(model, _Numbers(), None, prompts, draws=draws, max_new_tokens=8)
    pairs = sample_answers(model, _Numbers(), None, prompts, draws=draws, max_new_tokens=8, batch=2)
    back = sample_answers(model, _Numbers(), None, prompts[::-1], draws=draws[::-1], max_new_tokens=8)
    assert together == pairs == back[::-1]
    assert len({tuple(answer) for answer in together}) == 4
    others = [draw_of(4, at) for at in range(4)]
    assert sample_answers(model, _Numbers(), None, prompts, draws=others, max_new_tokens=8) != together
    assert torch.equal(torch.random.get_rng_state(), state)


class _Numbers:
    """A tokenizer for those who have token ids already."""

    pad_token_id, eos_token_id, bos_token_id = 0, 2, 1
