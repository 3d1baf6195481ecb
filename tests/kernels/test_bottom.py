"""What frozen blocks make of rows, kept: the same losses and gradients, and what cannot be kept is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.core import attach
from graftlm.errors import RunError
from graftlm.kernels import FrozenBottom, bottom_of, fuse
from graftlm.methods import Full, Head, Last, LoRA, PrefixTuning, PromptTuning, SeriesAdapter
from models_for_tests import MODELS, hooks_and_attributes, inputs_for, perturb, tiny

#: Encoder-decoders, and a model whose blocks hand on their attention weights.
_OTHERS = {"t5", "t5_gated", "bart", "bloom"}
_TOP = {"layers": "-1", "targets": "all-linear"}


def refusal(model: nn.Module) -> str:
    with pytest.raises(RunError) as caught:
        bottom_of(model)
    (finding,) = caught.value.findings
    assert finding.code == "U171"
    assert finding.fix
    return finding.message


def losses_and_gradients(
    model: Any, adapter: Any, batches: list[dict[str, Tensor]]
) -> list[tuple[Tensor, list[Tensor]]]:
    found = []
    for batch in batches:
        for parameter in adapter.parameters():
            parameter.grad = None
        output = model(**batch)
        real = batch["attention_mask"].bool() if output.logits.dim() == 3 else slice(None)
        loss = output.logits[real].square().mean()
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in adapter.parameters()]))
    return found


def batches_of(model: Any) -> list[dict[str, Tensor]]:
    """Three rows of other lengths, as they come in three passes: in other company and with other padding."""
    ids = inputs_for(model, rows=3, tokens=6)["input_ids"].clamp(min=5)
    lengths, pad = [6, 4, 3], int(model.config.pad_token_id or 0)

    def batch(*rows: int, wide: int = 0) -> dict[str, Tensor]:
        width = max([lengths[row] for row in rows] + [wide])
        mask = torch.arange(width) < torch.tensor([[lengths[row]] for row in rows])
        filled = torch.cat([ids, ids.new_full((3, 4), pad)], dim=1)[list(rows), :width]
        return {"input_ids": torch.where(mask, filled, pad), "attention_mask": mask.long()}

    return [batch(0, 1), batch(2), batch(2, 1), batch(1, wide=8), batch(0, 2, 1)]


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in _OTHERS])
def test_kept_states_change_nothing(name: str, recompute: Any, tmp_path: Path) -> None:
    model = tiny(name).train()
    adapter = attach(model, LoRA(rank=2, **_TOP))
    perturb(adapter)
    traces = hooks_and_attributes(model)
    batches = batches_of(model)
    wanted = losses_and_gradients(model, adapter, batches)
    paths = bottom_of(model)
    assert len(paths) == 1
    calls: list[int] = []
    first = model.get_submodule(paths[0])
    inner = next(module for module in first.modules() if not list(module.children()))
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    with fuse(model, recompute=recompute), FrozenBottom(model, paths, tmp_path) as bottom:
        found = []
        for batch in batches:
            before = len(calls)
            found += losses_and_gradients(model, adapter, [batch])
            calls[before:] = [len(calls) - before]
        with torch.no_grad():
            model(**batches[0])  # not served
    handle.remove()
    assert [count > 0 for count in calls[:5]] == [True, True, True, False, False]  # the third is compared
    assert len(calls) > 5
    assert (bottom.computed, bottom.read) == (3, 4)
    assert not list(tmp_path.iterdir())
    for (loss, gradients), (own_loss, own) in zip(wanted, found, strict=True):
        torch.testing.assert_close(own_loss, loss, atol=1e-6, rtol=1e-5)
        for a, b in zip(own, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    if recompute == "none":  # checkpointing leaves words of its own in blocks
        assert hooks_and_attributes(model) == traces


def test_other_positions_and_types_are_other_rows(tmp_path: Path) -> None:
    model = tiny("llama").train()
    attach(model, LoRA(rank=2, **_TOP))
    batch = inputs_for(model, rows=2, tokens=6)
    batch.pop("labels", None)
    with FrozenBottom(model, bottom_of(model), tmp_path) as bottom:
        for start in (0, 3, 0):
            model(**batch, position_ids=torch.arange(start, start + 6)[None])
        assert (bottom.computed, bottom.read) == (4, 0)
        model(**batch, position_ids=torch.arange(3, 9)[None])
        assert (bottom.computed, bottom.read) == (4, 2)
        model(inputs_embeds=torch.randn(2, 6, 32))
        assert (bottom.computed, bottom.read) == (4, 2)
        wider = {name: nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
        model(**wider, position_ids=torch.arange(9)[None])
        assert (bottom.computed, bottom.read) == (4, 4)


def test_states_that_are_drawn_at_random_are_found_out(tmp_path: Path) -> None:
    model = tiny("llama").train()
    attach(model, LoRA(rank=2, **_TOP))
    block = model.model.layers[0]
    block.mlp.act_fn.forward = lambda x: nn.functional.dropout(nn.functional.silu(x), 0.5)
    batch = inputs_for(model)
    with FrozenBottom(model, bottom_of(model), tmp_path):
        model(**batch)
        with pytest.raises(RunError, match="differs from pass to pass"):
            model(**batch)


def test_blocks_that_hand_more_on_are_refused(tmp_path: Path) -> None:
    model = tiny("bloom").train()
    attach(model, LoRA(rank=2, **_TOP))
    with FrozenBottom(model, bottom_of(model), tmp_path), pytest.raises(RunError, match="hands more than states"):
        model(**inputs_for(model))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoRA(rank=2), "acts in the first block"),
        (LoRA(rank=2, layers=0), "acts in the first block"),
        (PrefixTuning(length=2), "acts in the first block"),
        (PromptTuning(length=2), "outside the blocks"),
        (LoRA(rank=2, targets=["embed"]), "outside the blocks"),
        (SeriesAdapter(), "acts in the first block"),
        (Full(), "first block|outside the blocks"),
    ],
    ids=str,
)
def test_nothing_below_is_refused(method: Any, said: str) -> None:
    import re

    model = tiny("llama")
    attach(model, method)
    assert re.search(said, refusal(model))


def test_bases_whose_blocks_draw_or_are_several_rows_are_refused() -> None:
    model = tiny("bert")
    model.bert.embeddings.dropout.p = 0.1
    attach(model, LoRA(rank=2, **_TOP))
    assert "bert.embeddings.dropout drops entries at random" in refusal(model)
    model.bert.embeddings.dropout.p = 0.0
    model.bert.encoder.layer[1].output.dropout.p = 0.1  # above
    assert bottom_of(model) == ["bert.encoder.layer.0"]
    model = tiny("t5")
    attach(model, LoRA(rank=2, layers="-1", targets="all-linear"))
    assert "no single row of blocks" in refusal(model)


@pytest.mark.parametrize("method", [Head(), Last(1), LoRA(rank=2, layers="-1") + Head()], ids=str)
def test_heads_and_last_layers_lie_above(method: Any) -> None:
    model = tiny("llama_classifier")
    attach(model, method)
    assert bottom_of(model)[0] == "model.layers.0"
