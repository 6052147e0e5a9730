"""A DeepSpeed file as people bring it: used, or refused where it and the training's own keys say different things.

Read without DeepSpeed, whose import takes seconds and asks for GPUs: a plan reads the file too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hjson

from prefmill.core.errors import ConfigError, nearest

_SAME = {
    "train_batch_size": "effective_batch_size", "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_clipping": "max_grad_norm", "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
}  # fmt: skip
_ADAM = {"optimizer.params.betas": [0.9, 0.999], "optimizer.params.eps": 1e-8}  # the Trainer's
_ACCUMULATION = "gradient_accumulation_steps"
_PRECISIONS = ("bf16", "fp16")
# DeepSpeed looks at these in any training; at a top-level name it does not know it never complains.
_KEPT = frozenset((
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "disable_allgather", "data_types", "aio", "checkpoint",
    "flops_profiler", "comms_logger", "tensorboard", "wandb", "comet", "csv_monitor", "log_level", "timers",
))  # fmt: skip
_FOLLOWED = ("train_batch_size", "train_micro_batch_size_per_gpu", _ACCUMULATION, "gradient_clipping", *_PRECISIONS)
_ELSEWHERE = {
    "scheduler": "lr_scheduler_type and warmup_steps say the schedule (DeepSpeed's WarmupLR is constant_with_warmup, "
    "WarmupDecayLR linear, WarmupCosineLR cosine)",
    "activation_checkpointing": "activation_checkpointing=true has the model do it",
    "amp": "precision says it", "torch_autocast": "precision says it",
}  # fmt: skip
ZERO = frozenset((
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1",
    "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
    "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory", "leaf_module",
))  # fmt: skip


def deepspeed_settings(path: Path) -> dict[str, Any]:
    """A DeepSpeed file, comments allowed as DeepSpeed does; raises ConfigError where it is none or cannot be used."""
    try:
        text = path.read_text("utf-8-sig")
        _require_deepspeeds(path, text)
        settings = hjson.loads(text, object_pairs_hook=_each_key_once)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read the DeepSpeed file", where=path, got=str(error), expected="a JSON file",
            fix="give deepspeed the path of one, such as configs/deepspeed/zero3.json",
        ) from None  # fmt: skip
    _require_objects(path, settings)
    if "bfloat16" in settings:  # its name before bf16
        settings["bf16"] = settings.pop("bfloat16")
    _require_known(path, settings)
    return dict(settings)


def zero_stage(path: Path | None) -> int:
    """The stage of ZeRO that a DeepSpeed file asks for: 0 where there is no file, or nothing of it in there."""
    return 0 if path is None else int(deepspeed_settings(path).get("zero_optimization", {}).get("stage", 0))


def require_agreement(path: Path, config: object) -> None:
    """Raise ConfigError where a DeepSpeed file and the training's own keys say different things."""
    settings = deepspeed_settings(path)
    name, optim = settings.get("optimizer", {}).get("type", "AdamW"), getattr(config, "optim", None)
    if str(name).lower() not in ("adam", "adamw") or not str(optim or "adamw").startswith("adamw"):
        raise _refused(path, f"optimizer: {name}, and optim: {optim}", "optim says the optimizer")
    names = _SAME | dict.fromkeys(_ADAM, "the Trainer's") | {f"{name}.enabled": "precision" for name in _PRECISIONS}
    expected = {key: getattr(config, name) for key, name in _SAME.items()} | _ADAM
    expected |= {f"{name}.enabled": getattr(config, "precision", None) == name for name in _PRECISIONS}
    other = [
        f"{key}: {json.dumps(found)}, and {names[key]}: {getattr(config, names[key], expected[key])}"
        for key, found in _given(settings)
        if key in expected and found != expected[key]
    ]
    steps = settings.get(_ACCUMULATION)
    most = expected["train_batch_size"] // expected["train_micro_batch_size_per_gpu"]
    # How many ranks there will be is not known here: refused where no number of them makes this accumulation.
    divides = isinstance(steps, int) and steps > 0 and most % steps == 0
    if steps not in ("auto", None) and not divides:
        batches = "effective_batch_size / per_device_train_batch_size"
        other.append(f"{_ACCUMULATION}: {json.dumps(steps)}, and {batches}: {most}, on all ranks together")
    if other:
        raise _differs(path, other)


def require_accumulation(path: Path | None, steps: int) -> None:
    """Raise ConfigError where a DeepSpeed file accumulates other than `steps` microbatches."""
    found = "auto" if path is None else deepspeed_settings(path).get(_ACCUMULATION, "auto")
    if path is not None and found not in ("auto", steps):
        follows = f"effective_batch_size / (per_device_train_batch_size x ranks): {steps}"
        raise _differs(path, [f"{_ACCUMULATION}: {json.dumps(found)}, and {follows}"])


def following(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed settings in which the training's keys, with which they were compared, say what both could say.

    Their AdamW is the Trainer's own, which DeepSpeed then divides.
    """
    # The whole batch follows from the rest; weights are shared before DeepSpeed knows of other ranks than its own.
    rest = {key: value for key, value in settings.items() if key not in ("optimizer", "train_batch_size")}
    rest |= {key: "auto" for key in _FOLLOWED if key not in (*_PRECISIONS, "train_batch_size")}
    return rest | {name: {**settings.get(name, {}), "enabled": "auto"} for name in _PRECISIONS}


def _given(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _given(value, f"{prefix}{key}.")
        elif value not in ("auto", None):
            yield prefix + key, value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice among " + ", ".join(found))
    return found


def _require_deepspeeds(path: Path, text: str) -> None:
    """Raise ConfigError for the files that people have beside it: Accelerate's, and those of the Trainer's FSDP."""
    accelerate = re.search(r"\b(compute_environment|distributed_type)\b", text)
    if not accelerate and ("zero_optimization" in text or not re.search(r"fsdp|layer_cls_to_wrap", text, re.I)):
        return
    stage = re.search(r"zero_stage\W+([1-3])", text)
    ours = f"deepspeed=configs/deepspeed/zero{stage[1]}.json" if stage else "deepspeed=null fsdp=true, which is FSDP2"
    raise ConfigError(
        f"no DeepSpeed file but a configuration of {'Accelerate' if accelerate else 'FSDP'}", where=path,
        expected="a JSON file with zero_optimization", fix=f"{ours}; `processes` says how many ranks there are",
    )  # fmt: skip


def _require_objects(path: Path, settings: Any) -> None:
    if isinstance(settings, dict):
        zero = settings.get("zero_optimization", {})
        sections = {name: settings.get(name, {}) for name in ("zero_optimization", "optimizer", *_PRECISIONS)}
        parts = zero if isinstance(zero, dict) else {}
        sections |= {name: parts.get(name) or {} for name in ("offload_optimizer", "offload_param")}
        stage = parts.get("stage", 0)
    else:
        sections, stage = {"the file": settings}, 0
    wrong = {name: value for name, value in sections.items() if not isinstance(value, dict)}
    # true equals 1, and "3" was taken for 3 in one place and for no stage in another.
    wrong |= {} if type(stage) is int and stage in range(4) else {"zero_optimization.stage": stage}
    for name, value in wrong.items():
        raise ConfigError(
            f"no DeepSpeed settings: {name} is of another kind", where=path, got=json.dumps(value)[:100],
            expected="0, 1, 2 or 3" if name.endswith("stage") else "an object in braces",
            fix='write {"zero_optimization": {"stage": 3}}, as configs/deepspeed/zero3.json does',
        )  # fmt: skip


def _require_known(path: Path, settings: dict[str, Any]) -> None:
    zero, known = settings.get("zero_optimization", {}), {*_KEPT, *_FOLLOWED, "optimizer"}
    for key, value in settings.items():
        off = isinstance(value, dict) and (value.get("enabled") is False or not any(value.values()))
        if key in known or off or not value:
            continue
        raise _refused(path, key, _ELSEWHERE.get(key, f"prefmill does not train by it{nearest(key, sorted(known))}"))
    for key in zero:
        if key not in ZERO:
            raise _refused(path, f"zero_optimization.{key}", f"DeepSpeed has no such key{nearest(key, sorted(ZERO))}")
        if key.startswith("zero_quantized") and zero[key]:
            raise _refused(path, f"zero_optimization.{key}", "weights or gradients would be rounded on their way")
    if isinstance(checkpoint := settings.get("checkpoint"), dict) and checkpoint.get("load_universal"):
        raise _refused(path, "checkpoint.load_universal", "checkpoints are resumed as they were written")


def _refused(path: Path, got: str, reason: str) -> ConfigError:
    return ConfigError(
        "a part of the DeepSpeed file that is not used here", where=path, got=got,
        fix=f"remove it from the file: {reason}",
    )  # fmt: skip


def _differs(path: Path, other: list[str]) -> ConfigError:
    return ConfigError(
        "the DeepSpeed file and the training's keys say different things", where=path, got="\n".join(["", *other]),
        fix='write "auto" for it in the file: the training\'s keys then say it',
    )  # fmt: skip
