"""Writing text with a model: whole answers in batches, or one answer token by token."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from graftlm.data import Collator, Template
from graftlm.evaluation.losses import batches, evaluating

__all__ = ["Conversation", "draw_of", "generate_texts", "sample_answers", "stream_text"]

#: Messages to be answered, or a text to be continued.
Conversation = str | Sequence[Mapping[str, Any]]


def generate_texts(
    model: Any,
    tokenizer: Any,
    template: Template | None,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = 8,
) -> list[str]:
    """What the model writes after each conversation, under the routing in force; temperature 0 takes the likeliest."""
    options = _options(model, tokenizer, template, max_new_tokens, temperature, top_p)
    collate = Collator(tokenizer.pad_token_id, side="left", pad_to_multiple_of=1)
    encoded = [{"input_ids": _encode(model, tokenizer, template, c, max_new_tokens)} for c in conversations]
    written: list[str] = []
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in batches(encoded, batch):
            together = {name: tensor.to(model.device) for name, tensor in collate(part).items()}
            found = model.generate(**together, **options)
            # An encoder-decoder begins anew; a decoder goes on behind the prompt.
            width = 1 if model.config.is_encoder_decoder else together["input_ids"].shape[1]
            written += [text.strip() for text in tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)]
    return written


def sample_answers(
    model: Any,
    tokenizer: Any,
    template: Template | None,
    prompts: Sequence[Sequence[int]],
    *,
    draws: Sequence[int],
    max_new_tokens: int,
    batch: int = 64,
) -> list[list[int]]:
    """Token ids of an answer to each prompt (token ids), with its end where one was written.

    Sampled from the model's own distribution (temperature 1, no cuts) under the routing in force. `draws` has the seed
    of each answer (`draw_of`): what is drawn for one depends on no other, nor on how many are written together.
    """
    from transformers import LogitsProcessorList

    options = _options(model, tokenizer, template, max_new_tokens, 0.0, 1.0)
    stops = set(options["generation_config"].eos_token_id)
    collate = Collator(tokenizer.pad_token_id, side="left", pad_to_multiple_of=1)
    written: list[list[int]] = []
    with evaluating(model):
        for part in batches([{"input_ids": list(ids)} for ids in prompts], batch):
            together = {name: tensor.to(model.device) for name, tensor in collate(part).items()}
            noise = _Noise(draws[len(written) : len(written) + len(part)], model.device)
            answers = model.generate(**together, **options, logits_processor=LogitsProcessorList([noise]))
            found = answers[:, together["input_ids"].shape[1] :]
            for ids in found.tolist():
                end = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
                written.append(ids[: end + 1])
    return written


class _Noise:
    """Adds Gumbel noise of its own to each row's scores: the largest is then a draw from their softmax."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        waits = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)  # in 32 bits some would be zero
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.double() - waits.log_()


def draw_of(*numbers: int) -> int:
    """A seed made of `numbers`: of a run, a step, a place.

    Example:
        >>> draw_of(0, 1) == draw_of(0, 1) != draw_of(1, 0)
        True
    """
    told = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=7).digest()
    return int.from_bytes(told, "big")


def stream_text(
    model: Any,
    tokenizer: Any,
    template: Template | None,
    conversation: Conversation,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The answer in pieces as they are written; closing the iterator stops the writing."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    ids = torch.tensor([_encode(model, tokenizer, template, conversation, max_new_tokens)], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failed = threading.Event(), []

    def stopped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG001
        return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def write() -> None:
        try:
            with evaluating(model), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stopped]),
                    **_options(model, tokenizer, template, max_new_tokens, temperature, top_p),
                )
        except BaseException as error:  # handed to the reader below
            failed.append(error)
            streamer.end()  # type: ignore[no-untyped-call]

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        writer.join()
    if failed:
        raise failed[0]


def _options(
    model: Any, tokenizer: Any, template: Template | None, max_new_tokens: int, temperature: float, top_p: float
) -> dict[str, Any]:
    from transformers import GenerationConfig

    stops = template.stop_ids(tokenizer) if template else [tokenizer.eos_token_id]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.generation_config, "decoder_start_token_id", None),
        forced_bos_token_id=getattr(model.generation_config, "forced_bos_token_id", None),
        **({"do_sample": False} | sampling),
    )
    return {"generation_config": config}


def _encode(
    model: Any, tokenizer: Any, template: Template | None, conversation: Conversation, max_new_tokens: int
) -> list[int]:
    if isinstance(conversation, str):
        ids = list(tokenizer(conversation, verbose=False)["input_ids"])
        if model.config.is_encoder_decoder:
            return ids[: getattr(model.config, "max_position_embeddings", None) or len(ids)]
        if tokenizer.eos_token_id is not None and ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()  # a text to be continued does not end
    elif template is None:
        raise ValueError("messages need a template")
    else:
        ids = template.encode(tokenizer, conversation)
    context = getattr(model.config, "max_position_embeddings", None)
    if context and len(ids) + max_new_tokens > context:
        ids = ids[-max(context - max_new_tokens, 1) :]  # the end of a conversation that has grown too long
    return ids
