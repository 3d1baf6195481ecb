"""Settings of other tools: what they mean here, and a line for everything that was changed or left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.errors import SettingsError
from graftlm.methods import read_method
from graftlm.settings import SETTINGS, resolve, to_yaml, translate

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


REAL = {
    # docs of axolotl: examples/llama-3/qlora.yml
    "axolotl.yml": """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, q_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
logging_steps: 1
warmup_ratio: 0.1
evals_per_epoch: 4
special_tokens:
  pad_token: "<|end_of_text|>"
""",
    # LLaMA-Factory: examples/train_lora/llama3_lora_dpo.yaml
    "factory.yaml": """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo,more
template: llama3
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
save_steps: 0.1
""",
    # TRL: a recipe of the alignment handbook
    "trl.yaml": """
model_name_or_path: Qwen/Qwen2.5-1.5B
torch_dtype: bfloat16
dataset_name: HuggingFaceH4/Bespoke-Stratos-17k
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
learning_rate: 1.0e-05
lr_scheduler_type: cosine_with_min_lr
max_seq_length: 16384
max_steps: -1
num_train_epochs: 1
per_device_train_batch_size: auto
packing: true
report_to: [wandb]
use_peft: true
lora_r: 16
""",
    # peft writes these
    "lora.json": """{"base_model_name_or_path": "x/y", "bias": "none", "init_lora_weights": "pissa", "lora_alpha": 16,
 "layers_to_transform": [0, 1], "lora_bias": false, "peft_type": "LORA", "r": 8, "target_modules": ["q_proj"],
 "task_type": "CAUSAL_LM", "use_dora": false, "use_rslora": true}""",
    "ia3.json": """{"peft_type": "IA3", "target_modules": ["k", "down"], "feedforward_modules": ["down"],
 "init_ia3_weights": true, "task_type": "SEQ_2_SEQ_LM"}""",
    "prefix.json": """{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20, "encoder_hidden_size": 768,
 "prefix_projection": true, "token_dim": 768, "task_type": "TOKEN_CLS"}""",
    "plain prefix.json": """{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20, "encoder_hidden_size": 768,
 "prefix_projection": false, "task_type": "SEQ_CLS"}""",
    "adalora.json": '{"peft_type": "ADALORA", "init_r": 12, "target_r": 4, "lora_alpha": 32, "tinit": 200}',
}


@pytest.mark.parametrize(
    ("name", "expected", "left_out"),
    [
        ("axolotl.yml", {"method": "lora(rank=32,alpha=16,dropout=0.05,targets=[gate_proj,q_proj])", "train.batch": 8,
                         "model.quantize": "nf4", "train.packing": True, "train.recompute": "blocks", "train.optimizer": "adamw_8bit"},
         ("type: alpaca", "a data set's name", "evals_per_epoch")),
        ("factory.yaml", {"task": "dpo", "model.quantize": "nf4", "preferences.beta": 0.1, "data.path": "dpo_en_demo",
                          "data.template": None, "train.save_every": None, "train.batch": 8},
         ("template: llama3", "1 of 2", "train.save_every is 0.1", "do_train")),
        ("trl.yaml", {"train.schedule": "cosine", "train.epochs": 1.0, "train.steps": None, "model.dtype": "bfloat16",
                      "method": "lora(rank=16)", "train.max_length": 16384},
         ("per_device_train_batch_size: auto", "report_to", "gradient_checkpointing_kwargs")),
        ("lora.json", {"method": "pissa(alpha=16,layers=[0,1],rank=8,targets=[q_proj],rslora=true)", "task": "sft"}, ()),
        ("ia3.json", {"method": "ia3(targets=[k,down],feedforward=[down])", "task": "seq2seq"}, ()),
        ("prefix.json", {"method": "prefix(length=20,mlp=768)", "task": "tag"}, ("token_dim",)),
        ("plain prefix.json", {"method": "prefix(length=20)", "task": "classify"}, ()),
        ("adalora.json", {"method": "adalora(rank=12,target_rank=4,alpha=32)"}, ("tinit",)),
    ],
)  # fmt: skip
def test_files_as_they_are_found(name: str, expected: dict, left_out: tuple[str, ...], tmp_path: Path) -> None:
    found = settings_of(REAL[name], tmp_path, name)
    assert {key: SETTINGS[key].of(found.settings) for key in expected} == expected
    for part in left_out:
        assert any(part in line for line in found.left_out), found.left_out
    read_method(found.settings.method)
    (tmp_path / "run.yaml").write_text(to_yaml(found.settings, only_changed=False), encoding="utf-8")
    assert resolve(tmp_path / "run.yaml").settings == found.settings
