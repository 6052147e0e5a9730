"""LLaMA-Factory's preference configurations as prefmill's: `prefmill import llamafactory CONFIG.yaml`.

Every key is translated, known to change no result, or refused: nothing is dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefmill.core.config import read_yaml
from prefmill.core.errors import ConfigError

_INFO = "dataset_info.json"
# Keys that say where to write, how to show it or how fast, and never what comes out.
_NO_EFFECT = {
    "do_train", "output_dir", "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers", "plot_loss",
    "ddp_timeout", "save_only_model", "logging_dir", "run_name", "resume_from_checkpoint", "cache_dir",
    "low_cpu_mem_usage", "use_fast_tokenizer", "include_num_input_tokens_seen", "print_param_status",
    "ddp_find_unused_parameters", "pad_to_multiple_of", "hub_model_id", "push_to_hub", "save_strategy",
    "logging_strategy", "per_device_eval_batch_size", "eval_strategy", "eval_steps", "do_eval",
    "dataloader_pin_memory", "tokenized_path", "preprocessing_batch_size", "flash_attn", "video_max_pixels",
    "video_min_pixels", "video_fps", "video_maxlen",
}  # fmt: skip
_SAME_NAME = (
    "model_name_or_path", "trust_remote_code", "learning_rate", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "seed", "per_device_train_batch_size", "logging_steps", "save_steps",
    "dataloader_num_workers", "deepspeed", "simpo_gamma",
)  # fmt: skip
# What LLaMA-Factory does where its file is silent and prefmill does something else.
_THEIR_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5, "lr_scheduler_type": "linear", "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0, "gradient_accumulation_steps": 1, "pref_loss": "sigmoid", "pref_beta": 0.1,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "cutoff_len": 2048, "dataset_dir": "data",
    "seed": 42,
}  # fmt: skip
_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo_mean", "simpo": "simpo"}
_COLUMNS = {
    "sharegpt": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "alpaca": {"prompt": "instruction", "query": "input", "history": "history", "chosen": "chosen",
               "rejected": "rejected"},
}  # fmt: skip
_TAGS = ("role", "content", "user", "assistant", "system")


class Imported(NamedTuple):
    """A configuration of the stage dpo, and what a reader should know about how it was made."""

    config: dict[str, Any]
    notes: list[str]


def import_config(path: Path, num_gpus: int = 1) -> Imported:
    """The configuration in `path`, a LLaMA-Factory YAML of the stage dpo, for prefmill's stage dpo.

    Raises ConfigError for keys that prefmill cannot honour, naming each.
    """
    given = read_yaml(path)
    rest = {**_THEIR_DEFAULTS, **given}
    _require(rest.pop("stage", "sft"), {"dpo"}, "stage", path)
    rest = {key: value for key, value in rest.items() if key not in _NO_EFFECT and value is not None}
    config: dict[str, Any] = {}
    notes: list[str] = []
    for step in (_dataset, _loss, _schedule, _adapter, _precision, _lengths):
        step(rest, config, notes, path)
    at_once = rest["per_device_train_batch_size"] * rest.pop("gradient_accumulation_steps") * num_gpus
    config["effective_batch_size"] = at_once
    notes.append(f"effective_batch_size {at_once} is that of {num_gpus} GPUs: import again with --gpus for another")
    config |= {key: rest.pop(key) for key in _SAME_NAME if key in rest}
    config["layout"] = "group"
    if rest:
        raise ConfigError(
            "keys that prefmill does not have", where=path, got=", ".join(f"{key}={rest[key]}" for key in sorted(rest)),
            fix="take them out of a copy of the file if you can do without them, and import that",
        )  # fmt: skip
    return Imported(config, notes)


Step = Callable[[dict[str, Any], dict[str, Any], list[str], Path], None]


def _dataset(rest: dict[str, Any], config: dict[str, Any], notes: list[str], path: Path) -> None:
    names = rest.pop("dataset", "")
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    if len(names) != 1 or not names[0]:
        raise ConfigError(
            "one dataset at a time", where=path, got=", ".join(names) or "none",
            fix="put the rows of several preference datasets into one file",
        )  # fmt: skip
    folder = Path(rest.pop("dataset_dir"))
    entry = _entry(folder, names[0])
    config |= _where(folder, entry)
    config["image_folder"] = str(rest.pop("media_dir", folder))
    if "max_samples" in rest:
        config["max_rows"] = rest.pop("max_samples")
    held_out = rest.pop("val_size", 0.0)
    if held_out >= 1:
        raise ConfigError("val_size as a number of rows is not known", where=path, fix="give val_size as a share")
    if held_out:
        config["val_fraction"] = float(held_out)
        notes.append("validation prompts are drawn with all of their pairs, so they are not LLaMA-Factory's rows")
    if rest.pop("packing", False) or rest.pop("streaming", False):
        raise ConfigError("packing and streaming are not options of prefmill", where=path, fix="set them to false")


def _entry(folder: Path, name: str) -> dict[str, Any]:
    """The registry's entry of a dataset, which must be one of preferences."""
    try:
        info = json.loads((folder / _INFO).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read LLaMA-Factory's dataset registry", where=folder / _INFO, got=error,
            fix="run this in the folder llamafactory-cli is run in, or set dataset_dir",
        ) from None  # fmt: skip
    if name not in info:
        raise ConfigError(
            f"no dataset '{name}' in the registry", where=folder / _INFO, expected=", ".join(info),
            fix="name one of these under `dataset`, or add it to the registry",
        )  # fmt: skip
    entry: dict[str, Any] = info[name]
    if not entry.get("ranking"):
        raise ConfigError(
            f"dataset '{name}' is not one of preferences", where=folder / _INFO, fix='its entry needs "ranking": true'
        )
    return entry


def _where(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A registry entry as keys of PairSource.

    Once `columns` or `tags` is there, LLaMA-Factory takes every name that it leaves out for None: so do we.
    """
    formatting = entry.get("formatting", "alpaca")
    known = _COLUMNS.get(formatting)
    if known is None or entry.get("script_url") or (entry.get("ms_hub_url") and not entry.get("hf_hub_url")):
        raise ConfigError(
            "this kind of dataset is not known", got=dict(entry), expected="a file or the hub",
            fix="give the entry a file_name or an hf_hub_url",
        )  # fmt: skip
    found: dict[str, Any] = {"pair_format": formatting}
    if "hf_hub_url" in entry:
        found |= {"dataset": entry["hf_hub_url"], "dataset_revision": entry.get("revision")}
        found |= {"subset": entry.get("subset"), "split": entry.get("split", "train")}
    else:
        found["dataset"] = str(folder / entry["file_name"])
    named = entry.get("columns", {})
    columns = {ours: named[theirs] for theirs, ours in known.items() if named.get(theirs)}
    columns |= {key: named[key] for key in ("system", "images") if named.get(key)}
    tags = {tag: entry["tags"][f"{tag}_tag"] for tag in _TAGS if entry.get("tags", {}).get(f"{tag}_tag")}
    found |= {"columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs}, "tags": tags}
    return {key: value for key, value in found.items() if value}


def _loss(rest: dict[str, Any], config: dict[str, Any], notes: list[str], path: Path) -> None:
    loss = rest.pop("pref_loss")
    _require(loss, set(_LOSSES), "pref_loss", path)
    config |= {"beta": rest.pop("pref_beta"), "loss_type": [_LOSSES[loss]], "loss_weights": [1.0]}
    config["label_smoothing"] = rest.pop("dpo_label_smoothing", 0.0)
    anchor = rest.pop("pref_ftx", 0.0)
    if anchor:
        config["loss_type"].append("sft")
        config["loss_weights"].append(float(anchor))
    if rest.pop("pref_bco_weight", 0.0):
        raise ConfigError("the BCO term is not known", where=path, fix="set pref_bco_weight to 0")


def _schedule(rest: dict[str, Any], config: dict[str, Any], notes: list[str], path: Path) -> None:
    epochs = float(rest.pop("num_train_epochs"))
    if epochs != int(epochs) or rest.pop("max_steps", -1) > 0:
        raise ConfigError("training takes whole epochs", where=path, fix="give num_train_epochs, without max_steps")
    config["num_train_epochs"] = int(epochs)
    ratio, steps = rest.pop("warmup_ratio", 0.0), rest.pop("warmup_steps", 0)
    config["warmup_steps"] = float(steps or ratio)
    reports = rest.pop("report_to", "none")
    reports = [reports] if isinstance(reports, str) else list(reports)
    config["report_to"] = [name for name in reports if name in ("tensorboard", "wandb", "trackio")]


def _adapter(rest: dict[str, Any], config: dict[str, Any], notes: list[str], path: Path) -> None:
    kind = rest.pop("finetuning_type")
    _require(kind, {"full", "lora"}, "finetuning_type", path)
    rank, target = rest.pop("lora_rank"), rest.pop("lora_target")
    alpha, dora = rest.pop("lora_alpha", 2 * rank), rest.pop("use_dora", False)
    if kind == "lora":
        modules = "all-linear" if target == "all" else [name.strip() for name in target.split(",")]
        config["lora"] = {"r": rank, "alpha": float(alpha), "use_dora": dora, "target_modules": modules}
    if rest.pop("lora_dropout", 0.0):
        raise ConfigError("dropout is off in preference training", where=path, fix="set lora_dropout to 0")
    if "images" in config.get("columns", {}) or rest.get("freeze_vision_tower") is not None:
        _vision(rest, kind, path)


def _vision(rest: dict[str, Any], kind: str, path: Path) -> None:
    frozen = [key for key in ("freeze_vision_tower", "freeze_multi_modal_projector") if rest.pop(key, True)]
    if kind == "full" and frozen:
        raise ConfigError(
            "prefmill trains the vision part too", where=path, got=", ".join(f"{key}: true" for key in frozen),
            fix="set them to false in a copy of the file",
        )  # fmt: skip
    rest.pop("freeze_language_model", None)


def _precision(rest: dict[str, Any], config: dict[str, Any], notes: list[str], path: Path) -> None:
    bf16, fp16 = rest.pop("bf16", False), rest.pop("fp16", False)
    config["precision"] = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    config["activation_checkpointing"] = not rest.pop("disable_gradient_checkpointing", False)


def _lengths(rest: dict[str, Any], config: dict[str, Any], notes: list[str], path: Path) -> None:
    config |= {"max_length": rest.pop("cutoff_len"), "on_overlong": "drop"}
    notes.append("rows over max_length are left out and listed in the logs; LLaMA-Factory cuts them off")
    template = rest.pop("template", None)
    notes.append(f"chats are put together by the model's own chat template, not by LLaMA-Factory's '{template}'")
    for theirs, ours in (("image_max_pixels", "max_pixels"), ("image_min_pixels", "min_pixels")):
        if theirs in rest:
            config[ours] = rest.pop(theirs)


def _require(value: Any, known: set[str], key: str, path: Path) -> None:
    if value not in known:
        raise ConfigError(
            f"prefmill's dpo does not take over this {key}", where=path, got=value, expected=", ".join(sorted(known)),
            fix="other stages and losses: see docs/stages/",
        )  # fmt: skip
