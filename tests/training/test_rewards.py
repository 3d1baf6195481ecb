"""Learning from rewards: the losses are TRL's, a step is the same however it is cut, and the reward rises."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core import attach
from graftlm.data.tokenising import IGNORED
from graftlm.errors import GraftError
from graftlm.methods import Value
from graftlm.objectives import GRPO, PPO, RLOO, Online, Reference, settle
from graftlm.training import evaluate, train
from graftlm.training.rewards import read_reward
from training.test_invariance import Ready
from training.tiny_runs import Tiny, adapter_bytes, metrics_of, write_jsonl

_KINDS: dict[str, type[Online]] = {"grpo": GRPO, "rloo": RLOO}
_TASKS = [*_KINDS, "ppo"]


def _batch(ready: Ready, rewards: list[float]) -> dict[str, Any]:
    """Four answers, two to each prompt, with rewards."""
    batch = ready.collate(ready.rows[:2])
    for name in ("group", "target", "row"):
        batch.pop(name)
    batch["rewards"] = torch.tensor(rewards)
    return batch


@pytest.mark.parametrize("task", _KINDS)
@pytest.mark.parametrize("moved", [False, True], ids=["on-policy", "off-policy"])
def test_losses_are_those_of_trl(task: str, moved: bool, tiny_base: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from graftlm.core import adapters

    ready = Ready("dpo", "dpo", tiny_base, tmp_path)
    objective = _KINDS[task](answers=2, kl_weight=0.3, clip=0.2)
    batch = _batch(ready, [1.0, 0.25, 0.0, 2.0])
    settle(ready.model, objective, [batch], Reference(ready.adapter))
    if moved:  # as after an update
        with torch.no_grad():
            batch["policy"] = batch["policy"] + 0.1 * torch.randn_like(batch["policy"]) * (batch["labels"] != IGNORED)
        objective.before_step([batch], lambda value: value)
    ours = objective.loss_sum(objective.outputs(ready.model, batch), batch) / objective.count(batch)

    policy = copy.deepcopy(ready.model)
    adapters(policy)["default"].merge()
    config, kind = (trl.GRPOConfig, trl.GRPOTrainer) if task == "grpo" else (trl.RLOOConfig, trl.RLOOTrainer)
    options: dict[str, Any] = {"loss_type": "dapo", "use_bias_correction_kl": False} if task == "grpo" else {}
    trainer = kind(
        model=policy, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
            per_device_train_batch_size=4, num_generations=2, beta=0.0, epsilon=0.2, max_completion_length=32, **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}), processing_class=ready.learnt.tokenizer,
    )  # fmt: skip
    trainer.model.train()
    trainer.beta = 0.3
    trainer.current_gradient_accumulation_steps = 1
    # TRL's own layout: prompts and answers apart. The first token is a prompt for all; what is no answer is masked.
    answered = (batch["labels"][:, 1:] != IGNORED).long()
    inputs = {
        "prompt_ids": batch["input_ids"][:, :1], "prompt_mask": batch["attention_mask"][:, :1],
        "completion_ids": batch["input_ids"][:, 1:], "completion_mask": batch["attention_mask"][:, 1:],
        "advantages": batch["advantages"], "num_items_in_batch": answered.sum(),
    }  # fmt: skip
    if task == "grpo":
        inputs |= {
            "old_per_token_logps": batch["policy"][:, 1:], "ref_per_token_logps": batch["reference"][:, 1:],
            "tool_mask": answered,
        }  # fmt: skip
    else:
        # RLOO has no such mask: what the prompt's own tokens add to the ratio is put into the old sum.
        whole = -torch.nn.functional.cross_entropy(
            policy(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].transpose(1, 2),
            batch["input_ids"][:, 1:], reduction="none",
        )  # fmt: skip
        rest = (whole * (batch["attention_mask"][:, 1:] - answered)).sum(1).detach()
        inputs["old_logps"] = batch["policy"].sum(1) + rest
    theirs = trainer._compute_loss(trainer.model, inputs)
    # Sums over all tokens of some -250 stand for RLOO's prompt, in single precision: their rounding is in TRL's value.
    near = 1e-5 if task == "grpo" else 5e-5
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=near)
    if moved or task == "grpo":  # advantages of a group sum to nothing: without a distance, so does the loss
        assert abs(float(ours.detach())) > 1e-3


def test_advantages_are_those_of_trl() -> None:
    """As TRL's trainers have them, written out: groups in standard units, and less the mean of the others."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [0.5, 0.5, 0.5, 0.5]])
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(GRPO(answers=4).advantages(rewards), wanted)
    found = RLOO(answers=4).advantages(rewards)
    assert found[0].tolist() == pytest.approx([0.0, -4 / 3, -4 / 3, 8 / 3])
    assert found[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("task", _KINDS)
def test_prompts_carry_no_gradient_and_padding_changes_nothing(task: str, tiny_base: Path, tmp_path: Path) -> None:
    ready = Ready("dpo", "dpo", tiny_base, tmp_path)
    ready.objective = _KINDS[task](answers=2, kl_weight=0.3)
    batch = _batch(ready, [1.0, 0.25, 0.0, 2.0])
    settle(ready.model, ready.objective, [batch], Reference(ready.adapter))
    outputs = ready.model(**{k: v for k, v in ready.objective.inputs(batch).items() if k != "logits_to_keep"})
    outputs.logits.retain_grad()
    ready.objective.loss_sum(outputs, batch).backward()
    reads = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    assert outputs.logits.grad[~reads].abs().max() == 0
    assert outputs.logits.grad[reads].abs().max() > 0

    one = ready.loss_and_gradient(_batch(ready, [1.0, 0.25, 0.0, 2.0]))
    wide = _batch(ready, [1.0, 0.25, 0.0, 2.0])
    wide |= {
        name: torch.nn.functional.pad(wide[name], (5, 0), value=value)
        for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))
    }
    wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    other = ready.loss_and_gradient(wide)
    assert other[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)
    for a, b in zip(other[1], one[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_ppo_is_that_of_trl() -> None:
    """Advantages, returns and loss; the numbers come from TRL 0.11.4, the last one with such a loss (`ppo_of_trl.py`)."""
    told = json.loads(Path(__file__).with_name("ppo_of_trl.json").read_text())
    settings = told.pop("settings")
    of = {name: torch.tensor(value, dtype=torch.float64) for name, value in told.items()}
    mask = of["mask"].bool()

    def behind_a_prompt(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values * mask, (2, 1))

    batch: dict[str, Any] = {
        "labels": torch.nn.functional.pad(torch.where(mask, 7, IGNORED), (2, 1), value=IGNORED),
        "rewards": of["scores"],
        "policy": torch.stack([behind_a_prompt(of["old"]), behind_a_prompt(of["values"])], 2),
        "reference": torch.stack([behind_a_prompt(of["reference"])] * 2, 2),
    }
    objective = PPO(**settings)
    objective.before_step([batch], lambda value: value)
    for name in ("advantages", "returns"):
        torch.testing.assert_close(batch[name][:, 2:-1] * mask, of[name], rtol=1e-6, atol=1e-6)
    outputs = (-behind_a_prompt(of["now"]), behind_a_prompt(of["later"]))
    loss = objective.loss_sum(outputs, batch) / objective.count(batch)
    assert float(loss) == pytest.approx(told["loss"], rel=1e-6)
    clipped = (of["now"] - of["old"]).exp().sub(1).abs() > settings["clip"]
    assert (clipped & mask).any()
    assert ((of["later"] - of["values"]).abs() > settings["value_clip"])[mask].any()
    unclipped = PPO(**{**settings, "clip": 0.99, "value_clip": 99.0})
    assert float(unclipped.loss_sum(outputs, batch) / 15) != pytest.approx(told["loss"], rel=1e-2)


def _with_values(ready: Ready) -> PPO:
    """The objective of PPO on a model whose adapter has a value head that says something."""
    method = ready.adapter.method + Value()
    state = ready.adapter.state()
    ready.adapter.detach()
    ready.adapter = attach(ready.model, method)
    torch.manual_seed(1)
    own = {name: torch.randn_like(value) for name, value in ready.adapter.state().items() if name not in state}
    assert len(own) == 2
    ready.adapter.load_state({**state, **own})
    return PPO(answers=2, kl_weight=0.3, **ready.learnt.writing()).on(ready.model)


def test_ppo_takes_values_from_the_states_before_each_token(tiny_base: Path, tmp_path: Path) -> None:
    """A step by the loss head, by the model's own logits, and with padding on the left, written out beside."""
    ready = Ready("dpo", "dpo", tiny_base, tmp_path)
    objective = _with_values(ready)
    head = dict(ready.adapter.named_parameters())
    weight, bias = (head[f"lm_head.value_{name}"] for name in ("weight", "bias"))
    batch = _batch(ready, [1.0, 0.25, 0.0, 2.0])
    _, values = objective.outputs(ready.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = ready.model(**inputs, output_hidden_states=True).hidden_states[-1]
    for row, labels in enumerate(batch["labels"]):
        for at in (labels != IGNORED).nonzero()[:, 0].tolist():
            torch.testing.assert_close(values[row, at], (weight[0] * states[row, at - 1]).sum() + bias[0])
    assert (values[batch["labels"] == IGNORED] == 0).all()

    found = []
    for head_known in (True, False):
        ready.objective = objective if head_known else replace(objective, head=None)
        found.append(ready.loss_and_gradient(_batch(ready, [1.0, 0.25, 0.0, 2.0])))
    wide = _batch(ready, [1.0, 0.25, 0.0, 2.0])
    wide |= {
        name: torch.nn.functional.pad(wide[name], (5, 0), value=value)
        for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))
    }
    wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    ready.objective = objective
    found.append(ready.loss_and_gradient(wide))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_value_head_is_kept_with_its_adapter_and_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    from graftlm.formats import load_adapter
    from graftlm.formats.exporting import export_adapter

    ready = Ready("dpo", "dpo", tiny_base, tmp_path)
    ids = torch.arange(5, 15)[None]
    before = ready.model(ids).logits
    _with_values(ready)
    assert torch.equal(ready.model(ids).logits, before)
    ready.adapter.save(tmp_path / "adapter")
    state = {name: value.clone() for name, value in ready.adapter.state().items()}
    export_adapter(ready.adapter, ready.learnt.tokenizer, tmp_path / "plain", to="peft", rows=[[5, 6, 7]])
    ready.adapter.merge()
    torch.testing.assert_close(ready.model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert ready.model.lm_head.weight is ready.model.model.embed_tokens.weight  # nothing was untied for it
    ready.adapter.unmerge()
    ready.adapter.detach()
    again = load_adapter(ready.model, tmp_path / "adapter")
    assert str(again.method) == "lora(rank=2)+value"
    assert again.state().keys() == state.keys()
    assert all(torch.equal(again.state()[name], value) for name, value in state.items())
    assert torch.equal(ready.model(ids).logits, before)
    again.detach()
    plain = load_adapter(ready.model, tmp_path / "plain")
    assert str(plain.method) == "lora(rank=2)"
    assert torch.equal(ready.model(ids).logits, before)


def test_peft_passes_over_a_value_head(tiny_base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ready = Ready("dpo", "dpo", tiny_base, tmp_path)
    _with_values(ready)
    ready.adapter.save(tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, ready.model(ids).logits, rtol=1e-4, atol=1e-5)


# --- runs ---


def _prompts(tmp_path: Path, count: int = 20) -> Path:
    rows = [{"prompt": f"Say something, number {at}" + " please" * (at % 4), "wanted": "a"} for at in range(count)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


def _letters(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    assert prompt.startswith("Say something")
    assert row["wanted"] == "a"
    return answer.count("a") / max(len(answer), 1)


_SHORT: dict[str, Any] = {"max_new_tokens": 6, "batch": 4, "steps": 2, "answers": 3}


@pytest.mark.parametrize("task", _TASKS)
def test_a_run(task: str, tiny: Tiny, tmp_path: Path) -> None:
    data = _prompts(tmp_path)
    run = tiny(data, task=task, reward="regex:[aeiou]", **_SHORT)
    results = run.record["results"]
    assert results["measure"]["key"] == "reward"
    assert 0 <= run.metrics["reward_low"] <= run.metrics["reward"] <= run.metrics["reward_high"] <= 1
    assert [score["name"] for score in results["scores"]] == ["tuned", "base"]
    told = [row for row in metrics_of(run.folder) if "reward" in row]
    assert len(told) == 2
    assert all(0 < row["answer_tokens"] <= 6 for row in told)
    lines = [json.loads(line) for line in (run.folder / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [float(any(c in "aeiou" for c in line["answer"])) for line in lines]
    assert evaluate(run.folder)["scores"][0] == pytest.approx(results["scores"][0], abs=1e-6)


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_accumulation_draws_and_learns_the_same(task: str, tiny: Tiny, tmp_path: Path) -> None:
    data, found = _prompts(tmp_path), {}
    for parts in (1, 4):
        run = tiny(data, task=task, reward=_letters, out=f"parts-{parts}", accumulate=parts, **_SHORT)
        found[parts] = [
            (row["reward"], row["loss"], row["grad_norm"]) for row in metrics_of(run.folder) if "loss" in row
        ]
    assert found[1][0][2] > 0
    assert found[4] == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in found[1]]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_a_resumed_run_is_the_unbroken_one(task: str, tiny: Tiny, tmp_path: Path) -> None:
    """A checkpoint of ppo between two steps on the same answers has these answers."""
    data = _prompts(tmp_path)
    settings = {**_SHORT, "steps": 4, "save_every": 2, "task": task, "reward": _letters}
    whole = tiny(data, out="whole", **settings)
    broken = tiny(data, out="broken", **settings)
    for path in (broken.folder / "checkpoints" / "checkpoint-4").iterdir():
        path.unlink()
    (broken.folder / "checkpoints" / "checkpoint-4").rmdir()
    record = json.loads((broken.folder / "run.json").read_text())
    (broken.folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    tiny(data, out="broken", resume=True, **settings)
    assert adapter_bytes(broken.folder) == adapter_bytes(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("grpo", {"answers": 2, "kl_weight": 5.0, "reward": "match:wanted", "updates": 2}),
        ("ppo", {"updates": 1, "clip": 0.001, "discount": 0.5, "gae_lambda": 0.1, "value_weight": 9.0,
                 "value_clip": 1e-6}),
    ],
)  # fmt: skip
def test_settings_matter(task: str, values: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    from training.tiny_runs import same, weights

    data = _prompts(tmp_path)
    common = {**_SHORT, "task": task, "reward": _letters, "learning_rate": 0.02, "steps": 4}
    before = weights(tiny(data, out="default", **common))
    for name, value in values.items():
        assert not same(weights(tiny(data, out=name, **(common | {name: value}))), before), name


def test_steps_share_answers(tiny: Tiny, tmp_path: Path) -> None:
    """The answers of a step are those of the next one, then come others; the value head moves with the adapter."""
    from training.tiny_runs import weights

    run = tiny(_prompts(tmp_path), task="ppo", reward=_letters, **(_SHORT | {"steps": 6, "updates": 3}))
    told = [(row["reward"], row["answer_tokens"]) for row in metrics_of(run.folder) if "reward" in row]
    assert told[0] == told[1] == told[2] != told[3] == told[4] == told[5]
    assert run.record["decided"]["updates"] == 3
    assert weights(run)["base_model.model.lm_head.value_weight"].abs().max() > 0
    assert "value" not in run.record["results"]["scores"][0]["title"]


def test_a_value_head_is_for_ppo(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="U146"):
        tiny(_prompts(tmp_path), task="grpo", reward="regex:a", method="lora(rank=2)+value")


def test_an_answer_is_worth_what_the_reward_model_says(tiny: Tiny, tmp_path: Path) -> None:
    from training.tiny_runs import rows_for

    judge = tiny(write_jsonl(tmp_path / "pairs.jsonl", rows_for("dpo")), task="reward", epochs=4.0, out="judge")
    rows = [json.loads(line) for line in (judge.folder / "eval" / "predictions.jsonl").read_text().splitlines()]
    reward = read_reward(f"model:{judge.folder}")
    pairs = {row["prompt"]: row for row in rows_for("dpo")}
    for row in rows:
        pair = pairs[row["text"]]
        margin = reward(row["text"], pair["chosen"], {}) - reward(row["text"], pair["rejected"], {})
        assert margin == pytest.approx(row["margin"], abs=2e-3)
    run = tiny(_prompts(tmp_path), task="grpo", reward=f"model:{judge.folder}", out="policy", **_SHORT)
    assert run.record["status"] == "done"


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (None, "no reward"), ("regex:(", "no regular expression"), ("match:column", "no such column"),
        ("none.py:f", "no file"), ("FILE:other", "no function"), ("politeness", "no reward"), ("model:none", "no run"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_had_is_told_before_training(
    reward: str | None, said: str, tiny: Tiny, tmp_path: Path
) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def worth(prompt, answer, row):\n    return 1.0\n")
    given = {} if reward is None else {"reward": reward.replace("FILE", str(code))}
    with pytest.raises(GraftError, match=said) as caught:
        tiny(_prompts(tmp_path), task="grpo", **given)
    assert caught.value.findings[0].code == "U140"


def test_check_looks_at_a_reward_without_running_it(tmp_path: Path, tiny_base: Path) -> None:
    """What `graftlm check` says, early and whole; the user's file would raise where it is run."""
    from graftlm.settings import Attempted, resolve
    from graftlm.training.early import early_findings
    from graftlm.training.ready import check_resolved

    code = tmp_path / "mine.py"
    code.write_text("from os import path as joined\nraise SystemExit('run')\ndef worth(p, a, r):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("def worth(:\n")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "run.json").write_text('{"task": "classify"}')
    for reward, said in {
        f"{code}:worth": "", f"{code}:joined": "", f"{code}:other": "has no function 'other', only worth",
        f"{tmp_path / 'broken.py'}:worth": "is no Python", f"model:{tmp_path / 'judge'}": "learnt classify",
        f"model:{tmp_path / 'none'}": "holds no run", "regex:(": "no regular expression", None: "no reward is given", "match:other": "",
    }.items():  # fmt: skip
        given = {"data.path": str(_prompts(tmp_path)), "task": "grpo", "reinforcement.reward": reward}
        resolved = resolve(python={**given, "model.name": str(tiny_base), "output": str(tmp_path / "run")})
        faults = early_findings(Attempted(resolved, (), frozenset()))[1]
        assert [finding.code for finding in faults] == ["U140"] * bool(said), reward
        assert said in "".join(finding.message for finding in faults)
    faults = check_resolved(resolved)[1]
    assert [finding.code for finding in faults] == ["U140"]
    assert "no such column" in faults[0].message


def test_a_reward_that_fails_stops_the_run_and_code_of_adapters_is_not_run(tiny: Tiny, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def bad(prompt, answer, row):\n    return float('nan')\ndef good(p, a, r):\n    return len(a)\n")
    with pytest.raises(GraftError, match="U141"):
        tiny(_prompts(tmp_path), task="grpo", reward=f"{code}:bad", out="bad", **_SHORT)
    run = tiny(_prompts(tmp_path), task="grpo", reward=f"{code}:good", out="good", **_SHORT)
    with pytest.raises(GraftError, match="U142"):
        evaluate(run.folder)
    with pytest.raises(GraftError, match="U143"):
        tiny(_prompts(tmp_path), task="grpo", reward="regex:a", out="long", max_length=16, max_new_tokens=15)


@pytest.mark.slow
@pytest.mark.parametrize("task", _TASKS)
def test_the_reward_rises(task: str, tmp_path: Path) -> None:
    """On the bundled base: the share of the letter e grows beyond the noise of what is sampled."""
    things = ("kettle", "lamp", "chair", "table", "carpet", "mirror", "teapot", "basket", "blanket", "clock")
    rows = [{"prompt": f"Where is my {thing} number {at}?"} for at in range(8) for thing in things]

    def share_of_e(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        del prompt, row
        return 10 * answer.count("e") / max(len(answer), 8)  # of the order of the distance that rloo takes off

    run = train(
        rows, task=task, reward=share_of_e, output=tmp_path / "run", batch=4, quiet=True, max_new_tokens=8,
        steps=60 if task == "ppo" else 30,  # four steps of ppo learn from the same answers
        schedule="constant",
    )  # fmt: skip
    tuned, base = run.record["results"]["scores"]
    assert tuned["reward_low"] > base["reward_high"]
