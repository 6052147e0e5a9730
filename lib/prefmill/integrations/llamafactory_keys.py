"""Every key of LLaMA-Factory's example files, and what becomes of it: `prefmill import llamafactory --keys`.

A key that is refused is so where it is set: `false`, `none` and 0 change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

TAKEN: Mapping[str, str] = {
    "stage": "the stage: sft or dpo", "model_name_or_path": "model_name_or_path",
    "model_revision": "revision", "moe_aux_loss_coef": "of sft: router_aux_loss_coef",
    "trust_remote_code": "trust_remote_code", "adapter_name_or_path": "lora.start; of dpo also ref_name",
    "finetuning_type": "lora, or none", "lora_rank": "lora.r", "lora_alpha": "lora.alpha", "use_dora": "lora.use_dora",
    "use_rslora": "lora.alpha, times the root of the rank", "lora_target": "lora.target_modules",
    "freeze_vision_tower": "freeze_vision_tower", "freeze_multi_modal_projector": "freeze_projector",
    "freeze_language_model": "freeze_language_model",
    "quantization_bit": "quantization, 4 alone", "quantization_method": "bnb alone",
    "double_quantization": "true alone, as by default",
    "ref_model": "ref_name", "pref_beta": "beta", "pref_loss": "loss_type", "pref_ftx": "loss_type, loss_weights",
    "simpo_gamma": "simpo_gamma", "dpo_label_smoothing": "label_smoothing",
    "dataset": "dataset or mixture, pair_format, columns, tags", "dataset_dir": "dataset", "media_dir": "image_folder",
    "max_samples": "max_rows", "val_size": "val_fraction", "mask_history": "train_on", "cutoff_len": "max_length",
    "enable_thinking": "chat_template_kwargs", "image_max_pixels": "max_pixels", "image_min_pixels": "min_pixels",
    "learning_rate": "learning_rate", "num_train_epochs": "num_train_epochs", "lr_scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps", "warmup_steps": "warmup_steps", "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm", "optim": "optim", "seed": "seed", "bf16": "precision", "fp16": "precision",
    "per_device_train_batch_size": "per_device_train_batch_size, effective_batch_size",
    "gradient_accumulation_steps": "effective_batch_size", "disable_gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing": "activation_checkpointing", "flash_attn": "of sft: attn_implementation",
    "enable_liger_kernel": "of sft: use_liger_kernel", "deepspeed": "deepspeed", "fsdp": "fsdp",
    "ddp_timeout": "ddp_timeout", "logging_steps": "logging_steps", "save_steps": "save_steps",
    "save_total_limit": "save_total_limit", "dataloader_num_workers": "dataloader_num_workers",
    "report_to": "report_to", "lr_scheduler_kwargs": "lr_scheduler_kwargs",
}  # fmt: skip

_SAVED = "where and how to save is prefmill's own"
_SPEED = "how fast, never what comes out"
_SHOWN = "how to show it"
_WRITTEN = "how to write answers, which no training does"
_EVALUATED = "evaluated at the end of every epoch, which changes no weight"
# A key in none of the three tables is refused, so that a new one of theirs is never dropped in silence.
NO_EFFECT: Mapping[str, str] = {
    "do_train": "a training it is", "output_dir": _SAVED, "overwrite_output_dir": _SAVED, "save_only_model": _SAVED,
    "save_strategy": _SAVED, "hub_model_id": _SAVED, "push_to_hub": _SAVED,
    "resume_from_checkpoint": "a training goes on from its newest checkpoint always",
    "overwrite_cache": _SPEED, "preprocessing_num_workers": _SPEED, "preprocessing_batch_size": _SPEED,
    "tokenized_path": _SPEED, "cache_dir": _SPEED, "low_cpu_mem_usage": _SPEED, "use_fast_tokenizer": _SPEED,
    "ddp_find_unused_parameters": _SPEED, "pad_to_multiple_of": _SPEED, "dataloader_pin_memory": _SPEED,
    "gradient_checkpointing_kwargs": _SPEED, "use_reentrant_gc": _SPEED, "use_unsloth_gc": _SPEED,
    "use_v1_kernels": _SPEED, "use_unsloth": _SPEED, "fsdp_transformer_layer_cls_to_wrap": _SPEED,
    "plot_loss": _SHOWN, "logging_dir": _SHOWN, "logging_strategy": _SHOWN, "run_name": _SHOWN,
    "include_num_input_tokens_seen": _SHOWN, "print_param_status": _SHOWN,
    "per_device_eval_batch_size": _EVALUATED, "eval_strategy": _EVALUATED, "eval_steps": _EVALUATED,
    "do_eval": _EVALUATED, "ray_num_workers": "ranks are started by prefmill",
    "video_max_pixels": "no videos", "video_min_pixels": "no videos", "video_fps": "no videos",
    "video_maxlen": "no videos",
    "compute_accuracy": _EVALUATED, "eval_on_each_dataset": _EVALUATED, "logging_first_step": _SHOWN,
    "use_swanlab": _SHOWN, "swanlab_project": _SHOWN, "swanlab_run_name": _SHOWN, "swanlab_workspace": _SHOWN,
    "swanlab_mode": _SHOWN, "swanlab_logdir": _SHOWN, "swanlab_api_key": _SHOWN, "use_kv_cache": _WRITTEN,
    "temperature": _WRITTEN, "top_p": _WRITTEN, "top_k": _WRITTEN, "do_sample": _WRITTEN, "num_beams": _WRITTEN,
    "repetition_penalty": _WRITTEN, "save_safetensors": _SAVED, "remove_unused_columns": "nothing else is in a row",
    "hf_hub_token": "the hub's token is read from HF_TOKEN", "data_shared_file_system": _SPEED,
    "lora_dropout": "0 is taken; any other is refused", "template": "the model's own chat template is used",
    "adam_beta1": "0.9 is taken; any other is refused", "adam_beta2": "0.999 is taken; any other is refused",
}  # fmt: skip

_OPTIMIZER = "another optimizer: see optim for those there are"
_LOSS = "another loss"
_ADAPTER = "another kind of adapter than LoRA and DoRA"
_QUANTIZED = "weights in another form than bf16, fp16 and fp32"
_MEGATRON = "Megatron's parallelism: fsdp or deepspeed shard here"
_V1 = "of LLaMA-Factory's v1 form of file, which has other keys"
_OTHER_TASK = "no training: evaluate, vLLM or merging are other commands"
_KTRANSFORMERS = "KTransformers' placement of experts"
_FREEZE = "training a part of the layers as a whole"
_ARCHITECTURE = "changes the model's architecture"
REFUSED: Mapping[str, str] = {
    "max_steps": "trainings take whole epochs", "packing": "rows are not packed", "neat_packing": "rows are not packed",
    "streaming": "a dataset is read as a whole", "eval_dataset": "held-out prompts are a share: give val_size",
    "train_on_prompt": "prompts are not trained", "pure_bf16": "trained weights are kept in fp32: give bf16",
    "pref_bco_weight": _LOSS, "use_dft_loss": _LOSS, "use_asft_loss": _LOSS, "asft_alpha": _LOSS,
    "use_eaft_loss": _LOSS, "eaft_alpha": _LOSS,
    "ld_alpha": "there it weighs the policy's answers and not the reference's: set ld_alpha, which weighs both",
    "disable_shuffling": "rows are shuffled", "early_stopping_steps": "trainings take all their epochs",
    "tool_format": "the model's own chat template writes tools", "upcast_layernorm": _QUANTIZED,
    "preserve_thinking": "give chat_template_kwargs", "train_from_scratch": "a model's weights are the start",
    "add_tokens": _ARCHITECTURE, "add_special_tokens": _ARCHITECTURE, "new_special_tokens_config": _ARCHITECTURE,
    "use_mca": _MEGATRON, "use_megatron_bridge": _MEGATRON, "freeze_extra_modules": _FREEZE,
    "neftune_noise_alpha": "no noise in embeddings", "default_system": "write the system text into the rows",
    "ref_model_adapters": "name an adapter's folder as ref_model", "create_new_adapter": "merge the first adapter",
    "additional_target": "only the adapter is trained beside a frozen base",
    "loraplus_lr_ratio": "one learning rate for both halves of an adapter", "use_galore": _OPTIMIZER,
    "galore_layerwise": _OPTIMIZER, "galore_rank": _OPTIMIZER, "galore_scale": _OPTIMIZER, "galore_target": _OPTIMIZER,
    "use_apollo": _OPTIMIZER, "apollo_layerwise": _OPTIMIZER, "apollo_rank": _OPTIMIZER, "apollo_scale": _OPTIMIZER,
    "apollo_scale_type": _OPTIMIZER, "apollo_target": _OPTIMIZER, "use_badam": _OPTIMIZER, "badam_mode": _OPTIMIZER,
    "badam_switch_interval": _OPTIMIZER, "badam_switch_mode": _OPTIMIZER, "badam_verbose": _OPTIMIZER,
    "use_adam_mini": _OPTIMIZER, "use_muon": _OPTIMIZER, "pissa_init": _ADAPTER, "pissa_iter": _ADAPTER,
    "pissa_convert": _ADAPTER, "oft_block_size": _ADAPTER, "oft_target": _ADAPTER, "use_llama_pro": _FREEZE,
    "freeze_trainable_layers": _FREEZE, "freeze_trainable_modules": _FREEZE, "mixture_of_depths": _ARCHITECTURE,
    "rope_scaling": _ARCHITECTURE, "resize_vocab": _ARCHITECTURE, "shift_attn": _ARCHITECTURE,
    "fp8": _QUANTIZED, "fp8_backend": _QUANTIZED, "fp8_enable_fsdp_float8_all_gather": _QUANTIZED,
    "do_predict": _OTHER_TASK, "predict_with_generate": _OTHER_TASK, "infer_backend": _OTHER_TASK,
    "export_dir": _OTHER_TASK, "export_device": _OTHER_TASK, "export_legacy_format": _OTHER_TASK,
    "export_size": _OTHER_TASK, "export_quantization_bit": _OTHER_TASK, "export_quantization_dataset": _OTHER_TASK,
    "use_kt": _KTRANSFORMERS, "kt_config": _KTRANSFORMERS, "kt_cpu_activation": _KTRANSFORMERS,
    "kt_weight_path": _KTRANSFORMERS, "kt_non_expert_weight_path": _KTRANSFORMERS,
    "apply_rope_fusion": _MEGATRON, "bias_activation_fusion": _MEGATRON, "context_parallel_size": _MEGATRON,
    "expert_model_parallel_size": _MEGATRON, "export_hf_on_finish": _MEGATRON, "mixed_precision": _MEGATRON,
    "moe_grouped_gemm": _MEGATRON, "moe_token_dispatcher_type": _MEGATRON, "overlap_grad_reduce": _MEGATRON,
    "overlap_param_gather": _MEGATRON, "pipeline_model_parallel_size": _MEGATRON, "recompute_granularity": _MEGATRON,
    "sequence_parallel": _MEGATRON, "tensor_model_parallel_size": _MEGATRON, "use_distributed_optimizer": _MEGATRON,
    "use_packed_sequences": _MEGATRON, "model": _V1, "model_class": _V1, "train_dataset": _V1, "micro_batch_size": _V1,
    "batching_strategy": _V1, "cp_mode": _V1, "cp_size": _V1, "dist_config": _V1, "init_config": _V1,
    "kernel_config": _V1, "max_new_tokens": _V1, "optim_config": _V1, "peft_config": _V1, "quant_config": _V1,
    "sample_backend": _V1,
}  # fmt: skip


def describe_keys() -> Iterator[str]:
    """A line for every key: its name, the verdict, and prefmill's key or the reason."""
    rows = [
        (key, verdict, said)
        for verdict, keys in (("taken", TAKEN), ("no effect", NO_EFFECT), ("refused", REFUSED))
        for key, said in keys.items()
    ]
    for key, verdict, said in sorted(rows):
        yield f"{key:<34} {verdict:<10} {said}"
