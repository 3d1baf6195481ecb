"""What kind of transformers model one is, told by its class's name and its configuration."""

from __future__ import annotations

from torch import nn

__all__ = ["LANGUAGE", "head_kind", "is_encoder_decoder"]

_KINDS = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "question",
    "ForMaskedLM": "masked",
    "ForConditionalGeneration": "conditional",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
#: Kinds of head that are as wide as the vocabulary.
LANGUAGE = ("causal", "conditional", "masked")


def head_kind(class_name: str) -> str | None:
    """The kind of head that models of this class have; None for a backbone and for what is not transformers'.

    `conditional` is the head of encoder-decoders, and of models that write about pictures or sounds.

    Example:
        >>> head_kind("GPT2LMHeadModel"), head_kind("T5ForConditionalGeneration"), head_kind("BertModel")
        ('causal', 'conditional', None)
    """
    return next((kind for ending, kind in _KINDS.items() if class_name.endswith(ending)), None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model is two stacks, of which one reads the other."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
