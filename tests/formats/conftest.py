"""Tiny models of five families, with seeded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

WIDTHS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {**WIDTHS, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama-biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, attention_bias=True)),
    "llama-cls": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA, num_labels=3)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDTHS, num_labels=3)),
    "bert-tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**WIDTHS, num_labels=3)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**WIDTHS, num_labels=3)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=64)
    ),
}
_made: dict[str, nn.Module] = {}


def tiny(name: str) -> Any:
    """A fresh copy of the tiny model `name`; its values are the same every time, and no bias is zero."""
    if name not in _made:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.1)
        _made[name] = model
    return copy.deepcopy(_made[name])


def inputs(model: Any) -> dict[str, Tensor]:
    seed = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (3, 6), generator=seed)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(5, 60, (3, 4), generator=seed)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def shake(parameters: Any, seed: int = 0) -> None:
    """Move every parameter by noise, so that nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
