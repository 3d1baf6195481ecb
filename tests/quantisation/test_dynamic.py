"""Inputs in 8 bits: exact sums of whole numbers, rows that know nothing of one another, the same by numbers alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graftlm import attach, load_base
from graftlm.methods import IA3, BitFit, DoRA, LoRA, PrefixTuning, SeriesAdapter, Sparse
from graftlm.quantisation import Format, QuantizedLinear, dynamic, linear
from graftlm.quantisation.dynamic import multiplied_in_integers, multiply, rounded, rounded_as_numbers

needs_integers = pytest.mark.skipif(
    not multiplied_in_integers("cpu"), reason="this processor multiplies bytes no faster than numbers (no VNNI, no AMX)"
)


def test_a_row_is_rounded_to_the_nearest_of_256_steps_over_its_own_range():
    x = torch.randn(50, 33) * torch.logspace(-6, 6, 50)[:, None] + 0.3
    codes, size, zero = rounded(x)
    assert codes.dtype == torch.uint8
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    assert torch.allclose(size, (high - low) / 255)
    assert torch.equal(codes.amin(1), torch.where(x.amin(1) <= 0, 0, codes.amin(1)))
    again = (codes.double() - zero) * size
    # The zero is a step, so that a range is met at one end to half a step, and an entry to a step and a half at most.
    assert ((again - x).abs() <= 1.0001 * size).all()
    assert ((again - x).abs() <= 0.5001 * size)[(codes > 0) & (codes < 255)].all()
    assert torch.equal(rounded_as_numbers(x), again.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_stay_zeros(dtype):
    x = torch.randn(4, 20).to(dtype)
    x[1], x[2, ::2] = 0, 0
    assert torch.equal(rounded_as_numbers(x) == 0, x == 0)
    assert torch.equal(rounded_as_numbers(torch.full((1, 5), 3.0)), torch.full((1, 5), 3.0))
    assert torch.equal(rounded_as_numbers(torch.full((1, 5), -3.0)), torch.full((1, 5), -3.0))


@needs_integers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_the_definition(dtype, monkeypatch):
    monkeypatch.setattr(dynamic, "_ROWS_AT_ONCE", 8)  # several, the last one short
    packed = Format("int8-dynamic").pack(torch.randn(70, 96))
    x = (torch.randn(21, 96) + 1).to(dtype)
    codes, size, zero = rounded(x)
    wanted = (codes.double() - zero) @ packed["weight"].double().T * size * (packed["sizes"].double() / 127)
    found = multiply(x, packed["weight"], packed["sizes"], packed["sums"])
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, rtol={torch.float32: 1e-6}.get(dtype, 4e-3), atol=1e-5)
    for row in (0, 8, 20):  # no row depends on another, in any bit
        alone = multiply(x[row : row + 1], packed["weight"], packed["sizes"], packed["sums"])
        assert torch.equal(alone[0], found[row])


@needs_integers
def test_sums_of_the_longest_rows_are_exact():
    codes = torch.full((1, dynamic.LONGEST), 127, dtype=torch.int8)
    x = torch.full((1, dynamic.LONGEST), 1.0)
    found = multiply(x, codes, torch.ones(1), codes.sum(1, dtype=torch.int32))
    assert found.item() == pytest.approx(dynamic.LONGEST, rel=1e-6)


def test_numbers_alone_give_the_same(monkeypatch):
    module = QuantizedLinear.of(nn.Linear(96, 70), Format("int8-dynamic"))
    x = torch.randn(3, 7, 96)
    found = module(x)
    monkeypatch.setattr(dynamic, "multiplied_in_integers", lambda _: False)
    assert torch.allclose(found, module(x), rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(dynamic, "LONGEST", 95)
    assert torch.allclose(found, module(x), rtol=1e-5, atol=1e-5)


@needs_integers
def test_forward_dequantises_nothing(monkeypatch):
    module = QuantizedLinear.of(nn.Linear(64, 32), Format("int8-dynamic"))
    x = torch.randn(2, 64, requires_grad=True)
    monkeypatch.setattr(linear, "_slabs", None)
    y = module(x)
    monkeypatch.undo()
    y.sum().backward()
    assert torch.allclose(x.grad, module.dense_weight().sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(bad):
    module = QuantizedLinear.of(nn.Linear(64, 32), Format("int8-dynamic"))
    x = torch.randn(5, 64)
    wanted = module(x)
    x[2, 7] = bad
    found = module(x)
    assert not found[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], wanted[others])


def test_a_few_rows_of_bfloat16_are_multiplied_with_bytes_as_they_are(monkeypatch):
    module = QuantizedLinear.of(nn.Linear(256, 96), Format("int8")).to(torch.bfloat16)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    wanted = x.double() @ module.dense_weight().double().T + module.bias.double()
    kept = linear._slabs
    monkeypatch.setattr(linear, "_slabs", None)
    found = module(x)
    assert found.dtype == torch.bfloat16
    monkeypatch.setattr(linear, "_slabs", kept)
    error = (found - wanted).norm() / wanted.norm()
    monkeypatch.setattr(linear, "_FEW_ROWS", 0)
    assert error <= 1.2 * (module(x) - wanted).norm() / wanted.norm()


def test_a_base_says_nearly_what_it_said_and_rows_are_told_alone():
    plain, tokenizer = load_base("bundled")
    model, _ = load_base("bundled", quantize="int8-dynamic")
    batch = tokenizer(["The ship lay in the harbour, and the", "Once upon a time"], padding=True, return_tensors="pt")
    with torch.no_grad():
        one, other = plain(**batch).logits, model(**batch).logits
    seen = batch["attention_mask"].bool()
    apart = nn.functional.kl_div(other[seen].log_softmax(-1), one[seen].softmax(-1), reduction="batchmean")
    assert 0 < apart < 0.02
    words = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert words.shape[1] == batch["input_ids"].shape[1] + 5


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4, targets="all-linear"),
        DoRA(rank=4),
        IA3(),
        SeriesAdapter(),
        PrefixTuning(),
        BitFit(),
        Sparse(fraction=0.01),
    ],
    ids=str,
)
def test_methods_learn_beside_it(method):
    model, tokenizer = load_base("bundled", quantize="int8-dynamic")
    trained = list(attach(model, method).parameters())
    batch = tokenizer("The sea was calm, and the wind came from the west.", return_tensors="pt")
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
