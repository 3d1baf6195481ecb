"""Writes `ppo_of_trl.json`: rewards by token, advantages and losses of PPO as TRL 0.11.4 computes them.

TRL has no PPO any more. Its last trainer for bare functions is asked here, from its unpacked wheel:

    pip download --no-deps trl==0.11.4 && unzip trl-0.11.4-py3-none-any.whl -d trl-0.11
    PYTHONPATH=trl-0.11 python tests/training/ppo_of_trl.py

Only `compute_rewards`, `compute_advantages` and `loss` of its PPOTrainer are run, on random numbers.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SETTINGS = {"kl_weight": 0.3, "clip": 0.2, "discount": 0.9, "gae_lambda": 0.8, "value_weight": 0.5, "value_clip": 0.25}
LENGTHS = (3, 6, 1, 5)


def functions(package: Path) -> dict[str, Any]:
    """The functions by name, without importing the package, which wants an old transformers."""
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "warnings": warnings, "Mapping": Mapping}
    wanted = {"masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits", "flatten_dict"}
    methods = {"compute_rewards", "compute_advantages", "loss", "_kl_penalty"}
    for name in ("core.py", "trainer/ppo_trainer.py"):
        tree = ast.parse((package / name).read_text())
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in wanted | methods]
        for node in found:
            node.decorator_list = []
            for argument in node.args.args:
                argument.annotation = None
            node.returns = None
        exec(compile(ast.Module(found, []), name, "exec"), space)
    return space


def main() -> None:
    import importlib.util

    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.origin is not None
    trl = functions(Path(found.origin).parent)
    torch.manual_seed(0)
    width = max(LENGTHS)
    mask = torch.tensor([[at < length for at in range(width)] for length in LENGTHS]).long()
    old, reference, now = (-3 * torch.rand(4, width, dtype=torch.float64) for _ in range(3))
    now = old + 0.3 * (now + 1.5)
    values = torch.randn(4, width, dtype=torch.float64)
    later = values + 0.4 * torch.randn(4, width, dtype=torch.float64)
    scores = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    config = SimpleNamespace(
        kl_penalty="kl", whiten_rewards=False, gamma=SETTINGS["discount"], lam=SETTINGS["gae_lambda"],
        cliprange=SETTINGS["clip"], cliprange_value=SETTINGS["value_clip"], vf_coef=SETTINGS["value_weight"],
        ratio_threshold=1e9,
    )  # fmt: skip
    trainer = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=SETTINGS["kl_weight"]))
    trainer._kl_penalty = lambda *given: trl["_kl_penalty"](trainer, *given)
    rewards, _, _ = trl["compute_rewards"](trainer, scores, old, reference, mask)
    values, advantages, returns = trl["compute_advantages"](trainer, values, rewards, mask)
    logits = torch.zeros(4, width, 3, dtype=torch.float64)
    policy_loss, value_loss, _ = trl["loss"](trainer, old, values, logits, later, now, mask, advantages, returns)
    tensors = {
        "mask": mask, "old": old, "reference": reference, "now": now, "values": values, "later": later,
        "scores": scores, "advantages": advantages * mask, "returns": returns * mask,
    }  # fmt: skip
    told = {"settings": SETTINGS, **{name: tensor.tolist() for name, tensor in tensors.items()}}
    # Its `loss` gives the value loss with its weight.
    told["loss"] = float(policy_loss + value_loss)
    Path(__file__).with_suffix(".json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
