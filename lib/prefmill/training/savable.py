"""Whether a model can be saved: found out before the first step, not after the last."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefmill.core.errors import InputError

_log = logging.getLogger(__name__)
_GENERATION = "generation_config"


def ensure_savable(model: Any, processor: Any) -> None:
    """Save everything but the weights once, into scratch; raises InputError for a model that would not be saved.

    Called before references are scored: whatever cannot be saved would be lost with the first checkpoint.
    """
    # PEFT's wrapper would save the adapter alone, and leave the base's files untried.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
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
