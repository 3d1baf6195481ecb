"""Settings of other tools: what they mean here, and a line for everything that was changed or left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.errors import SettingsError
from graftlm.settings import looks_foreign, resolve, to_yaml, translate

AXOLOTL = """
base_model: models/qwen
adapter: qlora
lora_r: 8
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 2e-4
datasets:
  - path: faq.jsonl
    type: alpaca
  - path: more.jsonl
gradient_checkpointing: true
sequence_len: 512
val_set_size: 0.05
wandb_project: faq
"""
FACTORY = """
model_name_or_path: models/qwen
stage: sft
finetuning_type: lora
lora_target: all
lora_rank: 4
cutoff_len: 256
per_device_train_batch_size: 4
max_steps: 100
warmup_steps: 10
lr_scheduler_type: cosine
bf16: true
report_to: none
"""
PEFT = '{"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["query"], "task_type": "SEQ_CLS", "use_dora": true}'


def settings_of(text: str, folder: Path, name: str = "other.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return translate(folder / name)


def test_axolotl(tmp_path: Path) -> None:
    found = settings_of(AXOLOTL, tmp_path)
    settings = found.settings
    assert settings.method == "lora(rank=8,alpha=32,targets=[q_proj,v_proj])"
    assert (settings.model.name, settings.model.quantize) == ("models/qwen", "nf4")
    assert (settings.train.batch, settings.train.accumulate, settings.train.epochs) == (8, 4, 3)
    assert (settings.train.learning_rate, settings.train.max_length) == (2e-4, 512)
    assert (settings.data.path, settings.data.eval_share, settings.train.recompute) == ("faq.jsonl", 0.05, "blocks")
    assert any(line.startswith("wandb_project: faq is left out") for line in found.left_out)
    assert any("1 of 2 are left out" in line for line in found.left_out)
    assert len(found.changed) > 8


def test_llama_factory(tmp_path: Path) -> None:
    settings = settings_of(FACTORY, tmp_path).settings
    assert settings.method == "lora(targets=all-linear,rank=4)"
    assert (settings.task, settings.model.dtype, settings.train.schedule) == ("sft", "bfloat16", "cosine")
    assert (settings.train.steps, settings.train.warmup, settings.train.batch) == (100, 0.1, 4)


def test_peft(tmp_path: Path) -> None:
    found = settings_of(PEFT, tmp_path, "adapter_config.json")
    assert found.settings.method == "dora(rank=16,alpha=16,targets=[query])"
    assert found.settings.task == "classify"


@pytest.mark.parametrize("text", [AXOLOTL, FACTORY, PEFT])
def test_what_is_written_reads_back_to_the_same(text: str, tmp_path: Path) -> None:
    settings = settings_of(text, tmp_path).settings
    (tmp_path / "run.yaml").write_text(to_yaml(settings, only_changed=False), encoding="utf-8")
    assert resolve(tmp_path / "run.yaml").settings == settings


@pytest.mark.parametrize(("text", "code"), [("[1, 2]", "S110"), ("a: [", "S110"), ("learning_rate: 20", "S105")])
def test_what_cannot_be_translated_is_told(text: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as told:
        settings_of(text, tmp_path)
    assert told.value.findings[0].code == code


def test_a_run_file_of_our_own_is_no_foreign_one() -> None:
    assert looks_foreign({"lora_r": 8, "num_train_epochs": 3, "output_dir": "x"})
    assert not looks_foreign({"train": {"batch": 4}, "method": "lora", "task": "sft"})
