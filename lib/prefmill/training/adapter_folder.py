"""Folders that hold an adapter alone, in PEFT's format: their base, and what they say of themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prefmill.core.places import expand_home
from prefmill.core.revisions import snapshot

Templates = str | dict[str, str]  # several by name: for every chat, for tools, for documents
_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# They cannot be merged, or not by their two files alone; PEFT reads every other key as it was trained.
_ODD = (
    "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# PEFT's beginnings that change the base by numbers drawn or measured then; those of `pissa` and `olora` it finds again.
_BASE_IS_LOST = re.compile(r"pissa_niter_\d+|corda|lora_ga", re.IGNORECASE)
_SAME = {"r": "r", "alpha": "lora_alpha", "use_dora": "use_dora", "target_modules": "target_modules"}


def is_adapter(folder: Path) -> bool:
    """Whether `folder` has an adapter and no model of its own; some tools write the base's config.json beside it."""
    return (folder / _CONFIG).is_file() and not _has_model(folder)


def is_both(folder: Path) -> bool:
    """Whether `folder` has a whole model and an adapter: transformers would add the one to the other, others not."""
    return (folder / _CONFIG).is_file() and _has_model(folder)


def _has_model(folder: Path) -> bool:
    weights = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    return any(not file.name.startswith("adapter_") and file.name != "training_args.bin" for file in weights)


def template_of(folder: Path) -> Templates | None:
    """The chat template that an adapter was saved with; None where its folder has none."""
    files = {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    if (own := folder / "chat_template.jinja").is_file():
        files["default"] = own
    if files:
        texts = {name: path.read_text("utf-8") for name, path in files.items()}
        return texts["default"] if texts.keys() == {"default"} else texts
    tokenizer = folder / "tokenizer_config.json"
    return stated_template(tokenizer) if tokenizer.is_file() else None


def stated_template(file: Path) -> Templates | None:
    """The `chat_template` of a JSON file, which lists several with their names; raises ValueError for anything else."""
    found = json.loads(file.read_text("utf-8"))
    try:
        said = found.get("chat_template")
        return {item["name"]: item["template"] for item in said} if isinstance(said, list) else said
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"no chat_template that can be read in {file}") from None


def adapter_at(name: str, revision: str | None = None) -> Path | None:
    """The folder of the adapter `name`, a path or a hub's name that is in the cache; None for anything else."""
    cached = snapshot(name, revision)
    folder = cached or expand_home(name)
    # Whoever looks for a model on the hub may have fetched what an adapter says of itself, and nothing else of it.
    fetched = cached is None or any(cached.glob("adapter_model.*"))
    return folder if is_adapter(folder) and fetched else None


def whole_model(name: str, revision: str | None) -> tuple[str, str | None, Path | None]:
    """The whole model behind `name`, its revision, and the adapter on it; raises ValueError as `base_of`."""
    folder = adapter_at(name, revision)
    return (name, revision, None) if folder is None else (base_of(folder), base_revision(folder), folder)


def base_of(folder: Path) -> str:
    """The model that an adapter is for, by name or path; raises ValueError where it cannot be found here."""
    base = str(read_adapter(folder).get("base_model_name_or_path") or "")
    is_path = base.startswith((".", "/", "~"))
    # Our own adapters name a local base by the digest of its content, from which no path follows.
    if not base or base.startswith("sha256:") or (is_path and not expand_home(base).is_dir()):
        raise ValueError(
            f"the base of this adapter is not here: {base or 'not named'}; to train, give it as model_name_or_path, "
            "and this folder as lora.start"
        )
    if adapter_at(base) is not None:
        raise ValueError(f"the base of this adapter is an adapter itself, {base}: merge that one first")
    return base


def base_revision(folder: Path) -> str | None:
    """The revision of its base on the hub that an adapter was trained on; None where it names none."""
    said = read_adapter(folder).get("revision")
    return str(said) if said and not expand_home(base_of(folder)).is_dir() else None


def lora_of(folder: Path) -> dict[str, Any]:
    """An adapter's shape under the names of LoraConfig; raises ValueError for one that cannot be continued."""
    said = read_adapter(folder)
    odd = [key for key in _ODD if said.get(key)]
    if said.get("peft_type") != "LORA" or odd:
        kind = ", ".join(odd) or said.get("peft_type")
        raise ValueError(
            f"only plain LoRA adapters are read, not {kind}: start from the base, or from the model with the "
            "adapter merged where PEFT can merge it"
        )
    said["target_modules"] = said.get("target_modules") or []
    places = {"target_modules or target_parameters": said["target_modules"] or said.get("target_parameters")}
    needed = {"r": said.get("r"), "lora_alpha": said.get("lora_alpha"), **places}
    if missing := [key for key, value in needed.items() if not value]:
        raise ValueError(f"{folder / _CONFIG} does not say {', '.join(missing)}")
    found = {ours: said[theirs] for ours, theirs in _SAME.items() if theirs in said}
    targets = found["target_modules"]
    return {
        **found,
        "alpha": float(found["alpha"]),
        # PEFT writes a set in any order, which would give one adapter several identities.
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }


def read_adapter(folder: Path) -> dict[str, Any]:
    """What an adapter says of itself; raises ValueError where its files do not hold all of it, as safetensors."""
    try:
        said: dict[str, Any] = {**json.loads((folder / _CONFIG).read_text("utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"no adapter in {folder}: {error}") from None
    # The older adapter_model.bin is a pickle, which may run code when it is read.
    if not (folder / PEFT_WEIGHTS).is_file():
        raise ValueError(f"the adapter has no {PEFT_WEIGHTS}: nothing else is loaded")
    if _BASE_IS_LOST.fullmatch(begun := str(said.get("init_lora_weights"))):
        raise ValueError(
            f"init_lora_weights is {begun}: this adapter is for a base that was changed as its training began, and "
            "that no file holds; where it was trained, save it with PEFT's path_initial_model_for_weight_conversion "
            "(LLaMA-Factory's pissa_convert), or save the merged model"
        )
    return said
