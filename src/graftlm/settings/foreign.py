"""The names that people bring from other tools, each with the setting that it is here.

Read from peft, transformers and TRL, axolotl, LLaMA-Factory, litgpt, Unsloth, torchtune and mlx-lm. A name that
means the same is answered with its setting and value; one that means something near is answered with the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FOREIGN", "NO_COUNTERPART", "Foreign", "known_elsewhere"]


@dataclass(frozen=True)
class Foreign:
    """What a foreign name is here: a `setting`, how it differs (`note`), or the method's own `option`."""

    setting: str
    note: str = ""
    option: str = ""


_SAME = {
    "train.epochs": "num_train_epochs num_epochs n_epochs epoch max_epochs nb_epochs",
    "train.steps": "max_steps max_iters iters num_steps train_steps max_train_steps num_training_steps",
    "train.learning_rate": "lr base_lr max_lr peak_lr",
    "train.batch": "global_batch_size",
    "train.accumulate": "gradient_accumulation_steps gradient_accumulation grad_accumulation grad_accum"
    " accumulation_steps gradient_accumulation_iters accumulate_grad_batches",
    "train.max_length": "max_seq_length max_seq_len cutoff_len sequence_len seq_length block_size model_max_length"
    " max_length_tokens context_length",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "train.warmup": "warmup_ratio lr_warmup_fraction warmup_fraction",
    "train.max_grad_norm": "max_norm gradient_clipping gradient_clip_val clip_grad_norm grad_clip",
    "train.weight_decay": "wd adam_weight_decay",
    "train.seed": "random_state random_seed data_seed",
    "train.eval_every": "eval_steps steps_per_eval eval_interval",
    "train.save_every": "save_steps save_interval checkpointing_steps",
    "train.keep_checkpoints": "save_total_limit",
    "train.early_stopping": "early_stopping_patience patience",
    "train.recompute": "recompute_granularity",
    "train.threads": "num_threads",
    "train.packing": "sample_packing use_packing",
    "preferences.beta": "dpo_beta pref_beta kto_beta",
    "preferences.loss": "loss_type pref_loss",
    "preferences.smoothing": "label_smoothing dpo_label_smoothing cdpo_label_smoothing",
    "preferences.wanted_weight": "desirable_weight kto_chosen_weight kto_desirable_weight",
    "preferences.unwanted_weight": "undesirable_weight kto_rejected_weight kto_undesirable_weight",
    "model.name": "base model_name_or_path base_model model_name base_model_name base_model_name_or_path"
    " pretrained_model pretrained_model_name_or_path model_id model_path checkpoint_dir"
    " model.path model.id model.model",
    "model.revision": "model_revision revision_of_model base_model_revision",
    "model.dtype": "torch_dtype precision mixed_precision",
    "data.path": "dataset datasets dataset_name dataset_path data_path data_file data_files train_file train_data"
    " train_path train_dataset json_path dataset_dir data.name data.file data.train data.dataset",
    "data.eval_path": "eval_dataset test_datasets validation_file eval_file eval_data valid_file test_file",
    "data.eval_share": "val_split_fraction validation_split test_size",
    "data.max_rows": "max_samples max_train_samples",
    "data.format": "dataset_format ds_type",
    "data.template": "chat_template template_name",
    "generate.max_new_tokens": "max_tokens eval_max_new_tokens generation_max_length max_completion_length",
    "output": "output_dir out_dir save_dir save_path adapter_path run_name logging_dir",
}

_NEAR = {
    "per_device_train_batch_size": ("train.batch", "rows per optimizer step, all devices and parts together"),
    "per_gpu_train_batch_size": ("train.batch", "rows per optimizer step, all devices and parts together"),
    "micro_batch_size": ("train.batch", "rows per optimizer step, all parts together"),
    "train_batch_size": ("train.batch", "rows per optimizer step"),
    "batch_size": ("train.batch", "rows per optimizer step"),
    "warmup_steps": ("train.warmup", "a share of the steps such as 0.06, not a count"),
    "lr_warmup_steps": ("train.warmup", "a share of the steps such as 0.06, not a count"),
    "num_warmup_steps": ("train.warmup", "a share of the steps such as 0.06, not a count"),
    "val_set_size": ("data.eval_share", "a share of the rows such as 0.05, not a count"),
    "val_size": ("data.eval_share", "a share of the rows such as 0.05, not a count"),
    "eval_strategy": ("train.eval_every", "a number of steps"),
    "evaluation_strategy": ("train.eval_every", "a number of steps"),
    "evals_per_epoch": ("train.eval_every", "a number of steps"),
    "save_strategy": ("train.save_every", "a number of steps"),
    "saves_per_epoch": ("train.save_every", "a number of steps"),
    "gradient_checkpointing": ("train.recompute", "recompute: blocks"),
    "use_gradient_checkpointing": ("train.recompute", "recompute: blocks"),
    "grad_checkpoint": ("train.recompute", "recompute: blocks"),
    "activation_checkpointing": ("train.recompute", "recompute: blocks"),
    "enable_activation_checkpointing": ("train.recompute", "recompute: blocks"),
    "bf16": ("model.dtype", "dtype: bfloat16"),
    "fp16": ("model.dtype", "dtype: float16"),
    "fp32": ("model.dtype", "dtype: float32"),
    "load_in_4bit": ("model.quantize", "quantize: nf4"),
    "load_in_8bit": ("model.quantize", "quantize: int8"),
    "quantization_bit": ("model.quantize", "quantize: nf4 for 4 bits"),
    "quantization_config": ("model.quantize", "quantize: nf4 for 4 bits"),
    "bnb_4bit_quant_type": ("model.quantize", "quantize: nf4"),
    "optim": ("train.optimizer", "optimizer: adamw, adamw_8bit, paged_adamw or paged_adamw_8bit"),
    "adam8bit": ("train.optimizer", "optimizer: adamw_8bit"),
    "dataset_text_field": ("data.map", "map: {text: <column>}"),
    "text_column": ("data.map", "map: {text: <column>}"),
    "label_column": ("data.map", "map: {label: <column>}"),
    "column_mapping": ("data.map", "map: {prompt: <column>, completion: <column>}"),
    "do_sample": ("generate.temperature", "temperature: 0 takes the likeliest token, above 0 samples"),
    "stage": ("task", "task: sft, lm or classify"),
    "task_type": ("task", "task: sft, lm or classify"),
    "use_peft": ("method", "always, except with method: full"),
    "finetuning_type": ("method", "method: lora(rank=16) or method: full"),
    "fine_tune_type": ("method", "method: lora(rank=16) or method: full"),
    "peft_type": ("method", "method: lora(rank=16)"),
    "peft_config": ("method", "method: lora(rank=16)"),
    "lora_config": ("method", "method: lora(rank=16)"),
    "lora_parameters": ("method", "method: lora(rank=16)"),
    "lora": ("method", "method: lora(rank=16)"),
    "peft": ("method", "method: lora(rank=16)"),
    "adapter": ("method", "method: lora(rank=16)"),
    "full_finetuning": ("method", "method: full"),
    "use_dora": ("method", "a method of its own, in the method's text"),
    "peft_use_dora": ("method", "a method of its own, in the method's text"),
    "use_rslora": ("method", "an option in the method's text"),
    "peft_use_rslora": ("method", "an option in the method's text"),
    "modules_to_save": ("method", "an option in the method's text"),
    "lora_modules_to_save": ("method", "an option in the method's text"),
    "num_virtual_tokens": ("method", "the length in the method's text"),
    "lora_target_linear": ("method", "method: lora(targets=all-linear)"),
    "init_lora_weights": ("method", "an option in the method's text"),
    "layers_to_transform": ("method", "an option in the method's text"),
    "lora_layers": ("method", "an option in the method's text"),
    "lora_bias": ("method", "an option in the method's text"),
}

_OPTION = {
    "rank": "lora_r lora_rank r rank",
    "alpha": "lora_alpha alpha",
    "dropout": "lora_dropout dropout",
    "targets": "lora_target_modules target_modules lora_target lora_targets targets",
}

FOREIGN: dict[str, Foreign] = dict(
    sorted(
        {
            **{word: Foreign(setting) for setting, words in _SAME.items() for word in words.split()},
            **{word: Foreign(setting, note) for word, (setting, note) in _NEAR.items()},
            **{word: Foreign("method", option=option) for option, words in _OPTION.items() for word in words.split()},
        }.items()
    )
)
"""Foreign name (in lower case, with underscores) to what it is here; a dotted name counts only at that place."""

NO_COUNTERPART: frozenset[str] = frozenset(
    """
    logging_steps log_interval log_every_n_steps logging_first_step report_to wandb_project wandb_entity wandb_run_id
    tracking_project push_to_hub hub_model_id hub_strategy flash_attention attn_implementation use_unsloth
    adam_beta1 adam_beta2 adam_epsilon min_lr dataloader_num_workers num_workers
    preprocessing_num_workers dataset_num_proc dataset_processes dataset_prepared_path overwrite_cache
    overwrite_output_dir per_device_eval_batch_size eval_batch_size eval_sample_packing
    pad_to_sequence_len train_on_inputs remove_unused_columns ddp_timeout deepspeed fsdp fsdp_config
    local_rank tf32 plot_loss special_tokens fan_in_fan_out inference_mode
    ddp_find_unused_parameters label_smoothing_factor strict tokenizer_type model_type resume_from_checkpoint
    auto_resume_from_checkpoints load_best_model_at_end metric_for_best_model greater_is_better
    """.split()  # noqa: SIM905
)
"""Foreign names that no setting stands for: a fixed choice here, or not a matter of the run file."""


def known_elsewhere(name: str) -> Foreign | None:
    """What the foreign dotted `name` is here, by the whole name or by its last part.

    Example:
        >>> known_elsewhere("train.num-train-epochs")
        Foreign(setting='train.epochs', note='', option='')
    """
    plain = name.lower().replace("-", "_")
    return FOREIGN.get(plain) or FOREIGN.get(plain.rpartition(".")[2])
