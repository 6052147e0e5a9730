"""The finished model: the start in fp32 with the trained weights, an adapter merged, rounded once when it is saved.

It is built anew from the start's own files, so that nothing of a training's wrappers, shards, patches or settings
(`use_cache: false`) is in the published folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from prefmill.core.errors import DivergedError, InputError, PipelineError
from prefmill.core.precision import Precision, torch_dtype
from prefmill.core.revisions import hub_file
from prefmill.distributed.scoring import inner_model
from prefmill.distributed.sharding import shares_weights
from prefmill.training.config import TrainingConfig, weights_precision

_STORED: dict[str, Precision] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def stored_precision(name: str, revision: str | None) -> Precision:
    """The precision most weights of a checkpoint's (first) safetensors file are stored in; fp32 where none is."""
    file = partial(hub_file, name, revision=revision)
    # It goes before an index, which stays behind where a model is saved over one of several files.
    if (whole := file("model.safetensors")) is not None:
        return precision_of(whole)
    if (index := file("model.safetensors.index.json")) is None:
        return "fp32"  # loading says what such a folder lacks
    return precision_of(file(min(json.loads(Path(index).read_text())["weight_map"].values())))


def tensor_names(path: Path) -> list[str]:
    """Of a safetensors file, by its head alone."""
    from safetensors import safe_open

    with safe_open(path, "pt") as stored:
        return list(stored.keys())


def precision_of(path: str | Path | None) -> Precision:
    """The precision most weights of a safetensors file are stored in; fp32 where none is known."""
    from safetensors import safe_open

    sizes = dict.fromkeys(_STORED, 0)
    with safe_open(path, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (no mapping)
            # A slice reads the header alone, none of the weights.
            part = stored.get_slice(key)
            if part.get_dtype() in sizes:
                # By elements, not tensors: norms are many and small, and often kept in fp32.
                sizes[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    return _STORED[max(sizes, key=lambda kind: sizes[kind])] if any(sizes.values()) else "fp32"


def loading_precision(name: str, config: TrainingConfig, revision: str | None) -> Precision:
    """The precision to load weights in that will be kept in `weights_precision`.

    As they are stored where ranks are going to share them: a mapped file takes no memory until a part of it is read,
    and what is cast then is a part. An adapter is drawn in its base's precision, so that base is cast at once.
    """
    kept = weights_precision(config)
    if not shares_weights(config) or config.lora is not None or not Path(name).is_dir():
        return kept
    return stored_precision(name, revision)


def kept_dtype(config: TrainingConfig) -> torch.dtype | None:
    """What weights are cast to once ranks have parts; None for an adapter's base, which was loaded so."""
    return None if config.lora else torch_dtype(weights_precision(config))


def take_trained(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Put trained weights, by their names, into `model`; raises PipelineError where they are not its own."""
    own = dict(model.named_parameters())
    strange = sorted(set(weights) - set(own)) or ([] if weights else ["no weight at all"])
    if strange:
        raise PipelineError(
            "the trained weights are not those of the model that training began with", got=strange[0],
            fix="do not change the model's folder or its code while it trains; run again",
        )  # fmt: skip
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


@contextmanager
def rounded(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Within, the weights are in `dtype`; afterwards they are what they were. Raises DivergedError for one not finite.

    Tied weights stay tied, and buffers are left alone.
    """
    # A tied weight is one Parameter: new data reaches both of its places, a new Parameter would untie them.
    exact = {name: value.data for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        require_finite(name, value.data)
        value.data = value.data.to(dtype)
    try:
        yield
    finally:
        for name, value in model.named_parameters():
            value.data = exact[name]


def require_finite(name: str, weight: Tensor) -> None:
    """Raises DivergedError for a weight with NaN or infinite entries: nothing is published."""
    if not bool(torch.isfinite(weight).all()):
        raise DivergedError(
            "a trained weight is not a number", where=name, got=f"{weight.dtype} with NaN or infinite entries",
            fix="lower learning_rate, or check the data; nothing was published",
        )  # fmt: skip


_log = logging.getLogger(__name__)
_GENERATION = "generation_config"


def ensure_savable(model: Any, processor: Any) -> None:
    """Save everything but the weights once, into scratch; raises InputError for a model that would not be saved.

    Called before references are scored: whatever cannot be saved would be lost with the first checkpoint.
    """
    # PEFT's wrapper would save the adapter alone, and leave the base's files untried.
    inner = inner_model(model)
    mend_generation_config(inner)
    generation = getattr(inner, _GENERATION, None)
    with TemporaryDirectory() as scratch:
        for name, part in (("config", inner.config), (_GENERATION, generation), ("tokenizer or processor", processor)):
            _save(name, part, Path(scratch))


def mend_generation_config(model: Any) -> None:
    """Set `do_sample` where a sampling key such as `temperature` is set without it: transformers saves no such file.

    Common on the hub, and certain: those keys mean nothing but to sampling. A temperature of 0 means the opposite.
    """
    generation = getattr(model, _GENERATION, None)
    if generation is None or generation.do_sample is True or generation.temperature == 0:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        _log.warning("generation_config.json sets sampling keys without do_sample: saved with do_sample: true")


def _save(name: str, part: Any, folder: Path) -> None:
    try:
        if part is not None:
            part.save_pretrained(folder)
    # TypeError is json's, for a value of the configuration that it cannot write.
    except (ValueError, TypeError, OSError) as error:
        raise InputError(
            f"the model's {name} cannot be saved", where=f"{name} of the model to start from",
            got=" ".join(str(error).split()), expected="one that transformers saves",
            fix="correct that file in a copy of the model's folder, and start from the copy",
        ) from error  # fmt: skip
