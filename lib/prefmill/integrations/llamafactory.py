"""LLaMA-Factory's configurations of sft and dpo as prefmill's: `prefmill import llamafactory CONFIG.yaml`.

Every key is translated, known to change no result, or refused: nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefmill.core.config import read_yaml
from prefmill.core.errors import ConfigError
from prefmill.integrations.llamafactory_data import Datasets
from prefmill.integrations.llamafactory_keys import NO_EFFECT, REFUSED, TAKEN

# What LLaMA-Factory does where its file is silent and prefmill does something else.
_THEIR_DEFAULTS: Mapping[str, Any] = {
    "stage": "sft", "learning_rate": 5e-5, "lr_scheduler_type": "linear", "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0, "gradient_accumulation_steps": 1, "pref_loss": "sigmoid", "pref_beta": 0.1,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "cutoff_len": 2048, "dataset_dir": "data",
    "seed": 42,
}  # fmt: skip
_SECRET = re.compile("token|secret|api_key|password")
# LLaMA-Factory scales images to these bounds where its file names none.
_THEIR_PIXELS = {"max_pixels": 768 * 768, "min_pixels": 32 * 32}
_SAME_NAME: Mapping[str, type | tuple[type, ...]] = {
    "model_name_or_path": str, "trust_remote_code": bool, "learning_rate": float, "lr_scheduler_type": str,
    "weight_decay": float, "max_grad_norm": float, "seed": int, "optim": str,
    "logging_steps": int, "save_steps": int, "save_total_limit": int, "dataloader_num_workers": int, "deepspeed": str,
    "ddp_timeout": int, "lr_scheduler_kwargs": dict,
}  # fmt: skip
# LLaMA-Factory's ipo divides log-likelihoods by their lengths, as ipo_mean does.
_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo_mean", "simpo": "simpo"}
_ATTENTION = {"fa2": "flash_attention_2", "flash_attention_2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
_OF_PREFERENCES = ("pref_loss", "pref_beta", "pref_ftx", "simpo_gamma", "dpo_label_smoothing", "ref_model")
_TRACKERS = ("tensorboard", "wandb", "trackio")
_PARTS = {
    "freeze_vision_tower": "freeze_vision_tower", "freeze_multi_modal_projector": "freeze_projector",
    "freeze_language_model": "freeze_language_model",
}  # fmt: skip


class Imported(NamedTuple):
    """A configuration of prefmill's `stage`, and what a reader should know about how it was made."""

    stage: str
    config: dict[str, Any]
    notes: list[str]


def import_config(path: Path, num_gpus: int = 1) -> Imported:
    """The configuration in `path`, a LLaMA-Factory YAML of the stage sft or dpo.

    Raises ConfigError for keys that prefmill cannot honour, naming each with the reason, and for values of the wrong
    kind.
    """
    # `key: null` is a key left out: its default counts.
    given = {key: value for key, value in read_yaml(path).items() if value is not None}
    refused = {key: REFUSED.get(key, "not known here") for key, value in given.items() if _counts(key, value)}
    if refused:
        raise ConfigError(
            "keys that prefmill does not have", where=path,
            got="".join(f"\n    {key}{_shown(key, given[key])}: {why}" for key, why in sorted(refused.items())),
            fix="take them out of a copy of the file if you can do without them, and import that",
        )  # fmt: skip
    known = {key: value for key, value in given.items() if key in TAKEN or key in _AT_ONE_VALUE or key == "template"}
    reading = _Reading({**_THEIR_DEFAULTS, **known}, path, num_gpus)
    return Imported(reading.stage, reading.translate(), reading.notes)


# Keys whose one value that changes nothing is not false.
_AT_ONE_VALUE: Mapping[str, Any] = {"lora_dropout": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999}


def _counts(key: str, value: Any) -> bool:
    if key in REFUSED:
        # For max_steps -1 is transformers' way of saying no bound.
        return bool(value) and value != "none" and not (key == "max_steps" and value == -1)
    return key not in TAKEN and key not in NO_EFFECT


def _shown(key: str, value: Any) -> str:
    """`=value`, but of a key that may hold a secret."""
    return "" if _SECRET.search(key) else f"={value}"


class _Reading:
    """One file on its way into a configuration: what is left of it, and what it has become."""

    def __init__(self, rest: dict[str, Any], path: Path, num_gpus: int) -> None:
        self.rest, self.path, self.num_gpus = rest, path, num_gpus
        self.config: dict[str, Any] = {}
        self.notes: list[str] = []
        self.fixed_size = False
        self.stage: str = self.one_of("stage", {"sft": "sft", "dpo": "dpo"})

    def translate(self) -> dict[str, Any]:
        """All of it, in the order of a configuration that people read."""
        self._defaults_of_the_rest()
        if (revision := self.take("model_revision", str, "main")) != "main":
            self.config["revision"] = revision
        datasets = Datasets(self.take("dataset_dir", str), self.take("media_dir", str), self.stage, self.path)
        self.config |= datasets.keys(self.rest.pop("dataset", ""), self.take("max_samples", int))
        self._held_out()
        # Of preferences it scores answers alone, and no layer's routing.
        balancing = self.take("moe_aux_loss_coef", float)
        if self.stage == "dpo":
            self._loss()
        else:
            self.config |= {"router_aux_loss_coef": balancing} if balancing else {}
            for key in _OF_PREFERENCES:
                self.rest.pop(key, None)
            history = self.take("mask_history", bool, False)
            self.config["train_on"] = "last_turn" if history else "all_assistant_turns"
        self._schedule()
        self._adapter(datasets.has_images)
        self._precision()
        self._lengths(datasets.has_images)
        self._batch()
        self.config |= {key: self.take(key, kind) for key, kind in _SAME_NAME.items() if key in self.rest}
        assert not self.rest, f"keys of TAKEN that nothing takes: {', '.join(self.rest)}"
        return self.config

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`; raises ConfigError where it is of another kind. A whole number is a float too."""
        value: Any = self.rest.pop(key, default)
        kinds = (float, int) if kind is float else kind
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool)):
            name = kind.__name__ if isinstance(kind, type) else " or ".join(item.__name__ for item in kind)
            raise ConfigError(
                f"{key} is of another kind", where=self.path, got=repr(value), expected=name, fix=f"correct {key}"
            )
        return value if kind is not float or value is None else float(str(value))

    def one_of(self, key: str, known: Mapping[str, str]) -> str:
        """The translation of a word."""
        value = self.take(key, str)
        if value not in known:
            raise ConfigError(
                f"prefmill does not take over this {key}", where=self.path, got=value, expected=", ".join(known),
                fix="other stages and losses: see docs/stages/",
            )  # fmt: skip
        return known[value]

    def _defaults_of_the_rest(self) -> None:
        for key, only in _AT_ONE_VALUE.items():
            if self.take(key, float, only) != only:
                raise ConfigError(
                    f"prefmill has no {key}", where=self.path, got=f"another than {only}", fix=f"set {key} to {only}"
                )
        template = self.rest.pop("template", None)
        self.fixed_size = str(template).startswith("gemma")  # whose processors know no bounds on pixels
        if template is not None:
            self.notes.append(
                f"chats are put together by the model's own chat template, not by LLaMA-Factory's '{template}': where "
                "they differ, or the model has none, give chat_template"
            )
        if (thinks := self.take("enable_thinking", bool)) is not None:
            self.config["chat_template_kwargs"] = {"enable_thinking": thinks}

    def _held_out(self) -> None:
        held_out = self.take("val_size", float, 0.0)
        if held_out >= 1:
            raise ConfigError(
                "val_size as a number of rows is not known", where=self.path, fix="give val_size as a share"
            )
        if held_out:
            self.config["val_fraction"] = held_out
            self.notes.append("validation prompts are drawn with all of their rows: they are not LLaMA-Factory's rows")

    def _loss(self) -> None:
        loss = self.one_of("pref_loss", _LOSSES)
        self.config |= {"beta": self.take("pref_beta", float), "loss_type": [loss], "loss_weights": [1.0]}
        self.config["label_smoothing"] = self.take("dpo_label_smoothing", float, 0.0)
        if (gamma := self.take("simpo_gamma", float)) is not None:
            self.config["simpo_gamma"] = gamma
        if anchor := self.take("pref_ftx", float, 0.0):
            self.config["loss_type"].append("sft")
            self.config["loss_weights"].append(anchor)
        if (reference := self.take("ref_model", str)) is not None:
            self.config["ref_name"] = reference
        # Of preferences the answer alone is trained in any case.
        self.take("mask_history", bool)

    def _schedule(self) -> None:
        epochs = self.take("num_train_epochs", float)
        if epochs != int(epochs):
            raise ConfigError("training takes whole epochs", where=self.path, got=epochs, fix="round num_train_epochs")
        self.config["num_train_epochs"] = int(epochs)
        ratio, steps = self.take("warmup_ratio", float, 0.0), self.take("warmup_steps", float, 0.0)
        # transformers 5 reads warmup_steps below 1 as a share of the steps; it goes before warmup_ratio there too.
        self.config["warmup_steps"] = steps or ratio
        reports = self.take("report_to", (str, list), "none")
        reports = [reports] if isinstance(reports, str) else reports
        self.config["report_to"] = [name for name in reports if name in _TRACKERS]
        if other := set(reports) - {*_TRACKERS, "none"}:
            self.notes.append(f"report_to: nothing is sent to {', '.join(sorted(other))}")

    def _adapter(self, has_images: bool) -> None:
        kind = self.one_of("finetuning_type", {"full": "full", "lora": "lora"})
        rank, target = self.take("lora_rank", int), self.take("lora_target", (str, list))
        alpha, scaled = self.take("lora_alpha", float), self.take("use_rslora", bool, False)
        dora, adapter = self.take("use_dora", bool, False), self.take("adapter_name_or_path", str)
        modules = [name.strip() for name in target.split(",")] if isinstance(target, str) else target
        self._frozen(has_images)
        self._quantization(kind)
        if kind == "full" and adapter:
            raise ConfigError(
                "an adapter is not trained as a whole model", where=self.path, got=f"adapter_name_or_path: {adapter}",
                fix="merge it, and name the merged model",
            )  # fmt: skip
        if kind == "full":
            return
        if adapter is not None:
            self._go_on_with(adapter)
            return
        if modules == ["all"]:
            modules = "all-linear"
        alpha = 2.0 * rank if alpha is None else alpha
        # rsLoRA scales by alpha over the root of the rank, LoRA by alpha over the rank.
        alpha = alpha * rank**0.5 if scaled else alpha
        self.config["lora"] = {"r": rank, "alpha": alpha, "use_dora": dora, "target_modules": modules}

    def _quantization(self, kind: str) -> None:
        """4 bits by bitsandbytes, their scales quantized too: what LLaMA-Factory's QLoRA is by default."""
        bits, method = self.take("quantization_bit", int), self.take("quantization_method", str, "bnb")
        double = self.take("double_quantization", bool, True)
        if bits is None:
            return
        if bits != 4 or method not in ("bnb", "bitsandbytes") or not double or kind != "lora":
            raise ConfigError(
                "this quantization is not known", where=self.path, expected="4 bits by bnb, double, under an adapter",
                got=f"{bits} bits by {method}, double_quantization {double}, {kind}", fix="leave quantization_bit out",
            )  # fmt: skip
        self.config["quantization"] = "4bit"

    def _go_on_with(self, adapter: str) -> None:
        if "," in adapter:
            raise ConfigError(
                "training goes on with one adapter", where=self.path, got=adapter, fix="merge all but the last"
            )
        self.config["lora"] = {"start": adapter}
        if self.stage == "dpo":
            self.config.setdefault("ref_name", self.rest.get("model_name_or_path"))
            self.notes.append("the reference is the base without the adapter, as in LLaMA-Factory")

    def _frozen(self, has_images: bool) -> None:
        """Which parts stay as they are; where its file is silent LLaMA-Factory trains the language model alone."""
        for theirs, ours in _PARTS.items():
            silent = True if has_images and ours != "freeze_language_model" else None
            if (frozen := self.take(theirs, bool, silent)) is not None:
                self.config[ours] = frozen

    def _precision(self) -> None:
        bf16, fp16 = self.take("bf16", bool, False), self.take("fp16", bool, False)
        self.config["precision"] = "bf16" if bf16 else "fp16" if fp16 else "fp32"
        off = self.take("disable_gradient_checkpointing", bool, False)
        self.take("gradient_checkpointing", bool)  # LLaMA-Factory checkpoints unless it is disabled
        self.config["activation_checkpointing"] = not off
        attention, liger = self.take("flash_attn", str, "auto"), self.take("enable_liger_kernel", bool, False)
        if self.stage == "sft":
            if attention in _ATTENTION:
                self.config["attn_implementation"] = _ATTENTION[attention]
            if liger:
                self.config["use_liger_kernel"] = True
        if sharding := self.take("fsdp", (str, bool)):
            self.config["fsdp"] = True
            if other := set(str(sharding).split()) - {"full_shard", "auto_wrap", "True"}:
                self.notes.append(f"fsdp: FSDP2 shards all, without {', '.join(sorted(other))}")

    def _lengths(self, has_images: bool) -> None:
        self.config |= {"max_length": self.take("cutoff_len", int), "on_overlong": "drop"}
        self.notes.append("rows over max_length are left out and listed in the logs; LLaMA-Factory cuts them off")
        given = {f"{end}_pixels": self.take(f"image_{end}_pixels", int) for end in ("max", "min")}
        if has_images and not self.fixed_size:
            self.config |= {key: given[key] or pixels for key, pixels in _THEIR_PIXELS.items()}
            self.notes.append(
                "images are scaled once, by the model's processor, within LLaMA-Factory's bounds on pixels"
            )

    def _batch(self) -> None:
        at_once, steps = self.take("per_device_train_batch_size", int), self.take("gradient_accumulation_steps", int)
        whole = at_once * steps * self.num_gpus
        self.config |= {"per_device_train_batch_size": at_once, "effective_batch_size": whole}
        self.notes.append(
            f"effective_batch_size {whole} is that of {self.num_gpus} GPUs: import again with --gpus for another"
        )
