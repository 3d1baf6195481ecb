"""Methods that take part in training: rates of their own, a penalty, a word after each step, data first, baking."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from graftlm.core import Adapter, LinearDelta, Method, Part, Samples, Site, Survey, adapters, attach
from graftlm.errors import AdapterError, MethodError, RunError, SettingsError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import METHODS, Head, LoRA, read_method
from graftlm.models import bundled_base, load_base, load_tokenizer
from graftlm.objectives import CausalLM
from graftlm.training import GraftTrainer, open_adapter
from graftlm.training.decisions import decide_learning_rate, decide_learning_rates, positions_taken, title_of, with_head
from training.test_checkpoints import seen, stopped
from training.test_objectives import prepared, trained
from training.tiny_runs import Tiny, adapter_bytes, metrics_of, record_of, save_llama, texts


class ChosenDelta(LinearDelta):
    """Shifts the chosen outputs of a map: y[index] += value * scale (scale is baked into value on saving)."""

    sizes_from_state: ClassVar[bool] = True

    def __init__(self, count: int, baked: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(count))
        self.scale = None if baked else nn.Parameter(torch.ones(1))
        self.register_buffer("index", torch.zeros(count, dtype=torch.int32))
        if not baked:
            self.register_buffer("moved", torch.zeros(count))

    def adopt(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.value = nn.Parameter(torch.empty(shapes["value"]))
        self.index = torch.empty(shapes["index"], dtype=torch.int32)
        if "moved" in shapes:
            self.moved = torch.empty(shapes["moved"])

    def after(self, y: Tensor) -> Tensor:
        value = self.value if self.scale is None else self.value * self.scale
        return y.index_add(-1, self.index, value.to(y.dtype).expand(*y.shape[:-1], -1))


@dataclass(frozen=True)
class Chosen(Method):
    """Shift those outputs that are largest over the samples."""

    name: ClassVar[str] = "chosen"
    title: ClassVar[str] = "Chosen"
    share: float = 0.1
    weight: float = 0.0
    baked: bool = False

    needs_samples = True

    def sites(self, survey: Survey) -> list[Site]:
        return survey.select("query,value")

    def build(self, site: Site, module: nn.Module) -> ChosenDelta:
        del module
        return ChosenDelta(1, self.baked)

    def measure(self, model: nn.Module, sites: Sequence[Site], samples: Samples) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(site: Site) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                del module, args
                found[site.path] = found.get(site.path, 0) + output.detach().abs().sum((0, 1))

            return model.get_submodule(site.path).register_forward_hook(hook)

        handles = [keep(site) for site in sites]
        losses = [float(samples.loss(model, batch).detach()) for batch in samples.batches]
        assert model(**next(iter(samples.batches))).loss is not None  # the batches are what the model is called with
        assert all(loss > 0 for loss in losses)
        for handle in handles:
            handle.remove()
        return found

    def apply_measured(self, parts: Sequence[Part], measured: dict[str, Tensor], model: nn.Module) -> None:
        del model
        for part in parts:
            score = measured[part.site.path]
            count = max(2, int(self.share * len(score)))
            part.delta.adopt(dict.fromkeys(("value", "index", "moved"), (count,)))
            with torch.no_grad():
                part.delta.value.zero_()
                part.delta.moved.zero_()
                part.delta.index.copy_(score.topk(count).indices)

    def learning_rate_factor(self, parameter: str) -> float:
        return 0.5 if parameter == "scale" else 1.0

    def penalty(self, parts: Sequence[Part]) -> Tensor | None:
        return self.weight * sum(((part.delta.value - 1) ** 2).sum() for part in parts) if self.weight else None

    def after_step(self, parts: Sequence[Part], step: int, total: int) -> None:
        for part in parts:
            delta = part.delta
            assert 1 <= step <= total
            delta.moved += delta.value.grad.abs()
            if step == total // 2:  # forget the one that moved least
                delta.value[delta.moved.argmin()] = 0

    def bake(self, part: Part) -> Part:
        delta = ChosenDelta(len(part.delta.value), baked=True)
        with torch.no_grad():
            delta.value.copy_(part.delta.value * part.delta.scale)
            delta.index.copy_(part.delta.index)
        return Part(dataclasses.replace(self, baked=True), part.site, delta)


@pytest.fixture(autouse=True)
def _catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "chosen", Chosen)


STEPS: dict[str, Any] = {
    "method": "chosen(share=0.2,weight=0.3)", "batch": 4, "accumulate": 2, "steps": 8, "save_every": 2, "eval_every": 4,
    "keep_checkpoints": 3,
}  # fmt: skip


# --- the trainer ---


def with_chosen(base: Path, folder: Path, weight: float) -> tuple[Any, Adapter, Any, Any]:
    model, lora, rows, collate = prepared("sft", base, folder)
    lora.detach()
    samples = Samples([{name: value for name, value in collate(rows).items() if name != "row"}])
    return model, attach(model, Chosen(share=0.2, weight=weight), samples=samples), rows, collate


def test_a_penalty_counts_once_a_step_however_the_step_is_cut_up(tiny_base: Path, tmp_path: Path) -> None:
    found = {}
    for weight, parts in ((0.0, 1), (0.3, 1), (0.3, 2), (0.3, 4)):
        model, adapter, rows, collate = with_chosen(tiny_base, tmp_path, weight)
        run = trained(model, adapter, rows, collate, CausalLM(), tmp_path, accumulate=parts)
        found[weight, parts] = run.losses, run.gradients[0]
        assert run.penalty == (pytest.approx(0.3 * sum(p.numel() for p in values(adapter))) if weight else None)
    plain = found[0.0, 1]
    for parts in (1, 2, 4):
        losses, gradients = found[0.3, parts]
        assert sum(losses) == pytest.approx(plain[0][0], rel=1e-6)  # the loss that is told is the task's
        for one, other in zip(gradients, plain[1], strict=True):
            # The penalty's gradient at value 0 is 2 * 0.3 * (0 - 1), on the values alone.
            wanted = other - 0.6 if other.numel() > 1 else other
            torch.testing.assert_close(one, wanted, atol=1e-6, rtol=1e-5)


def values(adapter: Adapter) -> list[Tensor]:
    return [part.delta.value for part in adapter.parts]


def test_a_penalty_does_not_hide_that_the_loss_gives_no_gradient(tiny_base: Path, tmp_path: Path) -> None:
    model, lora, rows, collate = prepared("sft", tiny_base, tmp_path)
    lora.detach()
    model.unused = nn.Linear(4, 4)  # no forward ever calls it

    @dataclass(frozen=True)
    class Held(LoRA):
        def penalty(self, parts: Sequence[Part]) -> Tensor:
            return sum((part.delta.lora_A**2).sum() + (part.delta.lora_B**2).sum() for part in parts)

    adapter = attach(model, Held(rank=2, targets=["q_proj", "unused"]))
    with pytest.raises(RunError, match="had no gradient.*unused"):
        trained(model, adapter, rows, collate, CausalLM(), tmp_path, max_grad_norm=0.0)


def test_a_penalty_without_a_number_stops_the_run(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = with_chosen(tiny_base, tmp_path, float("inf"))
    with pytest.raises(RunError, match="penalty is inf at step 1"):
        trained(model, adapter, rows, collate, CausalLM(), tmp_path)


def test_parameters_have_their_own_rates(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = with_chosen(tiny_base, tmp_path, 0.0)
    run = trained(model, adapter, rows, collate, CausalLM(), tmp_path, learning_rate=1e-2, weight_decay=0.1)
    scales = [part.delta.scale for part in adapter.parts]
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in scales} == {5e-3}
    assert {rates[id(p)] for p in values(adapter)} == {1e-2}
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.1}


def test_the_method_hears_of_every_step_with_its_gradients(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = with_chosen(tiny_base, tmp_path, 0.0)
    run = trained(model, adapter, rows, collate, CausalLM(), tmp_path, steps=3, accumulate=2, max_grad_norm=1e9)
    wanted = [sum(step.abs() for step in steps) for steps in zip(*run.gradients, strict=True) if len(steps[0]) > 1]
    for part, total in zip(adapter.parts, wanted, strict=True):
        torch.testing.assert_close(part.delta.moved, total)
    assert all(parameter.grad is None for parameter in adapter.parameters())


# --- whole runs ---


@pytest.mark.parametrize("step", [1, 2, 5, 7])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    step: int, tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(answered, out="whole", **STEPS)
    stopped(tiny, answered, step, monkeypatch, **STEPS)
    if step > 1:  # what was chosen is in the checkpoint: no data are looked at
        monkeypatch.setattr(Chosen, "measure", lambda *_: pytest.fail("measured again"))
    run = tiny(resume_only=True)
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert seen(run.folder) == seen(whole.folder)
    last = [load_file(folder / "checkpoints" / "checkpoint-8" / "adapter.safetensors")
            for folder in (whole.folder, run.folder)]  # fmt: skip
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])
    assert len(last[0]) == 4 * len(run.adapter.parts)


def test_the_file_holds_the_baked_form_and_checkpoints_all(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, **STEPS)
    names = {key.rpartition(".")[2] for key in load_file(run.folder / "adapter" / "adapter_model.safetensors")}
    assert names == {"value", "index"}
    assert str(run.adapter.method) == "chosen(share=0.2,weight=0.3,baked=True)"
    assert record_of(run.folder)["method"] == "chosen(share=0.2,weight=0.3)"
    kept = load_file(run.folder / "checkpoints" / "checkpoint-8" / "adapter.safetensors")
    for part in run.adapter.parts:
        wanted = kept[f"{part.site.key}.value"] * kept[f"{part.site.key}.scale"]
        assert torch.equal(part.delta.value, wanted)
        assert torch.equal(part.delta.index, kept[f"{part.site.key}.index"])
    assert all("penalty" in row for row in metrics_of(run.folder) if "loss" in row)
    opened = open_adapter(run.folder)
    assert opened.adapter is not None
    assert all(torch.equal(one, opened.adapter.state()[key]) for key, one in run.adapter.state().items())


def test_the_seed_decides_which_rows_are_looked_at(tiny: Tiny, answered: Path) -> None:
    one, other = (tiny(answered, out=name, **STEPS) for name in ("one", "other"))
    assert adapter_bytes(one.folder) == adapter_bytes(other.folder)


def test_the_best_is_loaded_whatever_its_sizes(tiny_base: Path, tmp_path: Path) -> None:
    _, adapter, _, _ = with_chosen(tiny_base, tmp_path, 0.0)
    state = {key: tensor.clone() for key, tensor in adapter.state().items()}
    smaller = {key: tensor[:1] for key, tensor in state.items()}
    adapter.load_state(smaller)
    assert all(torch.equal(tensor, smaller[key]) for key, tensor in adapter.state().items())
    assert all(parameter.requires_grad for parameter in adapter.parameters())


# --- files ---


def test_sizes_are_those_of_the_file(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, _, _ = with_chosen(tiny_base, tmp_path, 0.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 1
    lora = attach(model, LoRA(rank=2) + Head(), name="plain")
    save_adapter(adapter, tmp_path / "saved")
    lora.detach()
    wanted = adapter.baked().state()
    adapter.detach()
    loaded = load_adapter(model, tmp_path / "saved", name="again")
    assert all(torch.equal(loaded.state()[key], tensor) for key, tensor in wanted.items())
    assert len(values(loaded)[0]) > 1, "a fresh delta has one"
    assert adapters(model) == {"again": loaded}


def test_a_file_with_sizes_that_do_not_go_together_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    _, adapter, _, _ = with_chosen(tiny_base, tmp_path, 0.0)
    state = {key: tensor for key, tensor in adapter.state().items() if not key.endswith("index")}
    with pytest.raises(AdapterError, match="lacks"):
        adapter.load_state(state)


def test_a_sum_is_baked_part_by_part(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = with_chosen(tiny_base, tmp_path, 0.0)
    adapter.detach()
    samples = [{name: value for name, value in collate(rows).items() if name != "row"}]
    both = attach(model, LoRA(rank=2) + Chosen(), samples=samples)
    assert str(both.baked().method) == "lora(rank=2)+chosen(baked=True)"
    assert both.baked().state().keys() < both.state().keys()
    plain = attach(model, LoRA(rank=2, targets="down") + Head(), name="plain")
    assert plain.baked().method is plain.method
    save_adapter(both, tmp_path / "both")
    assert json.loads((tmp_path / "both" / "graftlm.json").read_text())["method"]["text"] == str(both.baked().method)


def test_data_must_be_given(tmp_path: Path) -> None:
    model, _ = load_base(save_llama(tmp_path / "base"))
    with pytest.raises(MethodError, match="chooses by data"):
        attach(model, Chosen())
    assert not adapters(model)


# --- virtual tokens ---


def test_virtual_tokens_leave_rows_the_rest_of_the_context(tiny: Tiny, tmp_path: Path) -> None:
    # A base with learned positions: one token too many would fail in the middle of a batch.
    long = tmp_path / "rows.txt"
    long.write_text(texts(60))  # cut into blocks as long as may be
    base = save_gpt2(tmp_path / "gpt2")
    run = tiny(long, base=base, method="prompt(length=5)", steps=2)
    longest = json.loads((run.folder / "adapter" / "graftlm.json").read_text())["facts"]["max_length"]
    assert longest == 64 - 5
    with pytest.raises(SettingsError, match="without the 5 virtual tokens") as caught:
        tiny(long, out="other", base=base, method="prompt(length=5)", max_length=64)
    assert caught.value.findings[0].fix == "--max-length 59"
    with pytest.raises(SettingsError, match="takes 64 positions, the base has 64"):
        tiny(long, out="other", base=base, method="prompt(length=64)")


def save_gpt2(folder: Path) -> Path:
    tokenizer = load_tokenizer(str(bundled_base()))
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=len(tokenizer), n_positions=64,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_positions_taken() -> None:
    for text, wanted in (
        ("lora", 0),
        ("prompt(length=7)+lora", 7),
        ("prompt(length=7,position=slots,slot_token=3)", 0),
        ("prefix(length=7)", 0),
        ("prefix(length=7,positions=shifted)+ptuning(length=2)", 9),
        ("gated(prefix(length=7,positions=shifted))", 7),  # what is inside a gate takes its room too
    ):
        assert positions_taken(read_method(text)) == wanted


# --- decisions ---


def test_the_parts_of_a_sum_have_their_own_rates() -> None:
    own = {name: METHODS[name].learning_rate for name in ("lora", "full", "head", "prompt")}
    for text, wanted in (
        ("lora+full", [own["lora"], own["full"]]),
        ("prompt+lora", [own["prompt"], own["lora"]]),
        ("lora+head", [own["lora"], own["lora"]]),
        ("head+lora", [own["lora"], own["lora"]]),
        ("head", [own["head"]]),
        ("prompt+head", [own["prompt"], own["head"]]),
        ("prefix+prefix(mlp=8)+lora", [3e-2, 1e-3, own["lora"]]),
    ):
        assert decide_learning_rates(read_method(text), 2000) == wanted
    assert decide_learning_rate(read_method("lora+prompt"), 2000) == own["lora"]
    assert decide_learning_rate(read_method("head+lora"), 2000) == own["lora"]


@pytest.mark.parametrize(("asked", "rates"), [(None, {0.0025, 0.005}), (0.01, {0.01, 0.005})])
def test_a_run_trains_each_part_at_its_rate(
    asked: float | None, rates: set[float], tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[set[float]] = []
    real = GraftTrainer.create_optimizer

    def create_optimizer(self: GraftTrainer, model: Any = None) -> Any:
        optimizer = real(self, model)
        found.append({group["lr"] for group in optimizer.param_groups})
        return optimizer

    monkeypatch.setattr(GraftTrainer, "create_optimizer", create_optimizer)
    run = tiny(answered, method="lora(rank=2)+chosen", steps=2, learning_rate=asked)
    assert found[0] == rates
    told = "lr 0.0025, Chosen 0.005 " if asked is None else "lr 0.01 "
    assert told in (run.folder / "log.txt").read_text()


def test_a_recipe_keeps_its_rate_and_name_beside_a_head(
    tiny: Tiny, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Recipe(Method):
        name: ClassVar[str] = "recipe"
        title: ClassVar[str] = "Recipe"
        learning_rate: ClassVar[float] = 1e-4

        @functools.cached_property
        def parts(self) -> tuple[Method, ...]:
            return (LoRA(rank=2), Chosen())

    monkeypatch.setitem(METHODS, "recipe", Recipe)
    run = tiny(labelled, method="recipe", steps=2)
    assert "lr 0.0005  seed" in (run.folder / "log.txt").read_text()
    assert run.record["method"] == "lora(rank=2)+chosen+head(start=probe)"
    assert run.record["results"]["scores"][0]["title"] == "tuned: Recipe"
    opened = open_adapter(run.folder)
    assert opened.adapter is not None
    assert str(opened.adapter.method) == "lora(rank=2)+chosen(baked=True)+head(start=probe)"


def test_titles() -> None:
    assert title_of(LoRA() + Head()) == "LoRA"
    assert title_of(Head()) == Head.title
    assert title_of(LoRA() + Chosen()) == "LoRA + Chosen"


def test_a_recipe_of_several_parts_gets_its_head() -> None:
    @dataclass(frozen=True)
    class Recipe(Method):
        name: ClassVar[str] = "recipe"
        title: ClassVar[str] = "Recipe"
        learning_rate: ClassVar[float] = 0.25

        @property
        def parts(self) -> tuple[Method, ...]:
            return (LoRA(), Chosen())

    assert [part.name for part in with_head(Recipe()).parts] == ["lora", "chosen", "head"]
    assert with_head(Recipe() + Head()).parts[-1] == Head()
    assert decide_learning_rate(Recipe(), 2000) == 0.25
    assert decide_learning_rates(Recipe(), 2000) == [0.25, 0.25]
    assert title_of(Recipe()) == "Recipe"
