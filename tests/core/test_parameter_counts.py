"""Parameter counts of published tables, on models without storage.

Sources: Hu et al. 2021 (tables 2 to 4 and 13), Ben Zaken et al. 2021, and the closed forms checked in
`shared/reference/methods.md` A.15. Deep models are built with few layers of the right width; every layer counts alike.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from graftlm.core import Method, attach, survey
from graftlm.methods import BitFit, Full, Head, Layers, LoRA, Modules
from models_for_tests import MODELS, tiny

_GPT3 = {"width": 12288, "layers": 96}


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def gpt3_like(layers):
    # OPT-175B has GPT-3's shape and separate query and value maps.
    return on_meta(
        tf.OPTForCausalLM,
        tf.OPTConfig(
            hidden_size=_GPT3["width"], word_embed_proj_dim=_GPT3["width"], ffn_dim=4 * _GPT3["width"],
            num_hidden_layers=layers, num_attention_heads=96,
        ),
    )  # fmt: skip


def gpt2(width, layers, heads, vocabulary=50257, positions=1024):
    return on_meta(
        tf.GPT2LMHeadModel,
        tf.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocabulary, n_positions=positions),
    )


def roberta(width, layers, heads):
    return on_meta(
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
        ),
    )  # fmt: skip


def count(model, method: Method) -> int:
    return attach(model, method).parameter_count


@pytest.mark.parametrize(
    ("method", "published"),
    [
        (LoRA(rank=1, targets="query,value"), 4_718_592),
        (LoRA(rank=2, targets="value"), 4_718_592),
        (LoRA(rank=8, targets="query,value"), 37_748_736),
        (LoRA(rank=4, targets="attention"), 37_748_736),
        (LoRA(rank=2, targets="query,value"), 9_437_184),
        (LoRA(rank=4, targets="query,value"), 18_874_368),
        (LoRA(rank=64, targets="query,value"), 301_989_888),
        (LoRA(rank=128, targets="query,value"), 603_979_776),
    ],
    ids=str,
)
def test_lora_on_gpt3(method, published):
    layers = 2
    assert count(gpt3_like(layers), method) * _GPT3["layers"] == published * layers


def test_bitfit_on_gpt3():
    """11 d-vectors a layer and the last norm's; the paper's 14.2M is 12 d-vectors a layer, which nothing explains."""
    d, layers = _GPT3["width"], 2
    found = count(gpt3_like(layers), BitFit())
    assert found == 11 * d * layers + d
    assert (found - d) // layers * _GPT3["layers"] + d == 12_988_416


def test_full_fine_tuning_of_gpt3():
    d, layers, total = _GPT3["width"], 2, _GPT3["layers"]
    found = count(gpt2(d, layers, 96, positions=2048), Full())
    assert found + (total - layers) * (12 * d * d + 13 * d) == 174_604_259_328


@pytest.mark.parametrize(
    ("shape", "method", "published"),
    [
        ((1024, 24, 16), Full(), 354_823_168),
        ((1280, 36, 20), Full(), 774_030_080),
        ((1024, 24, 16), Layers("-2:"), 25_192_448),
        # On the fused map: rank 4 over (in + 3 in), as many numbers as rank 4 on query and value apart.
        ((1024, 24, 16), LoRA(rank=4, targets="qkv"), 393_216),
        ((1280, 36, 20), LoRA(rank=4, targets="qkv"), 737_280),
    ],
    ids=str,
)
def test_gpt2(shape, method, published):
    assert count(gpt2(*shape), method) == published


@pytest.mark.parametrize(
    ("shape", "method", "published"),
    [
        ((768, 12, 12), LoRA(rank=8, targets="query,value"), 294_912),
        ((1024, 24, 16), LoRA(rank=8, targets="query,value"), 786_432),
        # Every bias of the encoder and the embeddings' norm, none of the head.
        ((768, 12, 12), BitFit(), 102_144),
        ((768, 12, 12), Head(), 768 * 768 + 768 + 768 * 2 + 2),
    ],
    ids=str,
)
def test_roberta(shape, method, published):
    assert count(roberta(*shape), method) == published


def test_lora_on_deberta_xxl():
    model = on_meta(
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(
            hidden_size=1536, num_hidden_layers=2, num_attention_heads=24, intermediate_size=6144, vocab_size=128100
        ),
    )
    assert count(model, LoRA(rank=16, targets="query,value")) * 48 == 4_718_592 * 2


@pytest.mark.parametrize("model_name", MODELS)
def test_lora_counts_rank_times_both_widths(model_name):
    rank = 5
    model = tiny(model_name)
    sites = survey(model).select("all-linear,embed,head")
    wanted = sum(rank * (site.in_features + site.out_features) for site in sites)
    assert count(model, LoRA(rank=rank, targets="all-linear,embed,head")) == wanted


@pytest.mark.parametrize("model_name", MODELS)
def test_parameter_methods_count_each_tensor_once(model_name):
    model = tiny(model_name)
    assert count(model, Full()) == sum(parameter.numel() for parameter in model.parameters())


def test_tied_weights_are_trained_apart_where_one_place_is_named():
    model = tiny("gpt2")
    embedding = model.transformer.wte.weight.numel()
    assert count(model, Head()) == embedding
    assert attach(model, Modules(["embed", "head"]), name="both").parameter_count == 2 * embedding
