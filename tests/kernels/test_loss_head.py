"""The loss head holds: the losses and gradients of the model's own logits, for every kind of head, in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.nn import functional as F

import graftlm
from graftlm import LoRA, attach, use
from graftlm.kernels import LossHead
from graftlm.kernels import head as room
from models_for_tests import DECODERS, ENCODERS, inputs_for, tiny

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def capped() -> Any:
    model = tiny("gemma2")
    model.config.final_logit_softcapping = 0.7  # so low that it bends what a tiny model says
    return model


def made(kind: str, config: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(tf, kind)(getattr(tf, config)(**SMALL, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


MODELS = {name: (lambda name=name: tiny(name)) for name in DECODERS} | {
    "gemma2 capped": capped,
    "cohere": lambda: made("CohereForCausalLM", "CohereConfig", logit_scale=0.25),
    "granite": lambda: made("GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0),
    "phi": lambda: made("PhiForCausalLM", "PhiConfig"),  # its head has a bias
}


def labels_for(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 4:] = -100
    labels[2] = -100
    return labels


def plain(model: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    logits = model(**batch).logits[:, :-1].float()
    found = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return F.pad(found, (1, 0))


def gradients(losses: Tensor, adapter: Any) -> list[Tensor]:
    weights = torch.linspace(0.5, 1.5, losses.numel()).view_as(losses)  # every token counts differently
    return list(torch.autograd.grad((losses * weights).sum(), list(adapter.parameters())))


def alike(found: list[Tensor], wanted: list[Tensor], close: float = 1e-6) -> None:
    largest = max(float(each.abs().max()) for each in wanted)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=close * max(1.0, largest))


def shaken(model: Any, method: Any, name: str = "default") -> Any:
    adapter = attach(model, method, name=name)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return adapter


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_rows_of", lambda vocabulary: 3)
    model = MODELS[name]()
    head = LossHead.of(model)
    assert head is not None
    adapter = shaken(model, LoRA(rank=2))
    batch = inputs_for(model, tokens=9)
    labels = labels_for(batch["input_ids"])
    found, wanted = head.losses(model, batch, labels), plain(model, batch, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not found[2].any()
    alike(gradients(found, adapter), gradients(wanted, adapter))


@pytest.mark.parametrize("how", ["lora(rank=2,targets=head)", "head+lora(rank=2)", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2 capped"])
def test_a_head_that_is_trained_or_adapted(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_rows_of", lambda vocabulary: 3)
    model = MODELS[name]()
    head = LossHead.of(model)
    assert head is not None
    adapter = shaken(model, graftlm.method(how))
    batch = inputs_for(model, tokens=9)
    labels = labels_for(batch["input_ids"])
    found, wanted = head.losses(model, batch, labels), plain(model, batch, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    alike(gradients(found, adapter), gradients(wanted, adapter))


def test_rows_with_heads_of_their_own() -> None:
    model = tiny("llama")
    head = LossHead.of(model)
    assert head is not None
    for name in ("one", "two"):
        shaken(model, LoRA(rank=2, targets="head"), name)
    batch = inputs_for(model, tokens=9)
    labels = labels_for(batch["input_ids"])
    with use(model, ["one", "two", None]), torch.no_grad():
        torch.testing.assert_close(head.losses(model, batch, labels), plain(model, batch, labels))


def test_virtual_tokens_and_no_labels() -> None:
    model = tiny("llama")
    head = LossHead.of(model)
    assert head is not None
    adapter = attach(model, graftlm.method("prompt(length=3)"))
    batch = inputs_for(model, tokens=9)
    labels = labels_for(batch["input_ids"])
    torch.testing.assert_close(head.losses(model, batch, labels), plain(model, batch, labels))
    none = head.losses(model, batch, torch.full_like(labels, -100))
    assert not none.any()
    assert not gradients(none, adapter)[0].any()


def test_half_precision_is_within_its_rounding() -> None:
    model = tiny("llama").bfloat16()
    head = LossHead.of(model)
    assert head is not None
    adapter = shaken(model, LoRA(rank=2))
    batch = inputs_for(model, tokens=9)
    labels = labels_for(batch["input_ids"])
    found, wanted = head.losses(model, batch, labels), plain(model, batch, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    for own, other in zip(gradients(found, adapter), gradients(wanted, adapter), strict=True):
        assert float((own - other).norm()) <= 0.03 * float(other.norm()) + 1e-6


def test_a_head_that_does_something_else_is_not_taken() -> None:
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
    assert LossHead.of(model) is not None  # a hook is the module's own affair: the module is called
    plain_forward = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        outputs = plain_forward(*args, **options)
        outputs.logits = outputs.logits.sin()
        return outputs

    model.forward = forward
    assert LossHead.of(model) is None
    for name in (*ENCODERS, "t5", "llama_classifier"):
        assert LossHead.of(tiny(name)) is None


def test_the_matrix_of_logits_is_never_held() -> None:
    vocabulary, tokens = 20_000, 512
    torch.manual_seed(0)
    settings = SMALL | {"vocab_size": vocabulary, "max_position_embeddings": tokens}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings))
    head = LossHead.of(model)
    assert head is not None
    attach(model, LoRA(rank=2))
    ids = torch.randint(3, vocabulary, (2, tokens))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(0 if tensor.untyped_storage().data_ptr() in weights else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head.losses(model, {"input_ids": ids}, ids).sum().backward()
    assert max(kept) < tokens * vocabulary / 10
