"""Keys as other tools and older scripts call them: accepted with a note, or answered with the right one.

The page docs/coming-from-your-scripts.md lists them; a test holds it to these tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Accepted where the configuration has the second name and not the first.
ALIASES = {
    "policy_name": "model_name_or_path", "model_name": "model_name_or_path", "dataset_name": "dataset",
    "train_dataset": "dataset", "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
    "log_steps": "logging_steps", "gradient_checkpointing": "activation_checkpointing", "lr": "learning_rate",
    "max_len": "max_length", "max_seq_length": "max_length", "cutoff_len": "max_length", "pref_beta": "beta",
    "dpo_beta": "beta", "pref_loss": "loss_type", "warmup_ratio": "warmup_steps", "lr_scheduler": "lr_scheduler_type",
    "num_workers": "dataloader_num_workers", "mount_dir": "workspace", "image_max_pixels": "max_pixels",
    "image_min_pixels": "min_pixels", "ref_model": "ref_name", "kl_beta": "beta", "base_model": "model_name_or_path",
    "sequence_len": "max_length", "micro_batch_size": "per_device_train_batch_size",
}  # fmt: skip
# Sections of the minimal DPO loop's file, whose keys are keys of the stage here.
SECTIONS = ("dataset", "dpo_training")
# Refused: what they say is said in another way.
REFUSED = {
    "gradient_accumulation_steps": "it follows from effective_batch_size = batch per device x accumulation x ranks",
    "mount_dir": "give workspace=DIR on the command line, or `workspace` in the pipeline's file",
    "output_dir": "outputs are checkpoints/RUN/STAGE/TASK: give run=NAME",
    "fsdp_config": "fsdp: true shards all, and finds the layers to wrap",
    "bf16": "write precision: bf16", "fp16": "write precision: fp16",
    "lora_r": "write lora.r", "lora_rank": "write lora.r", "lora_alpha": "write lora.alpha",
    "lora_target": "write lora.target_modules", "use_dora": "write lora.use_dora",
    "template": "the model's own chat template is used", "batch_size": "write engine.reviews_in_flight",
    "lora_target_modules": "write lora.target_modules", "use_peft": "write lora: {r: 16, alpha: 32}",
    "lora_dropout": "adapters are trained without dropout, in which policy and reference would differ",
    "load_in_4bit": "write quantization: 4bit", "dtype": "write precision", "torch_dtype": "write precision",
    "max_steps": "num_train_epochs and the number of rows say how many steps there are",
    "eval_strategy": "held-out rows are evaluated at the end of every epoch",
    "eval_steps": "held-out rows are evaluated at the end of every epoch",
    "per_device_eval_batch_size": "sft evaluates row by row, other stages by per_device_train_batch_size",
    "resume_from_checkpoint": "the same command resumes by itself; --force begins anew",
    "max_prompt_length": "max_length is of prompt and answer together, and nothing is cut",
    "max_completion_length": "max_length is of prompt and answer together, and nothing is cut",
    "precompute_ref_log_probs": "the reference is scored before the first step, and kept",
    "report": "write report_to", "logging_dir": "logs are logs/RUN/STAGE/TASK", "run_name": "give run=NAME",
    "adapter": "write lora: {r: 16, alpha: 32}", "val_set_size": "write val_fraction",
    "f_divergence_type": "objectives are of the reverse KL divergence; GroupDPOTrainer takes TRL's others",
    "push_to_hub": "the finished folder is published by hf upload",
}  # fmt: skip


def without_sections(fields: Collection[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the keys of an older file's sections among the others, where the configuration trains a model."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_section = key in SECTIONS and isinstance(value, Mapping) and "model_name_or_path" in fields
        flat |= value if is_section else {key: value}
    return flat


def aliases_in(fields: Collection[str], values: Mapping[str, Any]) -> dict[str, str]:
    """Of the keys given, those that are another name of a field, with its name."""
    return {key: ALIASES[key] for key in values if key not in fields and ALIASES.get(key) in fields}
