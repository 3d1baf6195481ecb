"""The ports branch, kv and embed by themselves, with the plainest delta of each: rows, padding, generation, traces."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from conformance.test_rows import assert_close, assert_rows_differ, generate, generated_alone, padded, row_of
from graftlm.core import BranchDelta, EmbedDelta, KeyValueDelta, Method, adapters, attach, use
from graftlm.errors import RoutingError
from graftlm.methods import BitFit, LoRA
from models_for_tests import (
    DECODERS,
    ENCODER_DECODERS,
    MODELS,
    hooks_and_attributes,
    inputs_for,
    logits_of,
    loss_of,
    perturb,
    tiny,
)


class PlainPrefix(KeyValueDelta):
    def __init__(self, site, length):
        super().__init__()
        self.length = length
        self.keys = nn.Parameter(torch.randn(site.kv_heads, length, site.head_width))
        self.values = nn.Parameter(torch.randn(site.kv_heads, length, site.head_width))

    def keys_values(self, x, mask):
        return self.keys, self.values


@dataclass(frozen=True)
class Prefix(Method):
    name = "plain-prefix"
    starts_as_identity = False
    length: int = 3

    def sites(self, survey):
        return list(survey.attentions)

    def build(self, site, module):
        return PlainPrefix(site, self.length)


class PlainPrompt(EmbedDelta):
    def __init__(self, width, length, position):
        super().__init__()
        self.length, self.position = length, position
        self.prompt = nn.Parameter(torch.randn(length, width))

    def tokens(self, embeddings, mask):
        return self.prompt


@dataclass(frozen=True)
class Prompt(Method):
    name = "plain-prompt"
    starts_as_identity = False
    length: int = 4
    position: str = "start"
    stack: str = "encoder"

    def sites(self, survey):
        return [site for site in survey.sequences if site.stack in ("", self.stack) or self.stack == "both"]

    def build(self, site, module):
        return PlainPrompt(site.out_features, self.length, self.position)


class PlainBranch(BranchDelta):
    reads_input = True

    def __init__(self, site):
        super().__init__()
        self.own = nn.Linear(site.in_features, site.out_features)
        self.series = nn.Linear(site.out_features, site.out_features)

    def branch(self, x, y, mask):
        return y + self.own(x) + torch.tanh(self.series(y))


@dataclass(frozen=True)
class Branch(Method):
    name = "plain-branch"
    starts_as_identity = False
    kind: str = "sublayer"

    def sites(self, survey):
        return [site for site in survey.branches if site.kind == self.kind]

    def build(self, site, module):
        return PlainBranch(site)


PORTS = {
    "prefix": Prefix(),
    "prompt": Prompt(),
    "prompt-after-bos": Prompt(2, "after-bos"),
    "prompt-end": Prompt(3, "end"),
    "branch": Branch(),
    "stream": Branch("stream"),
    "all": Prefix(2) + Prompt(2) + Branch() + LoRA(rank=2, targets="all-linear"),
}
PAIRS = [
    (port, model)
    for model in MODELS
    for port in PORTS
    if not (model == "bloom" and port in ("prefix", "stream", "all"))
]
both = pytest.mark.parametrize(("port", "model_name"), PAIRS, ids=[f"{m}-{p}" for p, m in PAIRS])
SPEC = ["p", None, "b", ("p", "b"), "q"]


def with_ports(model_name, port):
    """A model with adapters p and q of a port, q of another size, and b a LoRA."""
    model = tiny(model_name)
    torch.manual_seed(5)
    attach(model, PORTS[port], name="p")
    attach(model, Prompt(1) if "prompt" in port else PORTS[port], name="q")
    perturb(attach(model, LoRA(rank=2, targets="all-linear"), name="b"), seed=2)
    for adapter in adapters(model).values():
        if adapter.name != "b":
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.mul_(0.5)
    return model


def alone(model, batch, spec=SPEC):
    found = []
    for row, choice in enumerate(spec):
        use(model, choice)
        found.append(logits_of(model, row_of(batch, row)))
    return torch.cat(found)


@both
def test_rows_of_a_mixed_batch_equal_the_rows_alone(port, model_name):
    model = with_ports(model_name, port)
    batch = inputs_for(model, rows=len(SPEC))
    batch["input_ids"][:] = batch["input_ids"][:1]
    wanted = alone(model, batch)
    assert not torch.allclose(wanted[0], wanted[1])
    assert not torch.allclose(wanted[0], wanted[3])
    use(model, SPEC)
    assert_close(logits_of(model, batch), wanted)
    use(model, None)
    assert torch.equal(logits_of(model, batch), logits_of(tiny(model_name), batch))


@both
def test_no_trace_is_left(port, model_name):
    model = tiny(model_name)
    logits_of(model)
    traces, plain = hooks_and_attributes(model), logits_of(model)
    adapter = attach(model, PORTS[port])
    changed = logits_of(model)
    assert changed.shape == plain.shape
    assert not torch.allclose(changed, plain)
    adapter.detach()
    assert hooks_and_attributes(model) == traces
    assert torch.equal(logits_of(model), plain)


@pytest.mark.parametrize("model_name", DECODERS)
@pytest.mark.parametrize("port", PORTS)
def test_padding_on_either_side(port, model_name):
    if (port, model_name) not in PAIRS:
        pytest.skip("this model has no such port")
    model = with_ports(model_name, port)
    batch = inputs_for(model, rows=len(SPEC))
    keep = ("input_ids", "attention_mask") if model_name == "bloom" else ("input_ids", "attention_mask", "position_ids")
    left, at_left = padded(batch, "left")
    right, at_right = padded(batch, "right")
    use(model, SPEC)
    found = logits_of(model, {name: left[name] for name in keep})
    wanted = logits_of(model, {name: right[name] for name in keep})
    for row in range(len(SPEC)):
        assert_close(found[row, at_left[row]], wanted[row, at_right[row]])
        use(model, SPEC[row])
        short = {"input_ids": left["input_ids"][row : row + 1, at_left[row]]}
        assert_close(found[row : row + 1, at_left[row]], logits_of(model, short))


@pytest.mark.parametrize("model_name", ["bert", "roberta", "distilbert", "t5", "bart"])
@pytest.mark.parametrize("port", PORTS)
def test_right_padding_of_encoders(port, model_name):
    model = with_ports(model_name, port)
    batch = inputs_for(model, rows=len(SPEC))
    pad = model.config.pad_token_id
    right, at_right = padded(batch, "right", fill=pad)
    given = {name: right[name] for name in ("input_ids", "attention_mask")}
    if "decoder_input_ids" in batch:
        given["decoder_input_ids"] = batch["decoder_input_ids"]
    use(model, SPEC)
    found = logits_of(model, given)
    for row in range(len(SPEC)):
        use(model, SPEC[row])
        short = {"input_ids": right["input_ids"][row : row + 1, at_right[row]]}
        if "decoder_input_ids" in batch:
            short["decoder_input_ids"] = batch["decoder_input_ids"][row : row + 1]
        assert_close(found[row : row + 1], logits_of(model, short))


@pytest.mark.parametrize("model_name", DECODERS)
@pytest.mark.parametrize("port", PORTS)
def test_generation_of_a_left_padded_mixed_batch(port, model_name):
    if (port, model_name) not in PAIRS:
        pytest.skip("this model has no such port")
    model = with_ports(model_name, port)
    batch = inputs_for(model, rows=len(SPEC))
    batch["input_ids"][:] = batch["input_ids"][:1]
    left, places = padded(batch, "left")
    wanted = generated_alone(model, left, SPEC, places)
    assert_rows_differ(wanted)
    use(model, SPEC)
    tokens = left["input_ids"].shape[1]
    assert torch.equal(generate(model, left)[:, tokens:], wanted)
    if port != "prompt-end":  # without a cache, each step puts the prompt behind all that was generated
        assert torch.equal(generate(model, left, use_cache=False)[:, tokens:], wanted)


@pytest.mark.parametrize("model_name", ["llama", "gemma3", "gpt2", "opt", *ENCODER_DECODERS])
@pytest.mark.parametrize("port", ["prefix", "prompt", "branch", "all"])
def test_beams_and_samples_of_a_mixed_batch(port, model_name):
    model = with_ports(model_name, port)
    batch = inputs_for(model, rows=len(SPEC))
    start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    options = {"num_beams": 3}
    wanted = generated_alone(model, batch, SPEC, **options)
    use(model, SPEC)
    assert torch.equal(generate(model, batch, **options)[:, start:], wanted)
    greedy = generated_alone(model, batch, SPEC).repeat_interleave(2, dim=0)
    use(model, SPEC)
    sampled = generate(model, batch, do_sample=True, temperature=1e-4, top_k=0, num_return_sequences=2)
    assert torch.equal(sampled[:, start:], greedy)


@pytest.mark.parametrize("model_name", ENCODER_DECODERS)
@pytest.mark.parametrize("stack", ["encoder", "decoder", "both"])
def test_prompts_of_either_stack_generate_alike_alone_and_mixed(stack, model_name):
    model = tiny(model_name)
    torch.manual_seed(0)
    attach(model, Prompt(3, stack=stack), name="p")
    attach(model, Prompt(1, stack="encoder"), name="q")
    batch = inputs_for(model, rows=3)
    spec = ["p", None, ("p", "q")]
    if model_name == "bart" and stack != "encoder":  # its decoder counts positions by column
        with pytest.raises(RoutingError, match="R116"):
            _mixed(model, batch, spec)
        spec = ["p", "p", "p"]
    assert_close(_mixed(model, batch, spec), alone(model, batch, spec))
    wanted = generated_alone(model, batch, spec)
    use(model, spec)
    assert torch.equal(generate(model, batch), wanted)


def _mixed(model, batch, spec):
    use(model, spec)
    return logits_of(model, batch)


@pytest.mark.parametrize("model_name", ["llama", "gemma2", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("port", PORTS)
def test_checkpointing_gives_the_same_gradients(port, model_name):
    model = with_ports(model_name, port).train()
    use(model, SPEC)
    batch = inputs_for(model, rows=len(SPEC))

    def gradients():
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                parameter.grad = None
        use(model, SPEC)
        loss_of(model, batch).backward()
        return {
            f"{name}/{key}": parameter.grad
            for name, adapter in adapters(model).items()
            for key, parameter in adapter.named_parameters()
        }

    wanted = gradients()
    assert all(gradient is not None for gradient in wanted.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_eager_attention_gives_the_same(model_name):
    model = with_ports(model_name, "all")
    batch = inputs_for(model, rows=len(SPEC))
    use(model, SPEC)
    wanted = logits_of(model, batch)
    model.set_attn_implementation("eager")
    assert_close(logits_of(model, batch), wanted)
    left, _ = padded(batch, "left")
    eager = logits_of(model, left)
    model.set_attn_implementation("sdpa")
    real = left["attention_mask"].bool()
    assert_close(logits_of(model, left)[real], eager[real])


def test_an_interrupt_inside_attention_leaves_the_configuration(monkeypatch):
    model = tiny("llama")
    own = model.config
    attach(model, Prefix())
    place = model.model.layers[0].self_attn.o_proj

    def interrupted(x):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model)
    logits_of(model)
    assert all(layer.self_attn.config is own for layer in model.model.layers)
    assert own._attn_implementation == "sdpa"


def test_a_cache_filled_under_other_prompts_is_refused():
    model = tiny("llama")
    attach(model, Prompt(2), name="p")
    attach(model, LoRA(rank=2), name="b")
    batch = inputs_for(model, rows=2)
    use(model, "p")
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        token = torch.full((2, 1), 7)
        for other in (None, "b"):
            use(model, other)
            with pytest.raises(RoutingError) as caught:
                model(input_ids=token, past_key_values=cache)
            assert caught.value.findings[0].code == "R113"
        use(model, "b")
        bare = model(**batch, use_cache=True).past_key_values
        use(model, "p")
        with pytest.raises(RoutingError):
            model(input_ids=token, past_key_values=bare)


def test_packed_documents_are_refused():
    model = tiny("llama")
    attach(model, Prompt(2))
    ids = inputs_for(model, rows=1)["input_ids"]
    with pytest.raises(RoutingError) as caught, torch.no_grad():
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert caught.value.findings[0].code == "R115"


def test_packed_documents_see_the_prefix_each():
    model = tiny("llama")
    attach(model, Prefix(2))
    ids = inputs_for(model, rows=1)["input_ids"]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False).logits
        parts = [model(input_ids=ids[:, at : at + 3]).logits for at in (0, 3)]
    assert_close(packed, torch.cat(parts, dim=1))


def test_labels_mean_the_rows_own_tokens():
    model = tiny("llama")
    attach(model, Prompt(3))
    batch = inputs_for(model)
    with torch.no_grad():
        output = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    wanted = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert torch.allclose(output.loss, wanted)
    assert {states.shape[1] for states in output.hidden_states} == {6}


def test_zero_biases_are_unaffected_by_the_ports():
    model = tiny("gpt2")
    perturb(attach(model, BitFit(), name="bias"))
    attach(model, Prompt(2), name="p")
    batch = inputs_for(model, rows=2)
    spec = [("bias", "p"), "bias"]
    assert_close(_mixed(model, batch, spec), alone(model, batch, spec))
