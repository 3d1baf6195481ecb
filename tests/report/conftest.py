"""Run folders as the training room leaves them, written by code: a classification, answers, and a run cut short."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LABELS = [
    "order_status",
    "return_item",
    "refund_missing",
    "damaged_item",
    "change_address",
    "cancel_order",
    "product_question",
    "account_access",
]
HOSTILE = '<script>alert("x")</script> & a long row: $5 for `one` | two, http://example.invalid/?a=1&b=2'


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics(steps: int, start: float, end: float, evals: int, rate: float = 2e-4) -> list[dict[str, Any]]:
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-5 * step / steps)
        warm = max(1, steps // 16)
        rows.append(
            {
                "step": step,
                "epoch": 3 * step / steps,
                "loss": loss * chance.uniform(0.8, 1.2),
                "learning_rate": rate * min(step / warm, (steps - step + 1) / (steps - warm + 1)),
                "grad_norm": chance.uniform(0.2, 2),
                "tokens_per_s": chance.uniform(4000, 4400),
                "seconds": 0.8 * step,
            }
        )
        if step % (steps // evals) == 0:
            rows.append({"step": step, "eval_loss": loss * 1.08 + 0.1 * (step / steps) ** 2})
    return rows


def head(task: str, method: str, command: str) -> dict[str, Any]:
    return {
        "graftlm": "0.1.0",
        "status": "done",
        "started": "2026-03-02T10:15:00Z",
        "finished": "2026-03-02T10:17:31Z",
        "command": command,
        "settings": {
            "data": {
                "path": "tickets.csv",
                "map": {"text": "body", "label": "topic"},
                "eval_share": 0.2,
                "max_rows": None,
            },
            "model": {"name": "bundled", "dtype": "auto"},
            "method": method,
            "task": "auto",
            "train": {"epochs": 3.0, "learning_rate": None, "batch": 16, "seed": 0, "max_length": 128},
            "generate": {"max_new_tokens": 96, "temperature": 0.0},
            "output": None,
        },
        "origin": {
            "data.path": "DATA",
            "data.map": "run.yaml:3:3",
            "data.eval_share": "default",
            "data.max_rows": "default",
            "model.name": "default",
            "model.dtype": "default",
            "method": "--method",
            "task": "default",
            "train.epochs": "--epochs",
            "train.learning_rate": "default",
            "train.batch": "default",
            "train.seed": "default",
            "train.max_length": "decided",
            "generate.max_new_tokens": "default",
            "generate.temperature": "default",
            "output": "default",
        },
        "decided": {"epochs": None, "learning_rate": 2.5e-3},
        "task": task,
        "base": {
            "name": "bundled",
            "class": "LlamaForCausalLM",
            "fingerprint": "a1b2c3d4e5f60718",
            "parameters": 4737792,
        },
        "method": method,
        "trainable_parameters": 163840,
        "adapter_bytes": 662_112,
        "data": {
            "line": "tickets.csv  600 rows  text=body label=topic   3 duplicates, 0 cut",
            "loss_line": "cross-entropy over 8 labels",
            "eval_line": "eval 20 % = 120 rows, split by label",
            "train_rows": 480,
            "eval_rows": 120,
            "sha256": {"/home/someone/tickets.csv": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
            "notes": ["3 rows are the same as another row; one of each was kept."],
        },
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "device": "cpu",
            "processor": "Intel(R) Xeon(R) Processor",
            "threads": 2,
        },
        "steps": 90,
        "seconds": 151.2,
        "peak_memory_bytes": 812_000_000,
    }


def score(name: str, title: str, value: float, half: float) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "accuracy": value + 0.004,
        "macro_f1": value,
        "macro_f1_low": value - half,
        "macro_f1_high": value + half,
    }


def loss_score(name: str, title: str, value: float, half: float) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "loss": value,
        "loss_low": value - half,
        "loss_high": value + half,
        "perplexity": math.exp(value),
    }


def write_run(folder: Path, run: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run, indent=2), encoding="utf-8")
    return folder


def classification(folder: Path, steps: int = 90) -> Path:
    chance = random.Random(1)
    run = head("classify", "lora(rank=16,targets=all-linear)+head", "graftlm train tickets.csv --epochs 3")
    texts = [
        "Where is my parcel? The page has said 'out for delivery' since Monday, and nobody picks up the phone.",
        "I'd like to send the blue lamp back, it is fine but too large for the shelf.",
        "You owe me 12.50 since three weeks ago!",
        "The kettle came without its lid, and the handle has a crack.",
    ]
    predictions = []
    table = [[0] * len(LABELS) for _ in LABELS]
    for row in range(120):
        true = row % len(LABELS)
        given = true if chance.random() < 0.85 else chance.randrange(len(LABELS))
        table[true][given] += 1
        predictions.append(
            {
                "row": row,
                "place": f"tickets.csv:{row + 2}",
                "text": HOSTILE if row == 0 else chance.choice(texts),
                "label": LABELS[true],
                "predicted": LABELS[given],
                "probability": chance.uniform(0.4, 0.99),
            }
        )
    predictions[0] |= {"label": "cancel_order", "predicted": "account_access", "probability": 0.93}
    run["results"] = {
        "labels": LABELS,
        "eval_rows": 120,
        "scores": [
            score("tuned", "LoRA adapter", 0.872, 0.055),
            score("probe", "frozen base + trained head", 0.641, 0.08),
            score("tfidf", "TF-IDF + logistic regression", 0.779, 0.07),
            score("majority", "always the commonest label", 0.028, 0.005),
        ],
        "per_label": [
            {"label": label, "precision": 0.8 + 0.02 * n, "recall": 0.9 - 0.03 * n, "f1": 0.84 - 0.01 * n, "rows": 15}
            for n, label in enumerate(LABELS)
        ],
        "confusion": table,
    }
    write_run(folder, run)
    lines(folder / "metrics.jsonl", metrics(steps, 2.1, 0.3, 9, 1e-3))
    lines(folder / "eval" / "predictions.jsonl", predictions)
    lines(folder / "data" / "rejected.jsonl", [{"place": "tickets.csv:17", "reason": "no label"}])
    return folder


def answers(folder: Path, steps: int = 1068) -> Path:
    run = head("sft", "lora(rank=16,targets=all-linear)", "graftlm train faq.jsonl -m Qwen/Qwen3-0.6B")
    run["base"] = {
        "name": "Qwen/Qwen3-0.6B",
        "class": "Qwen3ForCausalLM",
        "fingerprint": "0f9c1d2e3a4b5566",
        "parameters": 596_049_920,
    }
    run |= {"trainable_parameters": 10_092_544, "adapter_bytes": 40_400_000, "steps": 1068, "seconds": 845.0}
    run["data"] |= {
        "line": "faq.jsonl  12 000 rows  prompt=question completion=answer   3 duplicates, 0 cut",
        "loss_line": "loss on 18.9 % of tokens (answers + end of turn), template from tokenizer",
        "eval_line": "eval 5 % = 600 rows",
        "train_rows": 11400,
        "eval_rows": 600,
    }
    run["results"] = {
        "eval_rows": 600,
        "eval_tokens": 34127,
        "scores": [
            loss_score("tuned", "LoRA adapter", 1.712, 0.041),
            loss_score("base", "untouched base", 2.744, 0.052),
        ],
    }
    write_run(folder, run)
    lines(folder / "metrics.jsonl", metrics(steps, 2.8, 1.6, 12))
    lines(
        folder / "eval" / "samples.jsonl",
        [
            {
                "prompt": "Can you refund me to a different card?",
                "reference": "I am sorry, but we can only pay back the card you used. Harbour Lane.",
                "base": "Sure! To get a refund to a different card, follow these steps:\n\n1. Log in\n2. Go to Orders",
                "tuned": "I am sorry, we can only pay back the card that you used. Call your bank. Harbour Lane.",
            },
            {
                "prompt": "My account is locked.",
                "reference": "This happens after five wrong tries. Wait one hour. Harbour Lane.",
                "base": "Oh no, " + "that is bad and " * 40,
                "tuned": HOSTILE,
            },
        ],
    )
    return folder


def cut_short(folder: Path) -> Path:
    """Stopped early, with no results, a half-written line and a loss that is not a number."""
    run = head("lm", "ia3", "graftlm train book.txt --method ia3")
    run |= {"status": "stopped", "steps": 20, "results": {}}
    for gone in ("finished", "peak_memory_bytes", "adapter_bytes"):
        run.pop(gone)
    write_run(folder, run)
    rows = metrics(20, 5.0, 4.0, 2)
    rows[7]["loss"] = math.nan
    lines(folder / "metrics.jsonl", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {"classify": classification, "sft": answers, "stopped": cut_short}


@pytest.fixture(params=sorted(MAKERS))
def any_run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MAKERS[request.param](tmp_path / "runs" / f"{request.param}-1")
