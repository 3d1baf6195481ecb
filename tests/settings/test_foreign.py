"""Names from other tools: each has an answer, and the answer is right."""

import pytest

from graftlm.errors import SettingsError
from graftlm.settings import FOREIGN, NO_COUNTERPART, SETTINGS, resolve


def findings(**sources):
    with pytest.raises(SettingsError) as caught:
        resolve(**sources)
    return caught.value.findings


def test_the_table_is_large_sorted_and_names_no_setting_of_ours():
    assert len(FOREIGN) >= 60
    assert list(FOREIGN) == sorted(FOREIGN)
    ours = SETTINGS.keys() | {setting.key for setting in SETTINGS.values()}
    assert not FOREIGN.keys() & ours
    assert not NO_COUNTERPART & (FOREIGN.keys() | ours)


@pytest.mark.parametrize(("name", "setting"), [("model.path", "model.name"), ("data.name", "data.path")])
def test_a_key_of_ours_in_another_section_may_be_a_foreign_name_there(name, setting):
    (finding,) = findings(python={name: "x"})
    assert (finding.code, finding.message) == ("S103", f"{name} is called {setting} here")


@pytest.mark.parametrize("name", FOREIGN)
def test_each_answer_names_an_existing_setting_and_reaches_the_user(name):
    foreign = FOREIGN[name]
    assert foreign.setting in SETTINGS
    (finding,) = findings(python={name: 1})
    assert finding.code == "S103"
    assert finding.message.startswith(f"{name} is ")
    assert (foreign.setting if not foreign.option else "the method's text") in finding.message


@pytest.mark.parametrize("name", sorted(NO_COUNTERPART))
def test_names_without_a_counterpart_are_said_to_have_none(name):
    (finding,) = findings(python={name: 1})
    assert "no counterpart" in finding.message


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("num_train_epochs", "train.epochs"),
        ("per_device_train_batch_size", "train.batch"),
        ("gradient_accumulation_steps", "train.accumulate"),
        ("lora_r", "method"),
        ("micro_batch_size", "train.batch"),
        ("cutoff_len", "train.max_length"),
        ("sequence_len", "train.max_length"),
        ("model_name_or_path", "model.name"),
        ("base_model", "model.name"),
        ("output_dir", "output"),
        ("load_in_4bit", "model.quantize"),
        ("lr_scheduler_type", "train.schedule"),
        ("warmup_ratio", "train.warmup"),
        ("max_seq_length", "train.max_length"),
        ("val_set_size", "data.eval_share"),
        ("dataset", "data.path"),
    ],
)
def test_the_well_known_names(name, setting):
    assert FOREIGN[name].setting == setting


def test_a_renamed_setting_is_answered_with_its_value_in_the_manner_of_its_source(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  num-train-epochs: 3\n")
    (finding,) = findings(file=file)
    assert finding.place == f"{file}:2:3"
    assert finding.message == "train.num-train-epochs is called train.epochs here"
    assert finding.fix == "train: {epochs: 3}"
    (finding,) = findings(sets=["train.lr=2e-4"])
    assert finding.fix == "--set train.learning_rate=2e-4"


def test_options_of_lora_become_one_method_text():
    said = findings(python={"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj"]})
    assert {finding.fix for finding in said} == {"method='lora(rank=8,alpha=16,dropout=0.05,targets=q_proj)'"}


def test_sections_of_other_tools_are_opened():
    said = findings(python={"lora_config": {"r": 8}, "training_args": {"num_train_epochs": 3, "learning_rate": 1e-4}})
    words = "\n".join(finding.message for finding in said)
    assert "lora_config.r is said in the method's text here, as rank" in words
    assert "training_args.num_train_epochs is called train.epochs here" in words
    assert "training_args.learning_rate belongs under train" in words


AXOLOTL = """\
base_model: some/llama
datasets:
  - path: x.jsonl
    type: alpaca
val_set_size: 0.05
output_dir: ./out
sequence_len: 4096
sample_packing: true
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
load_in_4bit: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
wandb_project:
weight_decay: 0.0
flash_attention: true
gradient_checkpointing: true
"""


def test_a_whole_file_of_another_tool_is_answered_in_one_error_of_twelve_lines(tmp_path):
    file = tmp_path / "axolotl.yaml"
    file.write_text(AXOLOTL)
    with pytest.raises(SettingsError) as caught:
        resolve(file=file)
    text = str(caught.value)
    assert len(text.splitlines()) <= 12
    assert "  ..." not in text.splitlines()
    for line in AXOLOTL.splitlines():
        if not line.startswith(" "):
            assert line.partition(":")[0] in text
    assert "fix: method: lora(rank=32,alpha=16,dropout=0.05)" in text
