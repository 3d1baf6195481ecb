"""Tiny bases in folders, small data files and whole runs on them: what the tests of runs share.

A run on these takes about a second: one or two layers of width 32, the bundled tokenizer, a dozen rows.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from graftlm.models import bundled_base, load_tokenizer
from graftlm.training import Run, scoring, train
from graftlm.training import run as run_module

gc.freeze()  # the Trainer collects garbage once a run: what the imports made need not be looked at each time

WIDTH = 32
#: Settings that keep a run tiny.
FAST: dict[str, Any] = {"epochs": 2.0, "batch": 4, "threads": 1, "samples": 1, "max_new_tokens": 4}
LORA = "lora(rank=2,targets=attention)"


def save_llama(folder: Path, *, layers: int = 1, **settings: Any) -> Path:
    """A random Llama in `folder`, with the bundled tokenizer."""
    tokenizer = load_tokenizer(str(bundled_base()))
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 128,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            **settings,
        }
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """A random BERT with the bundled tokenizer and a mask token; its config knows no classes."""
    tokenizer = load_tokenizer(str(bundled_base()))
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(12)
    config = transformers.BertConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.BertForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """A random T5 with the bundled tokenizer."""
    tokenizer = load_tokenizer(str(bundled_base()))
    torch.manual_seed(13)
    config = transformers.T5Config(
        d_model=WIDTH, d_ff=48, d_kv=8, num_layers=1, num_heads=4, vocab_size=len(tokenizer), dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer."""
    return save_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer."""
    return save_bert(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of one layer on each side."""
    return save_t5(tmp_path_factory.mktemp("bases") / "t5")


# --- data ---

_THINGS = ("kettle", "lamp", "chair", "table", "carpet", "mirror", "teapot", "basket", "blanket", "clock")


def labelled_rows(count: int = 20) -> list[dict[str, str]]:
    """Texts of different lengths with one of two labels."""
    draw = random.Random(1)
    return [
        {
            "text": f"{'I would like to return' if at % 2 else 'Where is'} my {draw.choice(_THINGS)} number {at}"
            + " please" * (at % 5),
            "label": "return" if at % 2 else "track",
        }
        for at in range(count)
    ]


def answered_rows(count: int = 20) -> list[dict[str, str]]:
    """Prompts with completions, both of different lengths."""
    draw = random.Random(2)
    return [
        {
            "prompt": f"Tell me about {draw.choice(_THINGS)} {at}" + " and more" * (at % 4),
            "completion": f"It is {draw.choice(_THINGS)} {at}" + " indeed" * (at % 3) + ".",
        }
        for at in range(count)
    ]


def rows_for(task: str, count: int = 20) -> list[dict[str, Any]]:
    """Rows for any task but plain text, of different lengths, with something that can be learnt."""
    draw = random.Random(4)
    rows: list[dict[str, Any]] = []
    for at in range(count):
        thing, other = draw.sample(_THINGS, 2)
        asked = {"prompt": f"Which one is it, number {at}" + " please" * (at % 4)}
        good, bad = f"It is the {thing}." + " Yes." * (at % 3), f"Never a {other} {at}."
        rows.append(
            {
                "multi": {"text": f"A {thing} and {at}", "labels": [n for n, d in (("two", 2), ("three", 3)) if not at % d]},
                "pairs": {"premise": f"A {thing} {at}", "hypothesis": f"A {other if at % 2 else thing}",
                          "label": "no" if at % 2 else "yes"},
                "regress": {"text": f"A {thing}" + " very" * (at % 5), "score": 1.0 + at % 5},
                "tag": {"tokens": ["the", thing, *["said"] * (at % 3), "Anna", "Bell"],
                        "tags": ["O", "B-thing", *["O"] * (at % 3), "B-name", "I-name"]},
                "seq2seq": answered_rows(count)[at],
                "sft": answered_rows(count)[at],
                "classify": labelled_rows(count)[at],
                "choice": {**asked, "choices": [good, bad] if at % 2 else [bad, good, f"A {thing}?"],
                           "answer": "A" if at % 2 else 1},
                "dpo": {**asked, "chosen": good, "rejected": bad},
                "kto": {**asked, "completion": good if at % 2 else bad, "label": bool(at % 2)},
            }[{"tfew": "choice", "reward": "dpo"}.get(task, task)]
        )  # fmt: skip
    return rows


def texts(count: int = 40) -> str:
    """A text of many short paragraphs."""
    draw = random.Random(3)
    return "\n\n".join(f"The {draw.choice(_THINGS)} stood by the {draw.choice(_THINGS)} {at}." for at in range(count))


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """20 labelled rows in a file."""
    return write_jsonl(tmp_path / "labelled.jsonl", labelled_rows())


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """20 answered prompts in a file."""
    return write_jsonl(tmp_path / "answered.jsonl", answered_rows())


# --- runs ---

Tiny = Callable[..., Run]


def leave_out_the_slow(put: Callable[[Any, str, Any], None]) -> None:
    """Replace baselines and reports by nothing much."""

    def majority(*given: Any) -> list[int]:
        return [0] * len(given[2])

    put(scoring, "probe_baseline", majority)
    put(scoring, "tfidf_baseline", majority)
    put(run_module, "write_report", lambda folder: None)
    put(run_module, "write_card", lambda folder: None)


@pytest.fixture
def tiny(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """`train` with a tiny base and tiny settings; the folder is `tmp_path / out`.

    Baselines and the report's drawings, which take most of such a run, are left out; `test_whole_runs` has them.
    """
    leave_out_the_slow(monkeypatch.setattr)

    def run(data: Any = None, *, out: str = "run", **settings: Any) -> Run:
        chosen: dict[str, Any] = {"base": tiny_base, "method": LORA, **FAST, **settings}
        if chosen.get("steps"):
            chosen.pop("epochs", None)
        if "resume_only" in chosen:
            return train(output=tmp_path / out, resume=True, quiet=True)
        return train(data, output=tmp_path / out, quiet=True, **chosen)

    return run


def weights(run: Run | Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's adapter file."""
    folder = run.folder if isinstance(run, Run) else run
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
