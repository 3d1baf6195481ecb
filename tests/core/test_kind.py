"""What kind of model one is, over transformers' own classes."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from graftlm.core.kind import head_kind, is_encoder_decoder
from models_for_tests import tiny

AUTOS = {
    "AutoModelForCausalLM": "causal",
    "AutoModelForSequenceClassification": "sequence",
    "AutoModelForTokenClassification": "token",
    "AutoModelForQuestionAnswering": "question",
    "AutoModelForMaskedLM": "masked",
    "AutoModelForSeq2SeqLM": "conditional",
}


@pytest.mark.parametrize(("auto", "wanted"), AUTOS.items())
@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config", "BertConfig", "T5Config", "BartConfig", "Qwen2Config"])
def test_each_kind_of_head_is_told(auto: str, wanted: str, config: str) -> None:
    classes = getattr(transformers, auto)._model_mapping
    kind = getattr(transformers, config)
    if kind not in classes or ("ConditionalGeneration" in classes[kind].__name__ and wanted != "conditional"):
        pytest.skip(f"transformers has no {wanted} head for {config}")
    assert head_kind(classes[kind].__name__) == wanted


def test_a_backbone_has_none() -> None:
    assert head_kind("LlamaModel") is None
    assert head_kind("Linear") is None


def test_two_stacks_are_told() -> None:
    assert is_encoder_decoder(tiny("t5"))
    assert not is_encoder_decoder(tiny("llama"))
    assert not is_encoder_decoder(nn.Linear(2, 2))
