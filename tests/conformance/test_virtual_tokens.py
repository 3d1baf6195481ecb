"""Prefixes, prompts, P-tuning and ATTEMPT: starts, counts, template slots, padding, generation, sums, classifiers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as tf

from conformance.test_rows import PLAIN, assert_close, generate, padded
from graftlm.core import adapters, attach, use
from graftlm.errors import GraftError, MethodError, RoutingError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import Attempt, LoRA, PrefixTuning, PromptTuning, PTuning, read_method
from models_for_tests import ENCODER_DECODERS, VOCABULARY, inputs_for, logits_of, loss_of, perturb, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*is deprecated:FutureWarning")

METHODS = {
    "prefix": PrefixTuning(length=3),
    "prefix-shifted": PrefixTuning(length=3, positions="shifted"),
    "prefix-mlp": PrefixTuning(length=3, mlp=8),
    "prompt": PromptTuning(length=3),
    "prompt-bos": PromptTuning(length=3, position="after-bos"),
    "ptuning": PTuning(length=3),
}
#: Grouped heads, sliding windows, soft caps (which need eager attention), learned positions.
FAMILIES = ("llama", "mistral", "gemma2", "gemma3", "gpt2")
SUMS = {
    "two prefixes": PrefixTuning(length=2, targets="attention", layers="0") + PrefixTuning(length=3, layers="1"),
    "prompt+prefix+lora": PromptTuning(length=2) + PrefixTuning(length=3) + LoRA(rank=2),
}


def ready(model_name, method, **options):
    model = tiny(model_name)
    if model_name == "gemma2":
        model.set_attn_implementation("eager")  # soft caps
    adapter = attach(model, method, **options)
    perturb(adapter)
    return model, adapter


# --- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_a_prefix_from_tokens_is_those_tokens_before_the_text(model_name):
    model = tiny(model_name)
    if model_name == "mixtral":
        model.config.sliding_window = None
    batch = inputs_for(model)
    tokens = [7, 9, 11, 7]
    before = torch.tensor([tokens]).expand(3, -1)
    longer = {"input_ids": torch.cat([before, batch["input_ids"]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    wanted = logits_of(model, longer)[:, len(tokens) :]
    attach(model, PrefixTuning(length=4, positions="shifted", start="tokens", tokens=tokens[:3]))
    assert_close(logits_of(model, batch), wanted)


@pytest.mark.parametrize("model_name", ["llama", "gemma2", "gemma3", "gpt2", "opt", "bloom"])
def test_a_prompt_from_text_is_that_text_before_the_row(model_name):
    model = tiny(model_name)
    batch = inputs_for(model)
    longer = {"input_ids": torch.cat([torch.tensor([[7, 9, 7]]).expand(3, -1), batch["input_ids"]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    wanted = logits_of(model, longer)[:, 3:]
    attach(model, PromptTuning(length=3, start="text", tokens=[7, 9]))
    assert_close(logits_of(model, batch), wanted)


@pytest.mark.parametrize("model_name", ["t5", "bart"])
def test_an_encoder_prompt_from_text_is_that_text(model_name):
    model = tiny(model_name)
    batch = inputs_for(model)
    longer = {**batch, "input_ids": torch.cat([torch.tensor([[7, 9, 7]]).expand(3, -1), batch["input_ids"]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    wanted = logits_of(model, longer)
    attach(model, PromptTuning(length=3, start="text", tokens=[7, 9]))
    assert_close(logits_of(model, batch), wanted)


def test_a_prefix_from_tokens_ignores_adapters_that_are_there():
    model = tiny("llama")
    method = PrefixTuning(length=2, start="tokens", tokens=[5, 6])
    plain = attach(model, method, name="plain").state()
    model = tiny("llama")
    perturb(attach(model, LoRA(rank=2, targets="all-linear"), name="other"))
    perturb(attach(model, PrefixTuning(length=2), name="prefix"))
    use(model, ("other", "prefix"))
    found = attach(model, method, name="new").state()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_starts_of_a_prompt():
    model = tiny("llama")
    table = model.get_input_embeddings().weight
    drawn = attach(model, PromptTuning(length=10), name="a").parts[0].delta.prompt_embeddings
    rows = [int((table == row).all(dim=1).nonzero()) for row in drawn]
    assert len(set(rows)) == 10
    uniform = attach(model, PromptTuning(length=50, start="uniform"), name="b").parts[0].delta.prompt_embeddings
    assert uniform.abs().max() <= 0.5
    assert uniform.min() < -0.4
    labels = attach(model, PromptTuning(length=3, start="labels", labels=[[5, 6], [7]]), name="c").parts[0].delta
    torch.testing.assert_close(labels.prompt_embeddings[0], table[[5, 6]].mean(dim=0))
    assert torch.equal(labels.prompt_embeddings[1], table[7])
    assert any(torch.equal(labels.prompt_embeddings[2], row) for row in table)
    assert attach(model, PromptTuning(length=VOCABULARY + 5), name="d").parameter_count == (VOCABULARY + 5) * 32


def test_a_prompt_from_a_tokenizer():
    class Tokenizer:
        def __call__(self, text, *, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    method = PromptTuning.from_text(Tokenizer(), "is this good", position="end")
    assert method == PromptTuning(length=3, start="text", tokens=[2, 4, 4], position="end")
    assert PromptTuning.from_text(Tokenizer(), "is this good", length=5).length == 5
    assert read_method(str(method)) == method


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: PromptTuning(length=0), "T102"),
        (lambda: PromptTuning(start="text"), "T102"),
        (lambda: PromptTuning(tokens=[3]), "T102"),
        (lambda: PromptTuning(position="slots"), "T102"),
        (lambda: PromptTuning(length=1, start="labels", labels=[[1], [2]]), "T102"),
        (lambda: PrefixTuning(mlp=8, start="tokens", tokens=[3]), "T102"),
        (lambda: PTuning(encoder="gru"), "T102"),
        (lambda: Attempt(temperature=0), "T102"),
        (lambda: attach(tiny("llama"), PromptTuning(start="text", tokens=[99])), "T153"),
        (lambda: attach(tiny("t5"), PrefixTuning(positions="shifted")), "T151"),
        (lambda: attach(tiny("bart"), PrefixTuning(positions="shifted", targets="attention")), "T151"),
        (lambda: attach(tiny("llama"), PrefixTuning(targets="cross")), "C101"),
        (lambda: attach(tiny("bloom"), PrefixTuning()), "T150"),
        (lambda: attach(tiny("gpt2"), Attempt()), "T154"),
    ],
)
def test_what_does_not_fit_is_refused(make, code):
    with pytest.raises(GraftError) as caught:
        make()
    assert [finding.code for finding in caught.value.findings] == [code]


# --- counts ---------------------------------------------------------------------------------------------------------


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def gpt2_medium():
    return on_meta(tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def bert_base():
    return on_meta(tf.BertForSequenceClassification, tf.BertConfig())


def bart_large():
    return on_meta(tf.BartForConditionalGeneration, tf.BartConfig())


def t5(width, layers=1):
    return on_meta(
        tf.T5ForConditionalGeneration, tf.T5Config(d_model=width, d_ff=64, d_kv=64, num_layers=layers, num_heads=4)
    )


@pytest.mark.parametrize(
    ("make", "method", "published"),
    [
        (gpt2_medium, PrefixTuning(length=5), 245_760),  # Li & Liang 2021, "0.1 %"
        (bart_large, PrefixTuning(length=200), 14_745_600),  # He et al. 2021, table 4: 3.6 %
        (bart_large, PrefixTuning(length=30), 2_211_840),  # ... the prefix of MAM
        (bert_base, PrefixTuning(length=30, mlp=512), 9_872_384),  # AdapterHub's own count
        (bert_base, PrefixTuning(length=30), 552_960),
        (bert_base, PromptTuning(length=10), 7_680),
        (bert_base, PTuning(length=9), 8_278_272),  # Liu et al. 2021 on LAMA: 14 d^2 + 18 d + P d
        (lambda: t5(512), PromptTuning(length=100), 51_200),  # Lester et al. 2021, T5.1.1 small
        (lambda: t5(768), PromptTuning(length=100), 76_800),
        (lambda: t5(4096), PromptTuning(length=5), 20_480),  # XXL
        (lambda: t5(768), Attempt(length=100, sources=6), 100 * 768 + 2 * 100 * 768 + 2 * 768),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_parameter_counts_of_the_papers(make, method, published):
    assert attach(make(), method).parameter_count == published


def test_the_stored_prefix_is_plain_and_counts_2pdl():
    model, adapter = ready("gpt2", PrefixTuning(length=5, mlp=16))
    baked = adapter.baked()
    assert baked.parameter_count == 2 * 5 * 32 * 2
    assert baked.method == PrefixTuning(length=5)
    assert adapter.parameter_count > baked.parameter_count
    assert str(read_method("prefix(length=5,mlp=16)")) == str(adapter.method)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(length=3, mlp=8, dropout=0.1), PTuning(length=3, dropout=0.1), PTuning(length=2, encoder="mlp"),
        PTuning(length=2, hidden=5, position="end", stack="both"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_stored_computes_the_same_without_its_network(method, model_name, tmp_path):
    model, adapter = ready(model_name, method)
    wanted = logits_of(model)
    save_adapter(adapter, tmp_path)
    fresh = tiny(model_name)
    loaded = load_adapter(fresh, tmp_path)
    assert_close(logits_of(fresh), wanted)
    assert not any(word in name for name in loaded.state() for word in ("mlp", "lstm"))
    assert_close(logits_of(model), wanted)  # the one in training keeps its network
    assert any("mlp" in name for name in adapter.state())


# --- slots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", [PromptTuning, PTuning])
def test_virtual_tokens_in_the_slots_of_a_template(kind, model_name, tmp_path):
    model, adapter = ready(model_name, kind(length=3, position="slots", slot_token=4))
    batch = inputs_for(model, tokens=9)
    batch["input_ids"][:, [0, 3, 7]] = 4
    found = logits_of(model, batch)
    vectors = adapter.baked().parts[0].delta.prompt_embeddings.detach()
    with use(model, None), torch.no_grad():
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        embeddings[:, [0, 3, 7]] = vectors
        given = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
        assert_close(found, model(inputs_embeds=embeddings, **given).logits)
    save_adapter(adapter, tmp_path)
    fresh = tiny(model_name)
    assert load_adapter(fresh, tmp_path).method == PromptTuning(length=3, position="slots", slot_token=4)
    assert_close(logits_of(fresh, batch), found)
    batch["input_ids"][1, 0] = 5
    with pytest.raises(RoutingError) as caught:
        logits_of(model, batch)
    assert caught.value.findings[0].code == "R114"


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", FAMILIES)
@pytest.mark.parametrize("case", [*METHODS, *SUMS])
def test_padding_on_either_side_changes_nothing(case, model_name):
    model, _ = ready(model_name, {**METHODS, **SUMS}[case])
    batch = inputs_for(model, rows=4)
    left, at_left = padded(batch, "left")
    right, at_right = padded(batch, "right")
    found, wanted = logits_of(model, left), logits_of(model, right)
    assert found.shape[:2] == left["input_ids"].shape
    for row in range(4):
        short = logits_of(model, {"input_ids": left["input_ids"][row : row + 1, at_left[row]]})
        assert_close(found[row, at_left[row]], wanted[row, at_right[row]], 2e-6)
        assert_close(found[row, at_left[row]], short[0], 2e-6)


@pytest.mark.parametrize("model_name", FAMILIES)
@pytest.mark.parametrize("case", [*METHODS, *SUMS])
def test_generation_with_a_cache_equals_generation_without(case, model_name):
    model, _ = ready(model_name, {**METHODS, **SUMS}[case])
    left, _ = padded(inputs_for(model, rows=4), "left")
    found = generate(model, left)
    assert torch.equal(generate(model, left, use_cache=False), found)
    beams = generate(model, left, num_beams=3)
    assert torch.equal(generate(model, left, num_beams=3, use_cache=False), beams)
    use(model, None)
    if model_name != "mistral":  # its windows have left the virtual tokens behind
        assert not torch.equal(generate(model, left), found)


@pytest.mark.parametrize("model_name", ENCODER_DECODERS)
@pytest.mark.parametrize("method", [Attempt(length=2, sources=3, temperature=1.0), PrefixTuning(length=3, mlp=4)])
def test_generation_of_encoder_decoders(method, model_name):
    model, _ = ready(model_name, method)
    batch = inputs_for(model)
    found = generate(model, batch)
    assert torch.equal(generate(model, batch, use_cache=False), found)
    assert torch.equal(generate(model, batch, num_beams=1), found)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model.generate(**given, **{**PLAIN, "num_beams": 3}).shape[0] == 3


@pytest.mark.parametrize("model_name", [*FAMILIES, "bert", "t5"])
@pytest.mark.parametrize("case", METHODS)
def test_rows_with_and_without_virtual_tokens(case, model_name):
    method = METHODS[case]
    if model_name == "t5" and case == "prefix-shifted":
        method = replace(method, targets=["encoder/attention", "decoder/attention"])
    model, _ = ready(model_name, method, name="a")
    perturb(attach(model, PromptTuning(length=5), name="b"))
    perturb(attach(model, LoRA(rank=2), name="c"))
    batch = inputs_for(model, rows=4)
    rows = ["a", None, ("a", "b"), "c"]
    wanted = []
    for row, choice in enumerate(rows):
        use(model, choice)
        wanted.append(logits_of(model, {name: tensor[row : row + 1] for name, tensor in batch.items()}))
    use(model, rows)
    assert_close(logits_of(model, batch), torch.cat(wanted))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gate", [False, True], ids=["bare", "gated"])
def test_a_shifted_prefix_of_t5_stands_next_to_the_first_real_token(gate, side):
    """The distances in the bias are those to the row's own tokens, wherever padding is."""
    method = PrefixTuning(length=3, positions="shifted", targets=["encoder/attention", "decoder/attention"])
    model = tiny("t5")
    for stack in (model.encoder, model.decoder):
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.normal_()
    perturb(attach(model, read_method(f"gated({method})") if gate else method, name="a"))
    perturb(attach(model, PrefixTuning(length=5), name="b"))
    batch, at = padded(inputs_for(model, rows=4), side)
    both = {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
        "decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"],
    }  # fmt: skip
    rows = ["a", None, ("a", "b"), "a"]
    wanted = []
    for row, choice in enumerate(rows):
        use(model, choice)
        alone = batch["input_ids"][row : row + 1, at[row]]
        wanted.append(logits_of(model, {"input_ids": alone, "decoder_input_ids": alone})[0])
    use(model, rows)
    found = logits_of(model, both)
    for row, place in enumerate(at):
        assert_close(found[row, place], wanted[row])


@pytest.mark.parametrize("model_name", FAMILIES)
@pytest.mark.parametrize("case", ["prefix", "prefix-mlp", "prefix-shifted", "prompt"])
def test_a_static_cache_is_exact_or_refused(case, model_name):
    """Its mask is made for all places of the cache, in which nothing can be put before the tokens."""
    model, adapter = ready(model_name, METHODS[case])
    perturb(adapter)
    batch = inputs_for(model, rows=2)
    wanted = generate(model, batch)
    if case in ("prefix", "prefix-mlp"):
        assert torch.equal(generate(model, batch, cache_implementation="static"), wanted)
    else:
        with pytest.raises(RoutingError, match="masks of other shapes"):
            generate(model, batch, cache_implementation="static")


def test_a_prefix_without_its_mlp_keeps_the_bias_over_it():
    model = tiny("t5")
    method = PrefixTuning(length=3, mlp=4, positions="shifted", targets="decoder/attention")
    for part in attach(model, method).parts:
        plain = part.delta.plain()
        assert plain.has_bias
        assert torch.equal(plain.bias(2, 4), part.delta.bias(2, 4))


@pytest.mark.parametrize("model_name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("case", ["prefix", "prefix-shifted", "prompt+prefix+lora"])
def test_left_padding_without_positions_changes_nothing(case, model_name):
    """Rotary models count padding unless told otherwise, and a prefix stands still."""
    model, _ = ready(model_name, {**METHODS, **SUMS}[case], name="a")
    left, at_left = padded(inputs_for(model, rows=4), "left")
    rows = ["a", None, "a", "a"]
    wanted = []
    for row, choice in enumerate(rows):
        use(model, choice)
        wanted.append(logits_of(model, {"input_ids": left["input_ids"][row : row + 1, at_left[row]]})[0])
    use(model, rows)
    batch = {name: left[name] for name in ("input_ids", "attention_mask")}
    found = logits_of(model, batch)
    with torch.no_grad():  # ... and a cache that is filled in two steps
        first = {name: tensor[:, :6] for name, tensor in batch.items()}
        cache = model(**first, use_cache=True).past_key_values
        later = model(
            input_ids=batch["input_ids"][:, 6:], attention_mask=batch["attention_mask"], past_key_values=cache
        ).logits
    for row in range(4):
        assert_close(found[row, at_left[row]], wanted[row], 2e-6)
        assert_close(later[row], found[row, 6:], 2e-6)


def test_two_prefixes_stand_one_behind_the_other():
    model = tiny("llama")
    first, second = attach(model, PrefixTuning(length=2), name="a"), attach(model, PrefixTuning(length=3), name="b")
    perturb(first, size=1.0)
    perturb(second, size=1.0, seed=1)
    use(model, ("a", "b"))
    both = logits_of(model)
    joined = attach(model, PrefixTuning(length=5), name="c")
    joined.load_state({key: torch.cat([first.state()[key], second.state()[key]]) for key in joined.state()})
    assert_close(logits_of(model), both)
    assert set(adapters(model)) == {"a", "b", "c"}


@pytest.mark.parametrize("case", ["prefix", "prompt", "ptuning", "attempt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_that_classifies_pads_on_either_side(side, case):
    method = METHODS.get(case) or Attempt(length=2, sources=3, temperature=0.5)
    model, _ = ready("llama_classifier", method)
    batch = inputs_for(model, rows=4)
    given, places = padded(batch, side)
    found = logits_of(model, {name: given[name] for name in ("input_ids", "attention_mask")})
    for row in range(4):
        alone = logits_of(model, {"input_ids": given["input_ids"][row : row + 1, places[row]]})
        assert_close(found[row : row + 1], alone, 4e-6)


def test_labels_and_logits_are_those_of_the_rows_own_tokens():
    model, _ = ready("llama", PromptTuning(length=5) + PrefixTuning(length=2))
    batch = inputs_for(model)
    with torch.no_grad():
        found = model(**batch, labels=batch["input_ids"])
    logits = found.logits[:, :-1].flatten(0, 1)
    assert found.logits.shape[:2] == batch["input_ids"].shape
    wanted = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["llama", "gemma2", "gpt2", "t5"])
@pytest.mark.parametrize(
    "method", [PrefixTuning(length=3, mlp=8, dropout=0.3), PTuning(length=3), *SUMS.values()], ids=str
)
def test_gradient_checkpointing_changes_nothing(method, model_name):
    model, adapter = ready(model_name, method)
    model.train()

    def gradients():
        for parameter in adapter.parameters():
            parameter.grad = None
        torch.manual_seed(4)
        loss_of(model).backward()
        return {name: parameter.grad for name, parameter in adapter.named_parameters()}

    wanted = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients()
    size = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert gradient is not None, name
        if not (
            model_name == "t5" and getattr(method, "dropout", 0)
        ):  # other draws: T5 drops more often without a cache
            assert (found[name] - gradient).abs().max() <= 1e-5 * size, name


@pytest.mark.parametrize("case", METHODS)
def test_a_few_steps_lower_the_loss(case):
    model = tiny("llama").train()
    adapter = attach(model, METHODS[case])
    batch = inputs_for(model)
    optimiser = torch.optim.AdamW(adapter.groups(3e-2))
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


# --- ATTEMPT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["t5", "bert", "llama_classifier"])
def test_attempt_mixes_the_prompts_by_the_input(model_name):
    model, adapter = ready(model_name, Attempt(length=2, sources=3, bottleneck=4, temperature=1.0))
    delta = adapter.parts[0].delta
    sources = torch.randn(3, 2, 32)
    delta.set_sources(sources)
    rows = torch.randn(5, 6, 32)
    shares = delta.weights(rows, None)
    assert shares.shape == (5, 4)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(5))
    assert shares.std(dim=0).max() > 1e-3  # by the input
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 4:] = False
    torch.testing.assert_close(delta.weights(rows, mask), delta.weights(rows[:, :4], None))
    wanted = delta.prompt_embeddings + sum(
        shares[:, j, None, None] * prompt for j, prompt in enumerate([*sources, delta.prompt_embeddings])
    )
    torch.testing.assert_close(delta.tokens(rows, None), wanted)
    assert not delta.source_prompts.requires_grad
    with pytest.raises(MethodError) as caught:
        delta.set_sources(sources[:2])
    assert caught.value.findings[0].code == "T155"


def test_attempt_comes_back_with_its_sources(tmp_path):
    model, adapter = ready("t5", Attempt(length=2, sources=3, temperature=1.0))
    adapter.parts[0].delta.set_sources(torch.randn(3, 2, 32))
    wanted = logits_of(model)
    save_adapter(adapter, tmp_path)
    fresh = tiny("t5")
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits_of(fresh), wanted)


def test_layers_and_targets_of_a_prefix():
    model = tiny("t5")
    assert attach(model, PrefixTuning(length=2, targets="cross"), name="a").parameter_count == 2 * 2 * 32 * 2
    assert len(attach(model, PrefixTuning(length=2, targets="encoder/attention,cross"), name="b").parts) == 4
    assert len(attach(model, PrefixTuning(length=2, layers="-1:"), name="c").parts) == 3
    with pytest.raises(MethodError):
        attach(model, PrefixTuning(targets="query"), name="d")
    shared = attach(model, PrefixTuning(length=2, mlp=4), name="e")
    assert sum(name.endswith("mlp.embedding") for name in shared.state()) == 3  # one for each kind of attention


@pytest.mark.parametrize("model_name", ["llama", "t5"])
def test_each_layer_takes_its_own_rows_of_the_shared_network(model_name):
    """All layers of one kind of attention share W_1 and E; the rows of W_2 are laid side by side, each used once."""
    adapter = attach(tiny(model_name), PrefixTuning(length=3, mlp=8))
    kinds = {}
    for part in adapter.parts:
        kinds.setdefault(part.site.stack, []).append(part)
    assert len(kinds) == (3 if model_name == "t5" else 1)
    for parts in kinds.values():
        mlp = parts[0].delta.mlp
        assert all(part.delta.mlp is None for part in parts[1:])
        whole = mlp.last(torch.tanh(mlp.first(mlp.embedding)))
        laid = torch.cat([flat for part in parts for flat in part.delta.flat()], dim=1)
        assert torch.equal(laid, whole) or torch.allclose(laid, whole, atol=1e-6)
        assert laid.shape[1] == mlp.last.out_features
