"""Series and parallel adapters against forwards written out by hand, and their published sizes."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from graftlm.core import attach, parts_of
from graftlm.errors import MethodError
from graftlm.methods import Modules, ParallelAdapter, SeriesAdapter
from models_for_tests import inputs_for, logits_of, perturb, tiny


def bottleneck(adapter, key, x, act):
    state = adapter.state()
    down = F.linear(x, state[f"{key}.down_weight"], state[f"{key}.down_bias"])
    return F.linear(act(down), state[f"{key}.up_weight"], state[f"{key}.up_bias"])


def hand_written_bert(model, batch, attention, ffn, norm):
    """BERT's blocks; `attention` and `ffn` change what is added, `norm` makes the block's output of the stream."""
    hidden = model.bert.embeddings(batch["input_ids"])
    for number, layer in enumerate(model.bert.encoder.layer):
        own = layer.attention.self
        heads = [getattr(own, name)(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for name in ("query", "key", "value")]
        seen = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        out = attention(number, hidden, layer.attention.output.dense(seen))
        middle = layer.attention.output.LayerNorm(hidden + out)
        out = ffn(number, middle, layer.output.dense(F.gelu(layer.intermediate.dense(middle))))
        hidden = norm(number, layer.output.LayerNorm, middle + out)
    return model.classifier(model.bert.pooler(hidden))


def as_it_is(_, x, y):
    return y


def plain_norm(_, norm, stream):
    return norm(stream)


def test_houlsby_on_bert():
    model = tiny("bert")
    adapter = attach(model, SeriesAdapter(width=5))
    perturb(adapter)

    def change(name):
        def changed(number, x, y):
            key = f"bert.encoder.layer.{number}.{name}output.dropout.series"
            return y + bottleneck(adapter, key, y, F.gelu)

        return changed

    wanted = hand_written_bert(tiny("bert"), inputs_for(model), change("attention."), change(""), plain_norm)
    assert torch.allclose(logits_of(model), wanted, atol=1e-5)


def test_pfeiffer_on_bert():
    """out = LN(A(LN(h + res)) + h + res): the adapter reads behind the norm, its residual is taken before it."""
    model = tiny("bert")
    adapter = attach(model, SeriesAdapter(reduction=8, variant="pfeiffer"))
    perturb(adapter)

    def norm(number, own, stream):
        key = f"bert.encoder.layer.{number}.output.LayerNorm.series"
        return own(bottleneck(adapter, key, own(stream), F.relu) + stream)

    wanted = hand_written_bert(tiny("bert"), inputs_for(model), as_it_is, as_it_is, norm)
    assert torch.allclose(logits_of(model), wanted, atol=1e-5)


def test_parallel_on_bert():
    model = tiny("bert")
    adapter = attach(model, ParallelAdapter(width=5, targets="attention,ffn"))
    perturb(adapter)

    def change(name):
        def changed(number, x, y):
            key = f"bert.encoder.layer.{number}.{name}output.dropout.parallel"
            return y + 4 * bottleneck(adapter, key, x, F.relu)

        return changed

    wanted = hand_written_bert(tiny("bert"), inputs_for(model), change("attention."), change(""), plain_norm)
    assert torch.allclose(logits_of(model), wanted, atol=1e-5)


def hand_written_gpt2(model, batch, ffn, stream):
    """GPT-2's blocks; `ffn` changes what the feed-forward part adds, `stream` what leaves the block."""
    ids = batch["input_ids"]
    hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    for number, block in enumerate(model.transformer.h):
        heads = block.attn.c_attn(block.ln_1(hidden)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + block.attn.c_proj(seen)
        x = block.ln_2(hidden)
        hidden = hidden + ffn(number, x, block.mlp.c_proj(F.gelu(block.mlp.c_fc(x), approximate="tanh")))
        hidden = stream(number, hidden)
    return model.lm_head(model.transformer.ln_f(hidden))


def test_lin_on_gpt2():
    model = tiny("gpt2")
    adapter = attach(model, SeriesAdapter(width=5, variant="lin"))
    perturb(adapter)

    def stream(number, hidden):
        key, state = f"transformer.h.{number}", adapter.state()
        read = F.layer_norm(hidden, (32,), state[f"{key}.norm_weight"], state[f"{key}.norm_bias"])
        return hidden + bottleneck(adapter, f"{key}.series", read, F.relu)

    wanted = hand_written_gpt2(tiny("gpt2"), inputs_for(model), as_it_is, stream)
    assert torch.allclose(logits_of(model), wanted, rtol=1e-4, atol=1e-4)


def test_parallel_on_gpt2_reads_the_normalised_input():
    model = tiny("gpt2")
    adapter = attach(model, ParallelAdapter(width=5, scale=3.0))
    perturb(adapter)

    def ffn(number, x, y):
        return y + 3 * bottleneck(adapter, f"transformer.h.{number}.mlp.dropout.parallel", x, F.relu)

    wanted = hand_written_gpt2(tiny("gpt2"), inputs_for(model), ffn, lambda _, hidden: hidden)
    assert torch.allclose(logits_of(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_name", ["llama", "bert", "t5"])
def test_near_identity_is_near(model_name):
    model = tiny(model_name)
    before = logits_of(model)
    attach(model, SeriesAdapter(start="near-identity"))
    change = (logits_of(model) - before).abs().max() / before.abs().max()
    assert 0 < change < 1e-2


def test_layers_leave_layers_out():
    model = tiny("t5")
    adapter = attach(model, SeriesAdapter(layers="1:"))
    assert {part.site.layer for part in adapter.parts} == {1}
    assert {part.site.role for part in adapter.parts} == {"attention", "cross", "ffn"}


@pytest.mark.parametrize(
    ("method", "code"),
    [
        (ParallelAdapter(targets="fnn"), "T141"),
        (ParallelAdapter(targets="encoder/ffn"), "T141"),
        (ParallelAdapter(targets="cross"), "T141"),
    ],
)
def test_targets_that_name_no_sublayer(method, code):
    with pytest.raises(MethodError) as caught:
        attach(tiny("llama"), method)
    assert [finding.code for finding in caught.value.findings] == [code]


@pytest.mark.parametrize(
    "settings", [{"width": 0}, {"reduction": 0}, {"variant": "houlsbi"}, {"activation": "gel"}, {"start": "zero"}]
)
def test_wrong_settings(settings):
    with pytest.raises(MethodError):
        SeriesAdapter(**settings)


# --- published sizes ------------------------------------------------------------------------------------------------


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def bert(width, layers, heads):
    return on_meta(
        tf.BertModel,
        tf.BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
        ),
    )


def bart_large():
    return on_meta(
        tf.BartForConditionalGeneration,
        tf.BartConfig(
            d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
            decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
        ),
    )  # fmt: skip


def gpt2(width, layers, heads):
    return on_meta(tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=width, n_layer=layers, n_head=heads))


def count(model, method):
    return sum(parameter.numel() for part in parts_of(model, method) for parameter in part.delta.parameters())


@pytest.mark.parametrize(("width", "published"), [(8, 835_968), (64, 6_343_680), (256, 25_227_264)])
def test_houlsby_on_bert_large(width, published):
    model = bert(1024, 24, 16)
    assert count(model, SeriesAdapter(width=width)) == published
    norms = Modules(r"encoder\.layer\..*LayerNorm")
    assert count(model, SeriesAdapter(width=width) + norms) == published + 98_304


@pytest.mark.parametrize(
    ("model", "method", "published"),
    [
        (lambda: bert(768, 12, 12), SeriesAdapter(width=16, variant="pfeiffer"), 304_320),
        (lambda: bert(768, 12, 12), SeriesAdapter(reduction=16, variant="pfeiffer"), 894_528),
        (lambda: bert(768, 12, 12), SeriesAdapter(reduction=16), 1_789_056),
        (lambda: bert(768, 12, 12), ParallelAdapter(reduction=2), 7_091_712),
        (lambda: gpt2(1024, 24, 16), SeriesAdapter(width=6, variant="lin"), 368_784),
        (lambda: gpt2(1024, 24, 16), SeriesAdapter(width=224, variant="lin"), 11_089_152),
        (lambda: gpt2(1280, 36, 20), SeriesAdapter(width=8, variant="lin"), 875_808),
        (bart_large, ParallelAdapter(width=512), 25_202_688),
        (bart_large, ParallelAdapter(width=1024), 50_380_800),
        (bart_large, SeriesAdapter(width=600, variant="pfeiffer"), 29_530_176),
    ],
)
def test_published_sizes(model, method, published):
    assert count(model(), method) == published
