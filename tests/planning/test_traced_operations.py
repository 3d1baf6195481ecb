"""Operations as plain values: made again they give what they gave, and smaller ones have the work that is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graftlm.kernels.attention import block_shapes, blocked_attention
from graftlm.planning import asked
from graftlm.planning.memory import workspace_bytes
from graftlm.planning.operations import BLOCKED, FUSED_BACKWARD, Operation, again, forward_of, smaller
from models_for_tests import tiny

aten = torch.ops.aten


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_every_operation_of_a_step_can_be_made_again(name: str, dtype: str, quantize: str | None) -> None:
    """But those that depend on values: how many labels are read, and what one of them is."""
    task = "classify" if name == "bert" else "lm"
    step = asked(tiny(name).config, "prefix(length=4)+lora(rank=2)", dtype=dtype, quantize=quantize, batch=2, length=16,
                 task=task)  # fmt: skip
    failed = []
    for found in step.plan().traced.operations.values():
        for one in found:
            try:
                again(one, "cpu")()
            except Exception as error:
                failed.append((one.name, str(error)[:200]))
    by_value = {"aten._local_scalar_dense.default", "aten.promote_types.default", "aten.index.Tensor"}
    by_value |= {"aten.mm.default", "aten._unsafe_view.default", "aten.empty.memory_format"}  # of no rows
    assert [each for each in failed if each[0] not in by_value] == []
    assert len(failed) < 6, failed


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.mm.default, (torch.ones(3, 4), torch.ones(5, 4).t()), {}),
        (aten.add.Tensor, (torch.ones(2, 1, 4), torch.ones(3, 1)), {"alpha": 2}),
        (aten.cat.default, ([torch.ones(2, 3), torch.ones(4, 3)], 0), {}),
        (aten._to_copy.default, (torch.ones(2, 3).t(),), {"dtype": torch.bfloat16}),
        (aten.masked_fill.Scalar, (torch.ones(3, 3), torch.zeros(3, 3, dtype=torch.bool), float("-inf")), {}),
        (aten.embedding.default, (torch.ones(7, 3), torch.zeros(2, 4, dtype=torch.long)), {}),
    ],
)
def test_what_is_made_again_is_the_same(func: Any, args: Any, kwargs: Any) -> None:
    expected = func(*args, **kwargs)
    found = again(Operation.of(func, args, kwargs), "cpu")()
    assert torch.equal(found, expected)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())


def test_smaller_has_the_work_that_is_told() -> None:
    x = torch.empty(4, 2048, 512, device="meta")
    less, share = smaller(Operation.of(aten.mul.Tensor, (x, x), {}), 1e9, 4e6)
    sizes = [each["t"] for each in json.loads(less.given)[0]]
    assert sizes[0] == sizes[1]
    assert share == 4 * 2048 * 512 / torch.Size(sizes[0]).numel() >= 12
    same, one = smaller(less, 1e9, 4e6)
    assert (same, one) == (less, 1.0)


def test_attention_is_made_smaller_by_rows_first() -> None:
    q, k = torch.empty(8, 8, 256, 32, device="meta"), torch.empty(8, 4, 256, 32, device="meta")
    whole = Operation.of(aten._scaled_dot_product_flash_attention_for_cpu.default, (q, k, k, 0.0, True), {})
    less, share = smaller(whole, 2e8, 1e9)
    assert [each["t"] for each in json.loads(less.given)[0][:3]] == [[2, 8, 256, 32], [2, 4, 256, 32], [2, 4, 256, 32]]
    assert share == 4
    back = Operation(FUSED_BACKWARD, json.dumps([[*json.loads(whole.given)[0][:1]] * 5 + [None, 0.0, True], {}]))
    assert forward_of(whole) is None
    assert forward_of(back).name == whole.name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rows", "tokens", "causal"), [(2, 512, True), (4, 512, True), (1, 100, False), (8, 256, True)]
)
def test_blocks_have_so_many_shapes(rows: int, tokens: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.ones(rows, 8, tokens, 32, dtype=torch.bfloat16), torch.ones(rows, 4, tokens, 32, dtype=torch.bfloat16)
    seen, real = set(), torch.bmm

    def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.add((a.shape, b.shape))
        return real(a, b)

    monkeypatch.setattr(torch, "bmm", bmm)
    blocked_attention(q, k, k, 0.2, causal)
    assert len(seen) == 2 * block_shapes(q, k, causal)  # scores and weighted sum


def test_code_of_products_is_counted_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    kind = {"dtype": torch.bfloat16, "device": "meta"}
    products = [
        Operation.of(aten.mm.default, (torch.empty(rows, 64, **kind), torch.empty(64, 64, **kind)), {})  # type: ignore[call-overload]
        for rows in (8, 16, 24)
    ]
    q = torch.empty(2, 4, 128, 16, **kind)  # type: ignore[call-overload]
    attention = Operation.of(aten._scaled_dot_product_flash_attention_for_cpu.default, (q, q, q, 0.0, True), {},
                             name=BLOCKED)  # fmt: skip
    none, one, three, with_attention = (
        workspace_bytes(each) for each in ([], products[:1], products, [*products, attention])
    )
    assert none < one < three < with_attention
    assert three - one == 2 * 550_000
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert workspace_bytes(products) == none
