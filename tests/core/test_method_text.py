"""Methods as text: what `str` writes, `read_method` reads back; mistakes are named with the nearest right thing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graftlm
from conformance.cases import CASES
from graftlm.core import Sum
from graftlm.errors import MethodError
from graftlm.methods import METHODS, BitFit, Full, Head, Layers, LoRA, Modules, read_method

WORDS = st.sampled_from(
    ["attention", "ffn", "all-linear", "query", "q_proj", "self_attn.q_proj", "encoder/query", r".*\.(q|v)_proj",
     "model.layers.0.mlp.up_proj", r"model\.layers\.[0-9]+\..*", "lm_head"]
)  # fmt: skip
TARGETS = WORDS | st.lists(WORDS, min_size=1, max_size=3)
LAYERS = st.sampled_from(["-2:", ":3", "0-3", "0,2,4", "-4:-1"]) | st.integers(0, 9) | st.lists(
    st.integers(-3, 9), min_size=1, max_size=3
)  # fmt: skip
PATTERNS = st.sampled_from(["q_proj", "self_attn.q_proj", r".*\.1\..*", r"layers\.[01]\..*"])
LORAS = st.builds(
    LoRA,
    rank=st.integers(1, 512),
    alpha=st.floats(0.01, 1e4) | st.integers(1, 64),
    dropout=st.sampled_from([0.0, 0.05, 0.1, 0.999]),
    targets=TARGETS,
    layers=st.none() | LAYERS,
    exclude=st.just(()) | TARGETS,
    rslora=st.booleans(),
    bias=st.booleans(),
    rank_pattern=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=2),
    alpha_pattern=st.dictionaries(PATTERNS, st.floats(0.5, 64), max_size=2),
)
SINGLE = LORAS | st.builds(Modules, TARGETS) | st.builds(Layers, LAYERS) | st.sampled_from([BitFit(), Full(), Head()])
METHOD = st.lists(SINGLE, min_size=1, max_size=3).map(lambda parts: parts[0] if len(parts) == 1 else Sum(tuple(parts)))


@given(METHOD)
def test_what_is_written_reads_back(method):
    assert read_method(str(method)) == method


@pytest.mark.parametrize("layers", ["5", "-1", "0", 5, -1])
def test_texts_that_look_like_numbers_read_back(layers):
    assert read_method(str(LoRA(layers=layers))) == LoRA(layers=layers)


@pytest.mark.parametrize("case", CASES)
def test_the_cases_read_back(case):
    assert read_method(str(CASES[case])) == CASES[case]


@pytest.mark.parametrize(
    "text",
    [
        "prune(scope=global)", "sparse(fraction=0.1,scope=global)", "lora(rank=4,layers=-4:)", "prune(pattern=2:4)",
        "lora(layers=:3)+prune(scope=global)", 'lora(targets="q_proj,v_proj",layers=2:)',
    ],
)  # fmt: skip
def test_what_python_cannot_read_needs_no_quotes(text):
    found = read_method(text)
    assert read_method(str(found)) == found
    assert found.parts[-1].settings()  # what was written is there


@pytest.mark.parametrize("text", ["lora(rank=4,rank=5)", "lora(4,rank=5)", "sparse(0.1,fraction=0.2)"])
def test_a_setting_given_twice_is_refused(text):
    with pytest.raises(MethodError) as caught:
        read_method(text)
    assert [finding.code for finding in caught.value.findings] == ["T112"]


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("lora(start=pisa)", "start=pissa"), ("series(variant=pfeifer)", "variant=pfeiffer"),
        ("sparse(score=fischer)", "score=fisher"), ("prune(scope=glob)", "scope=global"),
        ("prompt(position=ends)", "position=end"), ("parallel(activation=rely)", "activation=relu"),
        ("adapters", "series"), ("fisher", "sparse"), ("snip", "sparse"), ("ln", "norm"), ("features", "head"),
    ],
)  # fmt: skip
def test_the_nearest_right_word_is_offered(text, fix):
    with pytest.raises(MethodError) as caught:
        read_method(text)
    assert caught.value.findings[0].fix == fix


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_by_its_name_alone(name):
    assert read_method(name) == METHODS[name]()
    assert METHODS[name].name == name
    assert METHODS[name].learning_rate_range[0] <= METHODS[name].learning_rate <= METHODS[name].learning_rate_range[1]


def test_the_table_is_sorted():
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("lora", LoRA()),
        ("LoRA(16)", LoRA(rank=16)),
        ("lora(rank=16, targets=all-linear)", LoRA(rank=16, targets="all-linear")),
        ("lora(targets=[query,value])", LoRA(targets=["query", "value"])),
        ("lora(targets='query,value')", LoRA(targets="query,value")),
        ('lora(targets="self_attn.q_proj")', LoRA(targets="self_attn.q_proj")),
        ("lora(targets=self_attn.q_proj)", LoRA(targets="self_attn.q_proj")),
        ("lora(targets=encoder/query)", LoRA(targets="encoder/query")),
        ("lora(alpha=8, rslora=true)", LoRA(alpha=8, rslora=True)),
        ("lora(layers=-1)", LoRA(layers=-1)),
        ("lora(rank_pattern={q_proj: 4})", LoRA(rank_pattern={"q_proj": 4})),
        ("lora+head", LoRA() + Head()),
        (" lora( rank = 4 ) + bitfit + head ", LoRA(rank=4) + BitFit() + Head()),
        ("layers('-2:')", Layers("-2:")),
        ("modules([embed_tokens, lm_head])", Modules(["embed_tokens", "lm_head"])),
    ],
)
def test_texts(text, method):
    assert read_method(text) == method


@pytest.mark.parametrize(
    ("text", "codes", "said"),
    [
        ("lorra", ["T101"], "lora"),
        ("nothing", ["T101"], "bitfit"),
        ("", ["T114"], "cannot read"),
        ("lora(", ["T114"], "cannot read"),
        ("lora(r=16)", ["T112"], "rank"),
        ("lora(lora_alpha=16)", ["T112"], "alpha"),
        ("lora(target_modules=q_proj)", ["T112"], "targets"),
        ("lora(rnak=16)", ["T112"], "rank"),
        ("lora(rank=sixteen)", ["T113"], "whole number"),
        ("lora(rank=1.5)", ["T113"], "whole number"),
        ("lora(rank=true)", ["T113"], "whole number"),
        ("lora(alpha=high)", ["T113"], "number"),
        ("lora(rslora=1)", ["T113"], "true or false"),
        ("lora(rank=0, alpha=-1, dropout=1)", ["T102"] * 3, "dropout"),
        ("full(3)", ["T112"], "takes 0 settings"),
        ("full(rank=3)", ["T112"], "no settings"),
        ("lorra + lora(rnak=1) + lora(rank=x)", ["T101", "T112", "T113"], "rank"),
        ("lora - head", ["T101"], ""),
        ("lora * 2", ["T101"], ""),
    ],
)
def test_mistakes(text, codes, said):
    with pytest.raises(MethodError) as caught:
        read_method(text)
    assert [finding.code for finding in caught.value.findings] == codes
    assert said in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_mistyped_method_gets_the_nearest_of_all(name):
    middle = len(name) // 2
    typos = {
        name[:middle] + name[middle] + name[middle:],  # a letter twice
        name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :],  # two letters changed over
        name + "s",
    }
    for typo in typos - METHODS.keys():
        with pytest.raises(MethodError) as caught:
            read_method(f"{typo}()")
        (finding,) = caught.value.findings
        assert (finding.code, finding.fix) == ("T101", name)
        assert f"Did you mean {name}?" in finding.message


@pytest.mark.parametrize(
    ("text", "name"),
    [("prefix-tuning(length=3)", "prefix"), ("prompt_tuning", "prompt"), ("houlsby", "series"), ("ln_tuning", "norm")],
)
def test_names_of_elsewhere(text, name):
    if name not in METHODS:
        pytest.skip(f"no method {name}")
    with pytest.raises(MethodError, match=f"Did you mean {name}?"):
        read_method(text)


def test_the_front_door_reads_methods():
    assert graftlm.method("lora(rank=8,targets=attention)+head") == LoRA(rank=8, targets="attention") + Head()


@given(st.text(max_size=30) | st.text(alphabet="lora()=+,[]{}'\"rank1.-:", max_size=30))
def test_any_text_is_a_method_or_a_method_error(text):
    try:
        read_method(text)
    except MethodError:
        return


def test_sums_are_flat_and_keep_their_order():
    total = LoRA() + (BitFit() + Head())
    assert total.parts == (LoRA(), BitFit(), Head())
    assert str(total) == "lora+bitfit+head"
    assert ((LoRA() + BitFit()) + Head()).parts == total.parts


def test_only_methods_add_up():
    with pytest.raises(TypeError):
        LoRA() + "head"


def test_methods_are_values():
    assert LoRA(rank=4) == LoRA(rank=4)
    assert LoRA(rank=4) != LoRA(rank=8)
    with pytest.raises(AttributeError):
        LoRA().rank = 3
