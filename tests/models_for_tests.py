"""Tiny random models of many architectures, built once a session and handed out as copies.

Example:
    >>> model = tiny("llama")                      # a fresh copy, in eval mode, float32
    >>> logits = model(**inputs_for(model)).logits
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 64

_PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_BERT = {**_PLAIN, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_MODERNBERT = {**_PLAIN, "cls_token_id": 3, "sep_token_id": 4}

#: Name -> constructor of a fresh model with random weights.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED, sliding_window=4)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=4)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
            max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            dropout=0.0,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_PLAIN)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**{**_BERT, "pad_token_id": 1})),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5_gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCABULARY, max_position_embeddings=64, dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "llama_classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**_GROUPED)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=VOCABULARY, dropout=0.0, attention_dropout=0.0,
            seq_classif_dropout=0.0, pad_token_id=0,
        )
    ),
    "modernbert": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**_MODERNBERT)),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(
            hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, hidden_dropout=0.0, attention_dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip

DECODERS = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "mixtral",
    "qwen3_moe", "bloom",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
ENCODER_DECODERS = ("t5", "t5_gated", "bart")


@functools.cache
def _original(name: str) -> PreTrainedModel:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh models have zero biases and near-zero maps, on which wrong arithmetic looks right.
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.std() < 0.1:
                parameter.mul_(5)
    torch.random.set_rng_state(state)
    return model


def tiny(name: str) -> PreTrainedModel:
    """A copy of the tiny model `name`: the same weights each time, eval mode, float32."""
    return copy.deepcopy(_original(name))


def inputs_for(model: PreTrainedModel, rows: int = 3, tokens: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """A batch for `model` without padding: ids [rows, tokens], mask, decoder ids where it takes them."""
    generator = torch.Generator().manual_seed(seed)

    def ids(width: int) -> Tensor:
        return torch.randint(5, VOCABULARY, (rows, width), generator=generator)

    batch = {"input_ids": ids(tokens), "attention_mask": torch.ones(rows, tokens, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids(tokens - 1)
    return batch


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> Tensor:
    """The logits for `batch`, without gradients."""
    with torch.no_grad():
        return model(**(inputs_for(model) if batch is None else batch)).logits


def perturb(owner: Any, size: float = 0.1, seed: int = 0) -> None:
    """Move every parameter of `owner` (an adapter or a module) by noise of standard deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in owner.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor] | None = None, seed: int = 3) -> Tensor:
    """A scalar that depends on every logit, with gradients."""
    logits = model(**(inputs_for(model) if batch is None else batch)).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (logits.float() * weights).mean()


def hooks_and_attributes(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything by which something attached could show: attributes, hooks, buffers, gradient flags, per module."""
    return {
        path: (
            type(module),
            sorted(module.__dict__),
            [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("hooks") or "hooks_" in k],
            sorted(module._buffers),
            [(name, p is not None and p.requires_grad) for name, p in module._parameters.items()],
            module.training,
        )
        for path, module in model.named_modules()
    }
