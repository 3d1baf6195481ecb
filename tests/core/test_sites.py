"""Selectors: roles, groups, suffixes, patterns, stacks, layers, exclusions, and what is said when nothing matches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graftlm.core import survey
from graftlm.core.sites import linear_kind, parse_layers
from graftlm.errors import SiteError
from models_for_tests import MODELS, tiny


def names(sites):
    return {site.path.removeprefix("model.layers.") for site in sites}


@pytest.fixture(scope="module")
def llama():
    return survey(tiny("llama"))


@pytest.fixture(scope="module")
def t5():
    return survey(tiny("t5"))


def both(*suffixes):
    return {f"{layer}.{suffix}" for layer in (0, 1) for suffix in suffixes}


_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
_FFN = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("query", both("self_attn.q_proj")),
        ("query,value", both("self_attn.q_proj", "self_attn.v_proj")),
        (["query", "value"], both("self_attn.q_proj", "self_attn.v_proj")),
        (" query , value ", both("self_attn.q_proj", "self_attn.v_proj")),
        ("attention", both(*_ATTENTION)),
        ("ffn", both(*_FFN)),
        ("all-linear", both(*_ATTENTION, *_FFN)),
        ("attention,query", both(*_ATTENTION)),
        ("embed", {"model.embed_tokens"}),
        ("head", {"lm_head"}),
        ("lm_head", {"lm_head"}),
        ("q_proj", both("self_attn.q_proj")),
        ("self_attn.q_proj", both("self_attn.q_proj")),
        ("1.self_attn.q_proj", {"1.self_attn.q_proj"}),
        ("model.layers.0.mlp.up_proj", {"0.mlp.up_proj"}),
        (r".*\.(q|k)_proj", both("self_attn.q_proj", "self_attn.k_proj")),
        (r"model\.layers\.1\..*up.*", {"1.mlp.up_proj"}),
        (r".*\.[a-z]{1,1}_proj", both(*_ATTENTION)),
        ([r".*q_proj", "down"], both("self_attn.q_proj", "mlp.down_proj")),
    ],
)
def test_selectors(llama, targets, wanted):
    assert names(llama.select(targets)) == wanted


def test_selected_sites_come_once_and_in_the_order_of_the_model(llama):
    found = llama.select("head,down,q_proj,attention,query,embed")
    order = [site.path for site in llama]
    assert [site.path for site in found] == sorted((site.path for site in found), key=order.index)
    assert len(found) == len({site.path for site in found})


@pytest.mark.parametrize("word", ["proj", "_proj", "roj", "self", "layers.0", "q_proj.", "Q_PROJ", ".q_proj", "q_pro"])
def test_a_part_of_a_name_matches_nothing(llama, word):
    with pytest.raises(SiteError):
        llama.select(word)


def test_norms_are_no_targets_unless_asked_for(llama):
    with pytest.raises(SiteError):
        llama.select("norm")
    assert len(llama.select("norm", kinds=("norm",))) == 5


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("0", {0}), (1, {1}), ("-1", {1}), ("-1:", {1}), (":1", {0}), ("0-1", {0, 1}), ([0], {0}), ("0,1", {0, 1})],
)
def test_layers(llama, layers, wanted):
    assert {site.layer for site in llama.select("attention", layers=layers)} == wanted


def test_layers_leave_out_what_is_in_none(llama):
    assert names(llama.select("query,embed,head", layers="0-1")) == both("self_attn.q_proj")
    with pytest.raises(SiteError) as caught:
        llama.select("head", layers="0")
    assert caught.value.findings[0].code == "C102"


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("output", both("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("k_proj,o_proj", both("self_attn.q_proj", "self_attn.v_proj")),
        (r".*layers\.0\..*", {f"1.{name}" for name in _ATTENTION}),
        ("ffn", both(*_ATTENTION)),
    ],
)
def test_exclude(llama, exclude, left):
    assert names(llama.select("attention", exclude=exclude)) == left


def test_nothing_left_is_an_error(llama):
    with pytest.raises(SiteError) as caught:
        llama.select("query", exclude="q_proj")
    assert caught.value.findings[0].code == "C102"


def test_every_unmatched_selector_is_reported_with_the_nearest(llama):
    with pytest.raises(SiteError) as caught:
        llama.select("q_prj,query,atention", exclude="valeu")
    findings = caught.value.findings
    assert [finding.code for finding in findings] == ["C101"] * 3
    assert [finding.fix for finding in findings] == ["targets=q_proj", "targets=attention", "targets=value"]
    assert "q_proj (2)" in findings[0].message


def test_a_group_without_members_is_not_offered():
    model = nn.Module()
    model.fnn = nn.Linear(2, 2)
    with pytest.raises(SiteError) as caught:
        survey(model).select("ffn")
    assert caught.value.findings[0].fix == "targets=fnn"


@pytest.mark.parametrize(
    ("model_name", "word", "fused", "first"),
    [
        ("gpt2", "query", "c_attn", ((0, 32),)),
        ("gpt2", "value", "c_attn", ((64, 96),)),
        ("phi3", "value", "qkv_proj", ((48, 64),)),
        ("phi3", "up", "gate_up_proj", ((48, 96),)),
        ("phi3", "gate", "gate_up_proj", ((0, 48),)),
        ("modernbert", "gate", "Wi", ((0, 48),)),
        ("gpt_neox", "key", "query_key_value", ((8, 16), (32, 40), (56, 64), (80, 88))),  # interleaved by head
    ],
)
def test_a_part_of_a_fused_map_is_a_site(model_name, word, fused, first):
    found = survey(tiny(model_name)).select(word)
    assert [site.path.rpartition(".")[2] for site in found] == [fused, fused]
    assert {site.columns for site in found} == {first}
    assert all(site.part == site.role == word and site.key.endswith(f"{fused}:{word}") for site in found)
    assert found[0].out_features == sum(stop - start for start, stop in first)


def test_parts_are_meant_by_their_role_alone():
    here = survey(tiny("gpt2"))
    for words in ("attention", "all-linear", "c_attn", ".*c_attn", "qkv"):
        assert not [site for site in here.select(words) if site.part]
    assert {site.part for site in here.select(["query", "value"], exclude="value")} == {"query"}


def test_a_part_that_cannot_be_told_is_refused_with_the_whole():
    with pytest.raises(SiteError) as caught:
        survey(tiny("bloom")).select("query")
    assert caught.value.findings[0].code == "C105"
    assert caught.value.findings[0].fix == "targets=query_key_value"


@pytest.mark.parametrize(
    ("model_name", "entry", "end", "stream"),
    [
        ("llama", "mlp.up_proj", "mlp.down_proj", ("0", "output")),
        ("gemma3", "mlp.up_proj", "post_feedforward_layernorm", ("0", "output")),
        ("gpt2", "mlp.c_fc", "mlp.dropout", ("0", "output")),
        ("opt", "fc1", "fc2", ("0", "output")),
        ("bert", "intermediate.dense", "output.dropout", ("output.LayerNorm", "norm")),
        ("bart", "fc1", "fc2", ("final_layer_norm", "norm")),
        ("t5", "DenseReluDense.wi", "layer.1.dropout", ("block.0", "output")),
        ("mixtral", "mlp", "mlp", ("0", "output")),
    ],
)
def test_sublayers_and_streams(model_name, entry, end, stream):
    here = survey(tiny(model_name))
    ffn = next(site for site in here.branches if site.kind == "sublayer" and site.role == "ffn")
    assert ffn.entry.endswith(entry)
    assert ffn.path.endswith(end)
    behind = next(site for site in here.branches if site.kind == "stream")
    assert behind.path.endswith(stream[0])
    assert behind.entry == stream[1]
    attention = [site for site in here.branches if site.role == "attention"]
    assert len(attention) == (4 if model_name in ("t5", "bart") else 2)
    assert len([site for site in here.branches if site.role == "cross"]) == (2 if model_name in ("t5", "bart") else 0)


@pytest.mark.parametrize("model_name", [name for name in MODELS if name != "bloom"])
def test_attention_calls_and_sequences(model_name):
    model = tiny(model_name)
    here = survey(model)
    two = model.config.is_encoder_decoder
    assert len(here.attentions) == (6 if two else 2)
    assert [site.stack for site in here.sequences] == (["encoder", "decoder"] if two else [""])
    for site in here.attentions:
        assert (site.heads, site.head_width) == (4, 8)
        assert site.kv_heads in (2, 4)
    causal = {site.causal for site in here.attentions if site.stack in ("", "decoder") and site.role != "cross"}
    assert causal == {(hasattr(model, "lm_head") and model_name != "modernbert") or model_name == "llama_classifier"}


def test_experts_have_no_maps_to_select():
    found = survey(tiny("mixtral"))
    with pytest.raises(SiteError):
        found.select("ffn")
    assert {site.role for site in found.select("all-linear")} == {"query", "key", "value", "output"}


@pytest.mark.parametrize(
    ("targets", "stacks", "count"),
    [
        ("encoder/query", {"encoder"}, 2),
        ("decoder/query", {"decoder"}, 2),
        ("cross/query", {"cross"}, 2),
        ("cross/attention", {"cross"}, 8),
        ("encoder/all-linear", {"encoder"}, 12),
        ("query", {"encoder", "decoder", "cross"}, 6),
        ("encoder/q", {"encoder"}, 2),
        (["encoder/query", "cross/key"], {"encoder", "cross"}, 4),
    ],
)
def test_stacks(t5, targets, stacks, count):
    found = t5.select(targets)
    assert {site.stack for site in found} == stacks
    assert len(found) == count


def test_an_unknown_stack_matches_nothing(t5, llama):
    for found in (t5, llama):
        with pytest.raises(SiteError) as caught:
            found.select("coder/query")
        assert caught.value.findings[0].code == "C101"


def test_a_role_decides_over_a_name_where_roles_are_known():
    """BERT's attention maps are called `query`, and its `output.dense` names two kinds of map."""
    bert = survey(tiny("bert"))
    assert {site.role for site in bert.select("query")} == {"query"}
    assert {site.path.split(".", 4)[4] for site in bert.select("output")} == {"attention.output.dense"}
    assert {site.role for site in bert.select("output.dense")} == {"output", "down"}


def test_parameters_of_modules(llama):
    assert [site.key for site in llama.select_parameters("head")] == ["lm_head.weight"]
    assert len(llama.select_parameters("norm")) == 5
    assert len(llama.select_parameters("mlp")) == 6
    assert [site.key for site in llama.select_parameters("model.norm")] == ["model.norm.weight"]
    with pytest.raises(SiteError):
        llama.select_parameters("nrm")
    tied = survey(tiny("gpt2"))
    assert [(site.key, site.aliases) for site in tied.select_parameters("head")] == [("lm_head.weight", ())]
    assert [(site.key, site.aliases) for site in tied.select_parameters("embed")] == [("transformer.wte.weight", ())]


def test_kinds_of_modules():
    from transformers.pytorch_utils import Conv1D

    assert linear_kind(nn.Linear(2, 3)) == "linear"
    assert linear_kind(nn.Embedding(2, 3)) == "embedding"
    assert linear_kind(Conv1D(2, 3)) == "conv1d"
    assert linear_kind(nn.Conv1d(2, 3, 1)) is None
    assert linear_kind(nn.LayerNorm(3)) is None


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_layers_means_all(nothing):
    assert parse_layers(nothing, 4) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("3", {3}), ("-1", {5}), ("0-3", {0, 1, 2, 3}), ("-4:", {2, 3, 4, 5}), (":2", {0, 1}), ("0, 2,-1", {0, 2, 5}),
     ("2:4", {2, 3}), (":", set(range(6))), (0, {0}), ([0, -1], {0, 5}), ("4:99", {4, 5})],
)  # fmt: skip
def test_layers_are_read(text, wanted):
    assert parse_layers(text, 6) == wanted


@pytest.mark.parametrize(
    ("text", "code"),
    [("x", "C103"), ("1-", "C103"), ("a:b", "C103"), ("6", "C104"), ("-7", "C104"),
     ("0-6", "C104"), ([9], "C104"), ("1.5", "C103")],
)  # fmt: skip
def test_bad_layers_are_refused(text, code):
    with pytest.raises(SiteError) as caught:
        parse_layers(text, 6)
    assert caught.value.findings[0].code == code


@given(st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(-count, count - 1)))))
def test_layers_by_number_are_positions_in_a_list(drawn):
    count, chosen = drawn
    if not chosen:
        return
    wanted = {list(range(count))[layer] for layer in chosen}
    assert parse_layers(",".join(map(str, chosen)), count) == wanted
    assert parse_layers(sorted(chosen), count) == wanted


@given(st.integers(1, 40), st.none() | st.integers(-50, 50), st.none() | st.integers(-50, 50))
def test_layers_by_slice_are_slices_of_a_list(count, first, last):
    text = f"{'' if first is None else first}:{'' if last is None else last}"
    assert parse_layers(text, count) == set(list(range(count))[first:last])


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(0, n - 1))))
def test_layers_by_range_hold_both_ends(drawn):
    count, one, other = drawn
    low, high = sorted((one, other))
    assert parse_layers(f"{low}-{high}", count) == set(range(low, high + 1))


@given(st.text(max_size=12), st.integers(1, 12))
def test_any_text_gives_layers_or_a_site_error(text, count):
    try:
        found = parse_layers(text, count)
    except SiteError:
        return
    assert found is None or found <= set(range(count))


def test_attach_wants_a_model():
    from graftlm import LoRA, attach
    from graftlm.errors import AdapterError

    with pytest.raises(AdapterError) as caught:
        attach(("model", "tokenizer"), LoRA(rank=4))
    assert caught.value.findings[0].code == "A108"
