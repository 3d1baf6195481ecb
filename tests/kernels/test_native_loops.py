"""The loops of native.c give what PyTorch gives, at all sizes and for what is no number; without them all works too."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels import native
from graftlm.kernels.head import _losses_of
from graftlm.kernels.linear import add_dropped, dropped
from graftlm.kernels.native import loops_for, why_not, without_loops

KINDS = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not())


def near(found: Tensor, wanted: Tensor) -> None:
    close = 2e-6 if found.dtype == torch.float32 else 1e-2
    assert found.dtype == wanted.dtype
    assert float((found.double() - wanted.double()).norm()) <= close * float(wanted.double().norm())


def loops(kind: torch.dtype) -> Any:
    found = loops_for(torch.empty(0, dtype=kind))
    assert found is not None
    return found


def drawn(at: Tensor, seed: int) -> Tensor:
    """What `drawn` of native.c gives, in whole numbers of 64 bits."""
    low, high, whole = seed & 0xFFFFFFFF, seed >> 32, 0xFFFFFFFF
    h = ((at ^ low) * 0x9E3779B9 + high) & whole
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & whole
    h = ((h ^ (h >> 16) ^ high) * 0x9E3779B9) & whole
    return h ^ (h >> 15)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (70, 4096 // 16 + 5), (130, 64)])
def test_dropout_is_a_function_of_seed_and_place(kind: torch.dtype, shape: tuple[int, int]) -> None:
    x, y, share = torch.randn(shape).to(kind), torch.randn(shape).to(kind), 0.3
    for seed in (0, 5, 2**61 + 12345678901):
        limit, half = round(share * 2**16), (x.numel() + 1) // 2
        numbers = drawn(torch.arange(half), seed)
        kept = torch.cat([numbers & 0xFFFF, (numbers >> 16)[: x.numel() - half]]).view(shape) >= limit
        times = torch.tensor(1 / (1 - limit / 2**16))
        wanted = torch.where(kept, x.float() * times, 0).to(kind)
        assert torch.equal(dropped(x, share, seed), wanted)
        own = y.clone()
        add_dropped(own, x, share, seed)
        near(own, (y.float() + torch.where(kept, x.float() * times, 0)).to(kind))


@needs_compiler
def test_drawn_numbers_look_drawn() -> None:
    seeds, n = range(0, 2**62, 2**62 // 40), 4096
    kept = torch.stack([dropped(torch.ones(n), 0.1, seed) > 0 for seed in seeds]).float()
    by_place, by_seed = 1 - kept.mean(0), 1 - kept.mean(1)
    assert float(by_seed.mean()) == pytest.approx(0.1, abs=0.003)
    assert float(by_seed.std()) == pytest.approx((0.09 / n) ** 0.5, rel=0.4)  # binomial
    assert float(by_place.std()) == pytest.approx((0.09 / len(kept)) ** 0.5, rel=0.1)
    centred = kept - kept.mean()
    for lag in (1, 2, 16, 768, 2048):  # neighbours, and the same place of the next token
        assert abs(float((centred[:, lag:] * centred[:, :-lag]).mean()) / 0.09) < 0.012
    assert abs(float((centred[1:] * centred[:-1]).mean()) / 0.09) < 0.012  # neighbouring seeds


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "width"), [(1.0, 5), (1.0, 2048), (0.3, 5003)])
def test_losses(kind: torch.dtype, scale: float, width: int) -> None:
    logits, labels = (9 * torch.randn(7, width)).to(kind), torch.randint(width, (7, 1))
    logits[2, labels[2]] = 40  # sure of it
    logits[3] -= 1000
    own, other = logits.clone(), logits.clone()
    found = _losses_of(own, labels, scale, None, True)
    wide = logits.float().requires_grad_()
    wanted = F.cross_entropy(scale * wide, labels[:, 0], reduction="none")
    wanted.sum().backward()
    torch.testing.assert_close(found, wanted.detach(), rtol=2e-6, atol=1e-5)
    near(own, wide.grad.to(kind))
    torch.testing.assert_close(_losses_of(other, labels, scale, None, False), found)
    assert torch.equal(other, logits)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_of_large_scores(kind: torch.dtype, masked: bool) -> None:
    scores = (300 * torch.randn(6, 41)).to(kind)
    mask = torch.rand(6, 41) > 0.5
    mask[:, 0] = True
    wanted = torch.softmax(scores.float().masked_fill(~mask & masked, -torch.inf), -1).to(kind)
    own = scores.clone()
    loops(kind).softmax(own, 6, 41, 6, -1, 1.0, mask if masked else None, 6, 0, 41)
    near(own, wanted)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_so(kind: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.randn(3, 50).to(kind)
        logits[1, 4] = bad
        found = _losses_of(logits, torch.zeros(3, 1, dtype=torch.long), 1.0, None, True)
        assert found.isfinite().tolist() == [True, False, True]
        scores = torch.randn(3, 50).to(kind)
        scores[1, 4] = bad
        loops(kind).softmax(scores, 3, 50, 3, -1, 0.5, None, 1, 0, 0)
        assert not bool(scores[1].isfinite().all())
        assert bool(scores[[0, 2]].isfinite().all())
        x = torch.randn(3, 50).to(kind)
        x[1, 4] = bad
        assert not bool(dropped(x, 0.5, 1)[1, 4].isfinite()) or float(dropped(torch.ones_like(x), 0.5, 1)[1, 4]) == 0
        out = torch.empty_like(x)
        loops(kind).gated(x, x, out, x.numel(), 0)
        assert out.isfinite().sum() == x.numel() - 1


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_non_linearities_far_out(kind: torch.dtype) -> None:
    x = torch.tensor([-1000.0, -90, -20, -5, -1, -1e-3, 0, 1e-3, 1, 5, 20, 90, 1000]).to(kind)
    for number, own in enumerate((F.silu, lambda z: F.gelu(z, approximate="tanh"))):
        wide, out, up = x.double().requires_grad_(), torch.empty_like(x), torch.full_like(x, 3)
        loops(kind).gated(x, up, out, x.numel(), number)
        y = own(wide) * 3
        torch.testing.assert_close(out, y.detach().to(kind), rtol=1e-5 if kind == torch.float32 else 1e-2, atol=1e-6)
        above, to_up = torch.full_like(x, 2), torch.empty_like(x)
        loops(kind).gated_back(above, x, up, to_up, x.numel(), number)
        (slope,) = torch.autograd.grad(y.sum(), wide)
        torch.testing.assert_close(above, (2 * slope).to(kind), rtol=1e-5 if kind == torch.float32 else 1e-2, atol=2e-5)


@needs_compiler
def test_threads_change_nothing() -> None:
    x = torch.randn(257, 301)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scores, logits = x.clone(), x.clone()
            loops(torch.float32).softmax(scores, 257, 301, 257, 10, 0.5, None, 1, 0, 0)
            losses = _losses_of(logits, torch.arange(257)[:, None], 1.0, None, True)
            found.append((scores, logits, losses, dropped(x, 0.2, 9)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_they_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3)
    with without_loops():
        assert loops_for(x) is None
    monkeypatch.setenv("GRAFTLM_NATIVE", "0")
    assert loops_for(x) is None
    assert "GRAFTLM_NATIVE" in why_not()


def test_other_types_and_devices_have_none() -> None:
    assert loops_for(torch.randn(3, dtype=torch.float64)) is None
    assert loops_for(torch.randn(3), torch.randn(3, dtype=torch.bfloat16)) is None
    assert loops_for(torch.empty(3, device="meta")) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_machine_without_a_working_compiler_trains_all_the_same(compiler: str, tmp_path: Path) -> None:
    code = (
        "import torch; from graftlm.kernels.native import loops_for, why_not\n"
        "from graftlm.kernels.linear import dropped\n"
        "assert loops_for(torch.ones(3)) is None\n"
        "assert dropped(torch.ones(100), 0.5, 1).unique().numel() == 2\n"
        "print(why_not())"
    )
    environment = {"CC": compiler, "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    environment["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert compiler in done.stdout
    assert not list((tmp_path / "graftlm").iterdir())


@needs_compiler
def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = native._library.__wrapped__
    assert fresh()[0] is not None
    (built,) = (tmp_path / "graftlm").iterdir()
    made = built.stat().st_mtime_ns
    assert fresh()[0] is not None
    assert [each.stat().st_mtime_ns for each in (tmp_path / "graftlm").iterdir()] == [made]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_large_memory_is_given_back_when_it_is_freed() -> None:
    code = """
import torch
from pathlib import Path
from graftlm import LoRA, attach
from graftlm.kernels import fuse
from models_for_tests import tiny

model = tiny("llama")
attach(model, LoRA(rank=2))
FUSE
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

for _ in range(2):  # once freed, as much is held on to the next time
    before = resident()
    large = torch.ones(5 * 2**20)
    assert resident() - before > 15 * 2**20
    del large
print((resident() - before) // 2**20)
"""

    def held(fuse: str) -> int:
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_ARENA_MAX": "1"}
        words = [sys.executable, "-c", code.replace("FUSE", fuse)]
        return int(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)

    assert held("fuse(model)") <= 1
    assert held("") >= 15
