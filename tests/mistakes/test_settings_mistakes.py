"""Wrong settings at the command line: the code, the name, few lines, exit code 2, and a fix that works when it is pasted."""

from __future__ import annotations

import shlex

import pytest

from graftlm.cli import main
from graftlm.settings import resolve

#: What is written after --set -> (code, what the answer names).
MISTAKES = {
    "train.learning_rte=1e-3": ("S101", "train.learning_rte"),
    "train.epocs=2": ("S101", "train.epocs"),
    "data.eval_shar=0.1": ("S101", "data.eval_share"),
    "generate.top_k=5": ("S101", "generate.top_k"),
    "batch=4": ("S102", "train"),
    "learning_rate=1e-3": ("S102", "train"),
    "train.path=x.csv": ("S102", "data"),
    "modl.name=x": ("S102", "model"),
    "num_train_epochs=3": ("S103", "train.epochs"),
    "train.lr=1e-4": ("S103", "train.learning_rate"),
    "cutoff_len=512": ("S103", "train.max_length"),
    "output_dir=x": ("S103", "output"),
    "lora_r=8": ("S103", "rank"),
    "lora_alpha=32": ("S103", "alpha"),
    "train.dropout=0.1": ("S103", "dropout"),
    "target_modules=[q_proj]": ("S103", "targets"),
    "generate.max_tokens=5": ("S103", "generate.max_new_tokens"),
    "train.gradient_checkpointing=true": ("S103", "train.recompute"),
    "use_gradient_checkpointing=true": ("S103", "train.recompute"),
    "bf16=true": ("S103", "model.dtype"),
    "load_in_4bit=true": ("S103", "model.quantize"),
    "peft_type=LORA": ("S103", "method"),
    "train.batch=1.5": ("S104", "a whole number"),
    "train.batch=lots": ("S104", "lots"),
    "train.batch=5,000": ("S104", "5,000"),
    "train.save_every=none": ("S104", "train.save_every"),
    "train.learning_rate=two": ("S104", "a number"),
    "train.learning_rate=2e-4x": ("S104", "2e-4x"),
    "model.trust_remote_code=maybe": ("S104", "true or false"),
    "data.map=question": ("S104", "prompt=question"),
    "train.batch=0": ("S105", "at least 1"),
    "train.warmup=100": ("S105", "Meant 0.1?"),
    "train.warmup=1": ("S105", "Meant 0.1?"),
    "train.seed=-1": ("S105", "at least 0"),
    "data.eval_share=1.5": ("S105", "below 1"),
    "data.eval_share=20": ("S105", "Meant 0.2?"),
    "train.learning_rate=20": ("S105", "Meant 2e-4?"),
    "train.learning_rate=2e-10": ("S105", "below the usual range"),
    "train.learning_rate=nan": ("S105", "nan"),
    "train.max_grad_norm=0": ("S105", "above 0"),
    "train.weight_decay=2": ("S105", "train.weight_decay"),
    "train.steps=0": ("S105", "train.steps"),
    "train.epochs=-1": ("S105", "train.epochs"),
    "train.accumulate=0": ("S105", "train.accumulate"),
    "train.eval_every=0": ("S105", "train.eval_every"),
    "train.early_stopping=0": ("S105", "train.early_stopping"),
    "train.keep_checkpoints=0": ("S105", "train.keep_checkpoints"),
    "train.threads=0": ("S105", "train.threads"),
    "train.max_length=0": ("S105", "train.max_length"),
    "data.max_rows=0": ("S105", "data.max_rows"),
    "generate.temperature=-1": ("S105", "generate.temperature"),
    "generate.top_p=0": ("S105", "generate.top_p"),
    "generate.samples=-2": ("S105", "generate.samples"),
    "model.dtype=int8": ("S106", "float32, bfloat16, float16"),
    "model.dtype=bf16": ("S106", "bfloat16"),
    "model.quantize=nf5": ("S106", "nf4"),
    "data.format=xlsx": ("S106", "csv"),
    "task=classification": ("S106", "classify"),
    "task=clasify": ("S106", "classify"),
    "train.schedule=cosin": ("S106", "cosine"),
    "train.recompute=block": ("S106", "blocks"),
    "noequals": ("S108", "name=value"),
    "train.batch=5 train.accumulate=2": ("S107", "train.accumulate"),
}


def words_of(text: str) -> list[str]:
    return [word for each in text.split(" ") for word in ("--set", each)]


@pytest.mark.parametrize("text", MISTAKES)
@pytest.mark.parametrize("verb", ["train"])
def test_it_is_answered_and_its_fix_works(text: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, names = MISTAKES[text]
    assert main([verb, *words_of(text)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert 2 <= len(lines) <= 12
    assert "Traceback" not in said.err
    assert f"[{code}]" in said.err
    assert names in said.err
    fix = shlex.split(next(line for line in lines if line.startswith("  fix: ")).removeprefix("  fix: "))
    assert fix[0] == "--set"
    kept = [word for word in text.split(" ") if word.partition("=")[0] != fix[1].partition("=")[0]]
    kept = kept if len(text.split(" ")) > 1 else []  # the wrong one is gone, what stood beside it stays
    resolve(sets=[*kept, *(word for word in fix if word != "--set")])


RIGHT = (
    "train.learning_rate=2e-4", "train.learning_rate=.0002", "train.batch=1", "train.batch=1e2", "train.epochs=0.5",
    "train.steps=1", "train.warmup=0", "train.warmup=0.5", "train.weight_decay=0", "train.seed=4294967295",
    "train.max_length=1", "train.threads=null", "train.recompute=blocks", "train.early_stopping=null",
    "data.path=/a b/c.csv", "data.path=ünï.csv", "data.map.prompt=question", "data.map=prompt=q,completion=a",
    "data.eval_share=0.999", "data.max_rows=1", "data.waive=D131,D132", "data.template=plain", "model.name=./models/x",
    "model.revision=v1.0", "model.dtype=float16", "method=full", "method=lora(rank=1)", "method=lora(rank=4)+bitfit",
    "task=auto", "generate.temperature=0", "generate.samples=0", "output=runs/a b",
)  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_odd_but_right_settings_pass(text: str) -> None:
    name = text.partition("=")[0]
    origin = resolve(sets=[text]).origin
    assert any(value != "default" for setting, value in origin.items() if name.startswith(setting))
