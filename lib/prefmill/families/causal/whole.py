"""Whether a model's folder holds the whole model, and no more than its config.json has places for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from prefmill.core.errors import InputError

_log = logging.getLogger(__name__)
# A pickled checkpoint can run code when it is opened; other shapes are refused by name, with all else that is missing.
WHOLE: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
# What quantized weights are multiplied by: without it the numbers in the file are not the weights.
_SCALES = re.compile(r"(?i).*(scale|zero|absmax|quant).*")


def read_whole(loader: Any, name: str, **options: Any) -> Any:
    """The model that `loader` makes of `name`, from safetensors; raises InputError for a weight that it would draw."""
    model, info = loader.from_pretrained(name, **WHOLE, **options)
    require_whole(model, info, name)
    return model


def require_one_of_each(folder: Path) -> None:
    """Raise InputError where files of an index hold other numbers for one weight; say where none of them is read.

    transformers takes the last file's whatever the index says, and `model.safetensors` before all of them; vLLM and
    others take the index's.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        return
    named = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    files = [folder / name for name in named if (folder / name).is_file()]
    if whole.is_file() and files:
        _log.warning("%s is read, and none of the files that %s names", whole, index.name)
    with ExitStack() as opened:
        stored = [] if whole.is_file() else [opened.enter_context(safe_open(file, "pt")) for file in files]
        owners: dict[str, Any] = {}
        for part in stored:
            for key in part.keys():  # noqa: SIM118 (no mapping)
                first = owners.setdefault(key, part)
                if first is not part and not torch.equal(first.get_tensor(key), part.get_tensor(key)):
                    raise InputError(
                        "two of the model's files hold different numbers for one weight", where=folder, got=key,
                        expected="a weight in one file", fix="download the model again, into an empty folder",
                    )  # fmt: skip


def require_writer(name: str, config: Any) -> None:
    """Raise InputError for a classifier or reward model, whose head would be replaced by the embeddings where tied."""
    if other := [said for said in without_head(config) if "For" in said]:
        raise InputError(
            "this checkpoint is no model that writes text", where=name, got=other[0], expected="a language model",
            fix="give the language model that it was made from",
        )  # fmt: skip


def without_head(config: Any) -> list[str]:
    """The classes of transformers that a configuration names as its model's and that write no text."""
    known = ((said, getattr(transformers, said, None)) for said in config.architectures or ())
    # Code of its own goes by names of its own.
    return [said for said, kind in known if kind is not None and not issubclass(kind, transformers.GenerationMixin)]


def require_vocabulary(tokenizer: Any, name: str) -> None:
    """Raise InputError where every word is unknown: transformers goes on without the files of a vocabulary."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            "a tokenizer without words", where=name, got=f"{len(tokenizer)} tokens, all of them special",
            expected="tokenizer.json, or the vocabulary's files", fix="copy them from the model that this one began as",
        )  # fmt: skip


def require_embedded(
    used: Iterable[Iterable[int]], tokenizer: Any, num_embeddings: int | None, name: str, whose: str = "the model"
) -> None:
    """Raise InputError for a token of `used` that a model has no embedding for: a GPU's assertion would not name it.

    Tokens that no text has are no matter: Gemma 3's small models have the image token of the large ones in their
    tokenizer, and no embedding for it.
    """
    token = max((max(ids, default=0) for ids in used), default=0)
    if num_embeddings is not None and token >= num_embeddings:
        raise InputError(
            f"{whose} has no embedding for a token", where=name,
            got=f"{tokenizer.convert_ids_to_tokens(token)!r}, number {token}", expected=f"below {num_embeddings}",
            fix="take it out of the data or the chat template, or give the tokenizer that the model was trained with"
            if token != tokenizer.pad_token_id else "set pad_token to the end token in its tokenizer_config.json",
        )  # fmt: skip


def require_whole(model: Any, info: Mapping[str, Any], name: str) -> None:
    """Raise InputError for a weight that the files lack, have in another shape, or have with a scale that is not read.

    transformers puts random numbers in the place of such a weight, says so in a warning, and goes on.
    """
    modules = dict(model.named_modules())
    found = [f"{key}: not in the files" for key in sorted(info["missing_keys"])]
    found += [
        f"{key}: of shape {list(theirs)}, not {list(ours)}" for key, theirs, ours in sorted(info["mismatched_keys"])
    ]
    for key in sorted(info["unexpected_keys"]):
        owner, _, part = key.rpartition(".")
        if owner in modules and _SCALES.fullmatch(part):
            found.append(f"{key}: not read, and the weight means nothing without it")
        elif hasattr(modules.get(owner), "weight") or _is_a_layer_more(key, modules, model.config.get_text_config()):
            found.append(f"{key}: in the files, and config.json has no place for it")
    if found:
        raise InputError(
            "the files do not hold this model", where=name, got="; ".join(found[:3]) + ("; ..." if found[3:] else ""),
            expected=f"every weight of {type(model).__name__}",
            fix="give the whole model that config.json speaks of, with weights that are not quantized",
        )  # fmt: skip


def _is_a_layer_more(key: str, modules: Mapping[str, Any], config: Any) -> bool:
    """Whether a weight's layer is beyond those stated, and beyond those that only predict further tokens (MTP's)."""
    further = getattr(config, "num_nextn_predict_layers", None) or 0
    found = ((modules.get(name), int(number)) for name, number in re.findall(r"^(.*?)\.(\d+)\.", key))
    return any(isinstance(layers, Sized) and number >= len(layers) + further for layers, number in found)
