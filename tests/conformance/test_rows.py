"""A row computes the same whatever its neighbours: padding, mixed batches, beams, samples, generation."""

from __future__ import annotations

import itertools

import pytest
import torch

from conformance.cases import CASES, Scale, cross, only
from graftlm.core import Method, adapters, attach, use
from graftlm.errors import GraftError, RoutingError
from graftlm.methods import (
    BitFit,
    Full,
    Head,
    LoRA,
    Modules,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SeriesAdapter,
)
from models_for_tests import DECODERS, ENCODER_DECODERS, MODELS, inputs_for, logits_of, perturb, tiny

ROWS = [None, "a", "b", ("a", "b")]


def assert_close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3) < tolerance


def with_two(model_name, first, second):
    """A model with perturbed adapters a and b."""
    model = tiny(model_name)
    for seed, (name, method) in enumerate((("a", first), ("b", second))):
        perturb(attach(model, method, name=name), seed=seed)
    return model


def row_of(batch, row):
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}


def alone(model, batch, spec=ROWS):
    """The logits of each row run alone, with its own adapters for the whole (one-row) batch."""
    found = []
    for row, choice in enumerate(spec):
        use(model, choice)
        found.append(logits_of(model, row_of(batch, row)))
    assert not any(torch.allclose(found[0], other) for other in found[1:])
    return torch.cat(found)


#: What rows of one batch cannot have different adapters in, by what the error names.
REFUSED_TOGETHER = {
    # One entry stands for all rows, and the model itself combines it later.
    **{(case, model): "relative_attention_bias" for case in ("full", "lora+full") for model in ("t5", "t5_gated")},
    ("prompt-both", "bart"): "BartDecoder counts positions by column",
}
#: Rounding in float32 alone is above the bound (1.2e-5 of the largest logit): held to 1e-12 in float64.
IN_FLOAT64 = {("prune+lora", "t5_gated")}


@cross()
def test_a_row_in_a_mixed_batch_equals_the_row_alone(case, model_name):
    model = with_two(model_name, CASES[case], LoRA(rank=2, targets="all-linear"))
    if (case, model_name) in IN_FLOAT64:
        model.double()
    batch = inputs_for(model, rows=4)
    batch["input_ids"][:] = batch["input_ids"][:1]  # equal rows: only the adapters can tell them apart
    wanted = alone(model, batch)
    use(model, ROWS)
    if (case, model_name) in REFUSED_TOGETHER:
        with pytest.raises(RoutingError, match=REFUSED_TOGETHER[case, model_name]):
            logits_of(model, batch)
        return
    assert_close(logits_of(model, batch), wanted, **({"tolerance": 1e-12} if (case, model_name) in IN_FLOAT64 else {}))


@pytest.mark.parametrize("model_name", MODELS)
def test_rows_of_different_text_in_another_order(model_name):
    model = with_two(model_name, LoRA(rank=4, targets="all-linear,embed"), CASES["head"])
    batch = inputs_for(model, rows=5)
    spec = [("b", "a"), "b", None, "a", "b"]
    found = []
    for row, choice in enumerate(spec):
        use(model, choice)
        found.append(logits_of(model, row_of(batch, row)))
    use(model, spec)
    assert_close(logits_of(model, batch), torch.cat(found))


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "t5", "opt"])
def test_scalings_before_and_after_a_map_by_row(model_name):
    model = with_two(model_name, Scale("attention,ffn"), LoRA(rank=2) + Scale("ffn"))
    batch = inputs_for(model, rows=4)
    wanted = alone(model, batch)
    use(model, ROWS)
    assert_close(logits_of(model, batch), wanted)


def padded(batch, side, width=3, fill=0):
    """`batch` with rows of different length: row i keeps all but i mod 3 tokens; padded on `side` to one width more."""
    rows, tokens = batch["input_ids"].shape
    ids = torch.full((rows, tokens + width), fill)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    places = []
    for row in range(rows):
        length = tokens - row % 3
        start = tokens + width - length if side == "left" else 0
        ids[row, start : start + length] = batch["input_ids"][row, :length]
        mask[row, start : start + length] = 1
        positions[row, start : start + length] = torch.arange(length)
        places.append(slice(start, start + length))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, places


@pytest.mark.parametrize("model_name", DECODERS)
@pytest.mark.parametrize("case", ["lora-all", "lora-embed", "full"])
def test_left_padding_equals_right_padding(case, model_name):
    model = with_two(model_name, CASES[case], LoRA(rank=2, targets="all-linear"))
    batch = inputs_for(model, rows=4)
    if model_name == "bloom":
        keep = ("input_ids", "attention_mask")
    else:
        keep = ("input_ids", "attention_mask", "position_ids")
    use(model, ROWS)
    left, at_left = padded(batch, "left")
    right, at_right = padded(batch, "right")
    found = logits_of(model, {name: left[name] for name in keep})
    wanted = logits_of(model, {name: right[name] for name in keep})
    for row in range(4):
        assert_close(found[row, at_left[row]], wanted[row, at_right[row]])
        use(model, ROWS[row])
        short = {"input_ids": left["input_ids"][row : row + 1, at_left[row]]}
        assert_close(found[row : row + 1, at_left[row]], logits_of(model, short))


# --- generation -----------------------------------------------------------------------------------------------------

PLAIN = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate(model, batch, **options):
    given = {name: tensor for name, tensor in batch.items() if name not in ("decoder_input_ids", "position_ids")}
    return model.generate(**given, **{**PLAIN, **options})


def generated_alone(model, batch, spec, places=None, **options):
    found = []
    for row, choice in enumerate(spec):
        use(model, choice)
        ids = row_of(batch, row)["input_ids"]
        ids = ids if places is None else ids[:, places[row]]
        out = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **options)
        found.append(out if model.config.is_encoder_decoder else out[:, ids.shape[1] :])
    return torch.cat(found)


def assert_rows_differ(tokens, copies=1):
    """Adapters must make a difference to what is generated, or the test could not fail."""
    assert len({tuple(row.tolist()) for row in tokens[::copies]}) > 1


@pytest.mark.parametrize("model_name", DECODERS)
@pytest.mark.parametrize("case", ["lora-all", "full"])
def test_greedy_generation_of_a_left_padded_mixed_batch(case, model_name):
    model = with_two(model_name, CASES[case], LoRA(rank=2, targets="all-linear"))
    batch = inputs_for(model, rows=4)
    batch["input_ids"][:] = batch["input_ids"][:1]
    left, places = padded(batch, "left")
    wanted = generated_alone(model, left, ROWS, places)
    assert_rows_differ(wanted)
    use(model, ROWS)
    assert torch.equal(generate(model, left)[:, left["input_ids"].shape[1] :], wanted)
    # ... and without a cache.
    assert torch.equal(generate(model, left, use_cache=False)[:, left["input_ids"].shape[1] :], wanted)


@pytest.mark.parametrize("model_name", DECODERS + ENCODER_DECODERS)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2, "use_cache": False}],
    ids=["beams", "beams-returned", "beams-uncached"],
)
def test_beams_of_a_mixed_batch(model_name, options):
    model = with_two(model_name, LoRA(rank=4, targets="all-linear,head"), LoRA(rank=2, targets="all-linear"))
    batch = inputs_for(model, rows=4)
    wanted = generated_alone(model, batch, ROWS, **options)
    use(model, ROWS)
    found = generate(model, batch, **options)
    start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    assert torch.equal(found[:, start:], wanted)
    use(model, ["b", None, "a", "a"])
    assert not torch.equal(generate(model, batch, **options)[:, start:], wanted)


@pytest.mark.parametrize("model_name", DECODERS + ENCODER_DECODERS)
def test_several_sequences_for_each_row(model_name):
    """With next to no temperature, sampling is greedy: every copy of a row must be the row alone."""
    model = with_two(model_name, LoRA(rank=4, targets="all-linear,head"), LoRA(rank=2, targets="all-linear"))
    batch = inputs_for(model, rows=4)
    wanted = generated_alone(model, batch, ROWS).repeat_interleave(3, dim=0)
    use(model, ROWS)
    found = generate(model, batch, do_sample=True, temperature=1e-4, top_k=0, num_return_sequences=3)
    start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    assert torch.equal(found[:, start:], wanted)


@pytest.mark.parametrize("model_name", ENCODER_DECODERS)
@pytest.mark.parametrize("case", ["lora-all", "lora-embed", "head"])
def test_encoder_decoder_generation_with_mixed_rows(case, model_name):
    model = with_two(model_name, CASES[case], LoRA(rank=2, targets="all-linear"))
    batch = inputs_for(model, rows=4)
    batch["input_ids"][:] = batch["input_ids"][:1]
    wanted = generated_alone(model, batch, ROWS)
    assert_rows_differ(wanted)
    use(model, ROWS)
    assert torch.equal(generate(model, batch), wanted)


def test_one_beam_search_after_another_and_then_a_plain_batch():
    model = with_two("llama", LoRA(rank=4), LoRA(rank=2))
    batch = inputs_for(model, rows=2, tokens=5)
    use(model, ["a", "b"])
    first = generate(model, batch, num_beams=3)
    plain = logits_of(model, batch)
    other = inputs_for(model, rows=2, tokens=3, seed=9)
    generate(model, other, num_beams=2)
    assert torch.equal(generate(model, batch, num_beams=3), first)
    assert torch.equal(logits_of(model, batch), plain)


# --- wrong numbers of rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_a_wrong_number_of_rows_is_refused(model_name, rows):
    model = with_two(model_name, LoRA(rank=2, targets="all-linear"), LoRA(rank=2))
    use(model, ["a", None, "b"])
    logits_of(model, inputs_for(model, rows=3))
    with pytest.raises(RoutingError) as caught:
        logits_of(model, inputs_for(model, rows=rows))
    assert caught.value.findings[0].code in ("R104", "R106")
    logits_of(model, inputs_for(model, rows=3))


@pytest.mark.parametrize("model_name", ["llama", "gpt2", *ENCODER_DECODERS])
def test_generation_of_a_wrong_number_of_rows_is_refused(model_name):
    model = with_two(model_name, LoRA(rank=2, targets="all-linear"), LoRA(rank=2))
    use(model, ["a", "b"])
    with pytest.raises(RoutingError):
        generate(model, inputs_for(model, rows=4))


@pytest.mark.parametrize("model_name", ["llama", "bert", "t5"])
def test_a_wrong_number_of_rows_at_a_part_of_the_model_is_refused(model_name):
    """The backbone or the encoder called by itself, as reward models and encoders for retrieval do."""
    model = with_two(model_name, LoRA(rank=2, targets="all-linear"), LoRA(rank=2))
    use(model, ["a", "b"])
    batch = inputs_for(model, rows=4)
    batch.pop("decoder_input_ids", None)
    inner = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with pytest.raises(RoutingError), torch.no_grad():
        inner(**batch)


def test_one_token_rows_after_a_beam_search_are_counted_again():
    model = with_two("llama", LoRA(rank=2), LoRA(rank=2))
    use(model, ["a", "b"])
    generate(model, inputs_for(model, rows=2), num_beams=3)
    with pytest.raises(RoutingError):
        logits_of(model, inputs_for(model, rows=6, tokens=1))


def test_one_row_for_several_choices_is_refused():
    model = with_two("gpt2", Full(), Full())
    use(model, ["a", "b"])
    with pytest.raises(RoutingError):
        logits_of(model, inputs_for(model, rows=1))


@pytest.mark.parametrize("case", only("full", "modules-embed", "layers"))
def test_a_batch_of_one_row_with_one_choice(case):
    model = with_two("gpt2", CASES[case], LoRA(rank=2))
    batch = inputs_for(model, rows=1)
    use(model, "a")
    wanted = logits_of(model, batch)
    use(model, ["a"])
    assert_close(logits_of(model, batch), wanted)


@pytest.mark.parametrize("model_name", [name for name in MODELS if name != "llama_classifier"])  # pools by the ids
def test_embeddings_given_instead_of_ids(model_name):
    model = with_two(model_name, LoRA(rank=2, targets="all-linear"), LoRA(rank=2))
    batch = inputs_for(model, rows=4)
    use(model, ROWS)
    wanted = logits_of(model, batch)
    ids = batch.pop("input_ids")
    with torch.no_grad():
        batch["inputs_embeds"] = model.get_input_embeddings()(ids)
    assert_close(logits_of(model, batch), wanted)
    if not model.config.is_encoder_decoder:
        batch = {name: tensor[:3] for name, tensor in batch.items()}
        with pytest.raises(RoutingError):
            logits_of(model, batch)


def test_rows_given_by_position():
    model = with_two("llama", LoRA(rank=2), LoRA(rank=2))
    batch = inputs_for(model, rows=4)
    use(model, ROWS)
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"]).logits, logits_of(model, batch))
        with pytest.raises(GraftError):
            model(batch["input_ids"][:3])
    assert len(adapters(model)) == 2


def test_heads_of_different_widths_in_one_batch_are_refused():
    model = tiny("bert")
    attach(model, Head(outputs=5), name="five")
    batch = inputs_for(model, rows=2)
    assert logits_of(model, batch).shape == (2, 5)
    use(model, ["five", None])
    with pytest.raises(RoutingError) as caught:
        logits_of(model, batch)
    assert caught.value.findings[0].code == "R117"


#: A method at each port, in two sizes.
PORTS: dict[str, tuple[Method, Method]] = {
    "linear": (LoRA(rank=2, targets="output"), LoRA(rank=3, targets="embed")),
    "branch": (SeriesAdapter(width=3), ParallelAdapter(width=5)),
    "kv": (PrefixTuning(length=2, layers="0"), PrefixTuning(length=3, layers="1")),
    "embed": (PromptTuning(length=2, start="uniform"), PTuning(length=3)),
    "param": (BitFit(), Modules("norm")),
}
#: The ports at which nothing can act there.
CLOSED = {"bloom": {"kv", "branch"}}


@pytest.mark.parametrize("model_name", MODELS)
def test_sums_of_every_pair_of_ports_take_no_notice_of_padding(model_name):
    """All rows with the same sum in one padded batch, against each row alone without padding."""
    model = tiny(model_name)
    full = inputs_for(model, rows=3)
    batch, at = padded(full, "right")
    batch.pop("position_ids")
    classifier = logits_of(model).dim() == 2
    if "decoder_input_ids" in full:
        batch["decoder_input_ids"] = full["decoder_input_ids"]
    for one, other in itertools.combinations_with_replacement(PORTS, 2):
        if {one, other} & CLOSED.get(model_name, set()):
            continue
        adapter = attach(model, PORTS[one][0] + PORTS[other][1])
        perturb(adapter)
        found = logits_of(model, batch)
        for row, place in enumerate(at):
            short = {"input_ids": batch["input_ids"][row : row + 1, place]}
            if "decoder_input_ids" in full:
                short["decoder_input_ids"] = full["decoder_input_ids"][row : row + 1]
            whole = classifier or "decoder_input_ids" in full
            wanted = logits_of(model, short)[0]
            assert_close(found[row] if whole else found[row, place], wanted)
        adapter.detach()
