"""Parameter counts of published tables, on models without storage.

One table: model, method, the exact count by the closed form, and what the paper prints. Sources: Hu et al. 2021 (tables
2 to 4 and 13), Ben Zaken et al. 2021, Houlsby et al. 2019, He et al. 2021, Li & Liang 2021, Lester et al. 2021, Liu et
al. 2021 and 2022, and AdapterHub's counts on BERT-base where its definitions are ours. The closed forms are those of
`shared/reference/methods.md` A.15. Rows that do not follow from the paper's own formula say so in their last column.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from graftlm.core import Method, attach, summary, survey
from graftlm.methods import METHODS, Full, Head, LoRA, Modules, read_method
from models_for_tests import MODELS, tiny


def _gpt2(width, layers, heads, positions=1024):
    return lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=50257, n_positions=positions)
    )


def _roberta(width, layers, heads):
    return lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
        )
    )  # fmt: skip


def _bert(width, layers, heads):
    return lambda: tf.BertModel(
        tf.BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
        )
    )


def _t5(width, inner, heads, layers):
    def build():
        config = tf.T5Config(
            d_model=width, d_ff=inner, num_heads=heads, d_kv=64, num_layers=layers, vocab_size=32128,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        model = tf.T5ForConditionalGeneration(config)
        # T5.1.1: one table for both stacks, and a head of its own; the configuration ties all or none.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(32128, width))
        return model

    return build


BASES: dict[str, Callable[[], Any]] = {
    "gpt3-175b": _gpt2(12288, 96, 96, positions=2048),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
    "deberta-xxl": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144, vocab_size=128100
        )
    ),
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "bart-large": lambda: tf.BartForConditionalGeneration(tf.BartConfig()),
    "t5-small": _t5(512, 1024, 6, 8),
    "t5-base": _t5(768, 2048, 12, 12),
    "t5-large": _t5(1024, 2816, 16, 24),
    "t5-3b": _t5(2048, 5120, 32, 24),
    "t5-11b": _t5(4096, 10240, 64, 24),
}


@functools.cache
def on_meta(base: str) -> Any:
    with torch.device("meta"):
        return BASES[base]()


#: Base, method, exact count, and what the source prints.
ROWS: list[tuple[str, str, int, str]] = [
    # --- GPT-3 175B: d = 12288, 96 layers (Hu et al. 2021, tables 4 and 13) ---
    ("gpt3-175b", "full", 174_604_259_328, "paper 175,255.8M: no choice of vocabulary, context or tying gives it"),
    ("gpt3-175b", "bitfit", 12_988_416, "paper 14.2M = 12 d L: 11 d L + d follows; a 12th vector a layer is unexplained"),
    ("gpt3-175b", "prompt(length=40,start=uniform)", 491_520, "PreEmbed l_p=32 l_i=8: 0.4M in the paper"),
    ("gpt3-175b", "prompt(length=72,start=uniform)", 884_736, "PreEmbed l_p=64 l_i=8: 0.9M"),
    ("gpt3-175b", "prompt(length=136,start=uniform)", 1_671_168, "PreEmbed l_p=128 l_i=8: 1.7M"),
    ("gpt3-175b", "prompt(length=264,start=uniform)", 3_244_032, "PreEmbed l_p=256 l_i=8: 3.2M"),
    ("gpt3-175b", "prompt(length=520,start=uniform)", 6_389_760, "PreEmbed l_p=512 l_i=8: 6.4M"),
    # PreLayer replaces hidden states, L d (l_p + l_i); keys and values of half as many tokens are as many numbers.
    ("gpt3-175b", "prefix(length=8)", 18_874_368, "PreLayer l_p=8 l_i=8: the paper prints 20.2M, its formula gives 18.9M"),
    ("gpt3-175b", "series(width=1)", 7_078_080, "Adapter-H r=1: 7.1M"),
    ("gpt3-175b", "series(width=4)", 21_234_432, "Adapter-H r=4: 21.2M"),
    ("gpt3-175b", "series(width=8)", 40_109_568, "Adapter-H r=8: 40.1M"),
    ("gpt3-175b", "series(width=16)", 77_859_840, "Adapter-H r=16: 77.9M"),
    ("gpt3-175b", "series(width=64)", 304_361_472, "Adapter-H r=64: 304.4M"),
    ("gpt3-175b", "lora(rank=1,targets=[query,value])", 4_718_592, "4.7M"),
    ("gpt3-175b", "lora(rank=2,targets=value)", 4_718_592, "4.7M"),
    ("gpt3-175b", "lora(rank=2,targets=[query,value])", 9_437_184, "9.4M"),
    ("gpt3-175b", "lora(rank=4,targets=[query,value])", 18_874_368, "18.8M"),
    ("gpt3-175b", "lora(rank=8,targets=[query,value])", 37_748_736, "37.7M"),
    ("gpt3-175b", "lora(rank=4,targets=[query,key,value,output])", 37_748_736, "37.7M (D.4 says rank 2, table 13 rank 4)"),
    ("gpt3-175b", "lora(rank=64,targets=[query,value])", 301_989_888, "301.9M"),
    ("gpt3-175b", "lora(rank=128,targets=[query,value])", 603_979_776, "603.8M"),
    (
        "gpt3-175b", "lora(rank=8,targets=[query,value])+prompt(length=12,start=uniform)", 37_896_192,
        "LoRA+PE l_p=8 l_i=4: 37.9M, the paper prints 37.8M",
    ),
    # --- GPT-2 (table 3) ---
    ("gpt2-medium", "full", 354_823_168, "354.92M in the paper"),
    ("gpt2-large", "full", 774_030_080, "774.03M"),
    ("gpt2-medium", "layers('-2:')", 25_192_448, "25.19M"),
    ("gpt2-medium", "lora(rank=4,targets=[query,value])", 393_216, "0.35M in the paper; its released file has 393,216"),
    ("gpt2-large", "lora(rank=4,targets=[query,value])", 737_280, "0.77M in the paper"),
    # On the fused map: rank 4 over (in + 3 in), as many numbers as rank 4 on query and value apart.
    ("gpt2-medium", "lora(rank=4,targets=qkv)", 393_216, ""),
    ("gpt2-large", "lora(rank=4,targets=qkv)", 737_280, ""),
    ("gpt2-medium", "series(width=6,variant=lin)", 368_784, "Adapter-L 0.37M"),
    ("gpt2-medium", "series(width=224,variant=lin)", 11_089_152, "Adapter-L 11.09M"),
    ("gpt2-large", "series(width=8,variant=lin)", 875_808, "Adapter-L 0.88M"),
    ("gpt2-large", "series(width=248,variant=lin)", 23_002_848, "Adapter-L 23.00M"),
    ("gpt2-medium", "series(width=112)", 11_064_576, "Adapter-H 11.09M in the paper; no width gives it"),
    ("gpt2-medium", "prefix(length=5)", 245_760, "Li & Liang 2021, E2E: 0.1 %"),
    # --- RoBERTa and DeBERTa (table 2) ---
    ("roberta-base", "lora(rank=8,targets=[query,value])", 294_912, "0.3M"),
    ("roberta-base", "bitfit", 102_144, "0.1M: every bias of the encoder and the embeddings' norm, none of the head"),
    ("roberta-base", "head", 768 * 768 + 768 + 768 * 2 + 2, ""),
    ("roberta-base", "series(width=16,variant=pfeiffer)", 304_320, "Adpt-D 0.3M"),
    ("roberta-base", "series(width=48,variant=pfeiffer)", 894_528, "Adpt-D 0.9M"),
    ("roberta-large", "lora(rank=8,targets=[query,value])", 786_432, "0.8M"),
    ("roberta-large", "series(width=64,variant=pfeiffer)", 3_171_840, "Adpt-P 3.0M are the weights, 3 * 2^20"),
    ("roberta-large", "series(width=16,variant=pfeiffer)", 811_392, "Adpt-P 0.8M are the weights, 786,432"),
    ("roberta-large", "series(width=64)", 6_343_680, "Adpt-H 6.0M are the weights, 6 * 2^20"),
    ("roberta-large", "series(width=8)", 835_968, "Adpt-H 0.8M are the weights, 786,432"),
    ("deberta-xxl", "lora(rank=16,targets=[query,value])", 4_718_592, "4.7M"),
    # --- BERT-large (Houlsby et al. 2019): adapters and, as in the paper, every norm of the blocks ---
    ("bert-large", "series(width=8)", 835_968, ""),
    ("bert-large", "series(width=64)", 6_343_680, "with the norms 2.13 % of the weights that are no embeddings: 2.1 %"),
    ("bert-large", "series(width=256)", 25_227_264, ""),
    ("bert-large", r"series(width=64)+modules(targets='.*layer[.][0-9]+[.].*LayerNorm')", 6_343_680 + 98_304, ""),
    ("bert-large", "bitfit", 272_384, "Ben Zaken et al.: 0.082 %"),
    # --- BERT-base: Ben Zaken et al. 2021, AdapterHub, UniPELT ---
    ("bert-base", "full", 109_482_240, ""),
    ("bert-base", "bitfit", 102_912, "0.1M"),
    ("bert-base", "series(reduction=16,variant=pfeiffer)", 894_528, "seq_bn"),
    ("bert-base", "series(reduction=16)", 1_789_056, "double_seq_bn"),
    ("bert-base", "parallel(reduction=2)", 7_091_712, "par_bn; scaled_par_bn learns 12 scales, which He et al. do not"),
    ("bert-base", "prefix(length=30,mlp=512)", 9_872_384, "prefix_tuning"),
    ("bert-base", "prefix(length=30)", 552_960, "prefix_tuning_flat"),
    ("bert-base", "prompt(length=10,start=uniform)", 7_680, "prompt_tuning"),
    ("bert-base", "ptuning(length=9)", 8_278_272, "P-tuning 14 d^2 + 18 d + P d"),
    ("bert-base", "lora(rank=8,targets=[query,value])", 294_912, "lora"),
    ("bert-base", "ia3", 55_296, "ia3"),
    ("bert-base", "dora(rank=8,targets=[query,value])", 313_344, "dora"),
    ("bert-base", "vera(rank=8,targets=[query,value])", 18_624, "the paper's; AdapterHub counts 14,169,600, a defect"),
    ("bert-base", "prefix(length=30,mlp=800)+parallel(reduction=2)", 22_493_984, "mam, with AdapterHub's widths"),
    ("bert-base", "mam(width=384)", 22_493_984, "mam, with AdapterHub's widths"),
    ("bert-base", "unipelt", 11_083_376, "unipelt: 11,046,464 and 48 gates of 769"),
    # --- BART-large (He et al. 2021, table 4) ---
    ("bart-large", "full", 406_291_456, ""),
    ("bart-large", "prefix(length=200)", 14_745_600, "3.6 %"),
    ("bart-large", "prefix(length=30)", 2_211_840, ""),
    ("bart-large", "parallel(width=512)", 25_202_688, ""),
    ("bart-large", "parallel(width=1024)", 50_380_800, "12.3 %"),
    ("bart-large", "prefix(length=30)+parallel(width=512)", 27_414_528, "MAM 6.7 %"),
    ("bart-large", "series(width=600,variant=pfeiffer)", 29_530_176, "7.2 %"),
    ("bart-large", "lora(rank=102,targets=ffn)", 25_067_520, "7.2 % in the paper: 6.17 % follows"),
    # --- T5.1.1, LM-adapted (Lester et al. 2021) ---
    ("t5-small", "full", 76_961_152, ""),
    ("t5-base", "full", 247_577_856, ""),
    ("t5-large", "full", 783_150_080, ""),
    ("t5-3b", "full", 2_849_757_184, ""),
    ("t5-11b", "full", 11_135_332_352, ""),
    ("t5-small", "prompt(length=100,start=uniform)", 51_200, ""),
    ("t5-base", "prompt(length=100,start=uniform)", 76_800, ""),
    ("t5-large", "prompt(length=100,start=uniform)", 102_400, ""),
    ("t5-3b", "prompt(length=100,start=uniform)", 204_800, ""),
    ("t5-11b", "prompt(length=100,start=uniform)", 409_600, ""),
    ("t5-11b", "prompt(length=5,start=uniform)", 20_480, "over five orders of magnitude fewer"),
    # --- T0-3B and T0-11B (Liu et al. 2022, T-Few) ---
    ("t5-3b", "ia3", 540_672, "540K"),
    ("t5-11b", "ia3", 1_081_344, "0.01 %"),
    ("t5-3b", "modules(norm)", 249_856, "LayerNorm 250K"),
    (
        "t5-3b", "bitfit(targets=[query,key,value,output,gate,up])+modules(norm)", 1_331_200,
        "BitFit 1.3M: zero biases added, but none on wo",
    ),
    ("t5-3b", "lora(rank=4,targets=all-linear)+modules(norm)", 9_097_216, "9.1M"),
    ("t5-3b", "series(width=64,variant=pfeiffer)+modules(norm)", 12_934_144, "12.9M: behind the feed-forward part only"),
    ("t5-3b", "prompt(length=10,start=uniform,stack=both)", 40_960, "41K"),
    ("t5-3b", "prompt(length=100,start=uniform,stack=both)", 409_600, "409K"),
    ("t5-3b", "prefix(length=2)", 589_824, "576K = 576 * 1024"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "text", "exact", "printed"), ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS])
def test_published_counts(base, text, exact, printed):
    del printed
    if missing := set(re.findall(r"(?:^|\+)(\w+)", text)) - METHODS.keys():
        pytest.skip(f"no method {', '.join(missing)}")
    if "bitfit(targets" in text and "add" not in {field.name for field in dataclasses.fields(METHODS["bitfit"])}:
        pytest.skip("bitfit adds no biases yet")
    model = on_meta(base)
    adapter = attach(model, read_method(text))
    try:
        assert adapter.parameter_count == exact
        counts = summary(model)
        assert counts.trainable_parameters == exact
        assert f"{exact:,} parameters" in str(counts)
        assert counts.base_parameters == sum(parameter.numel() for parameter in model.parameters())
        assert all(parameter.is_meta for parameter in adapter.parameters())
    finally:
        adapter.detach()


def count(model, method: Method) -> int:
    return attach(model, method).parameter_count


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
