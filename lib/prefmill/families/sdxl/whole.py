"""Whether a pipeline has every weight of its parts, and an adapter a place for each of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from prefmill.core.errors import InputError
from prefmill.families.causal.whole import require_whole
from prefmill.families.sdxl.folders import variant_of
from prefmill.training.finished import tensor_names

_READ = re.compile(r"lora|dora_scale")
# A pair's first factor and DoRA's magnitudes, as PEFT, kohya and older diffusers call them.
_PATTERNS = (re.compile(r"lora(_A|_down|\.down)\b"), re.compile(r"dora_scale|lora_magnitude_vector"))


def require_whole_part(part: nn.Module, where: object) -> None:
    """Raise InputError for a weight that the files lack: diffusers leaves it without memory."""
    missing: Sequence[str] = [name for name, value in part.named_parameters() if value.is_meta]
    require_whole(part, {"missing_keys": missing, "mismatched_keys": (), "unexpected_keys": ()}, str(where))


def require_whole_pipeline(pipeline: Any, folder: Path, variant: str | None) -> None:
    """As `require_whole_part` for every part of `pipeline`, loaded from `folder`."""
    from transformers import PreTrainedModel

    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            # transformers draws what is missing and does not say so here; on meta only the heads of files are read.
            _, info = type(part).from_pretrained(
                folder, subfolder=name, device_map={"": "meta"}, output_loading_info=True, use_safetensors=True,
                variant=variant_of(folder / name, variant),
            )  # fmt: skip
            require_whole(part, info, f"{folder}/{name}")
        elif isinstance(part, nn.Module):
            require_whole_part(part, f"{folder}/{name}")


def require_place(pipeline: Any, file: Path, name: str | None = None) -> None:
    """Raise InputError for `file` without a LoRA's keys, or where diffusers passed over all, so that `name` is none.

    Other keys beside a LoRA's are refused: of FLUX's adapters diffusers passes them over.
    """
    keys = tensor_names(file)
    is_lora = any("lora" in key for key in keys)
    if is_lora and (others := [key for key in keys if not _READ.search(key)]):
        raise InputError(
            "an adapter with more than a LoRA", where=file, got=f"{len(others)} other keys, as {others[0]}",
            expected="a LoRA's factors and magnitudes alone",
            fix="merge it into its base with the tool that made it, and give that pipeline",
        )  # fmt: skip
    has_place = name is None or any(name in names for names in pipeline.get_list_adapters().values())
    if not has_place or not is_lora:
        raise unfitting(
            file, f"keys such as {next(iter(keys), 'none')}",
            f"a LoRA's keys of {type(pipeline).__name__}, by diffusers' or kohya's names",
            "; of sdxl_dpo's output the folder itself; textual inversions, ControlNets and IP-Adapters are not read",
        )  # fmt: skip


def unfitting(where: object, got: str, expected: str, more: str = "") -> InputError:
    """The error of an adapter that has no place in a pipeline, mostly one of another base."""
    return InputError(
        "the adapter does not fit the pipeline", where=where, got=got, expected=expected,
        fix=f"give the base that it was trained on{more}",
    )  # fmt: skip


def require_whole_adapter(pipeline: Any, file: Path, name: str) -> None:
    """Raise InputError where the adapter called `name` has no place for a factor or a magnitude of `file`."""
    keys = tensor_names(file)
    given = [sum(pattern.search(key) is not None for key in keys) for pattern in _PATTERNS]
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    weights = [(key, value) for part in parts for key, value in part.named_parameters() if f".{name}" in key]
    found = [sum(f"{kind}.{name}" in key for key, _ in weights) for kind in ("lora_A", "lora_magnitude_vector")]
    # More than given are no fault: some tools keep in one pair what are several modules here.
    lost = any(places < wanted for places, wanted in zip(found, given, strict=True))
    if lost or any(value.is_meta for _, value in weights):
        counts = f"{given[0]} pairs of factors and {given[1]} magnitudes, places for {found[0]} and {found[1]}"
        got = counts if lost else "factors or magnitudes that the file lacks"
        raise unfitting(file, got, "one that is read whole", ", and the file as it was written")
    if given[1]:
        _require_magnitudes([value for key, value in weights if "lora_magnitude_vector" in key], file)


def _require_magnitudes(taken: Sequence[Tensor], file: Path) -> None:
    """Raise InputError where these are not the file's: transformers passes over those of text encoders."""
    stored = [value for key, value in load_file(file).items() if _PATTERNS[1].search(key)]
    found, wanted = (sum(value.double().sum().item() for value in values) for values in (taken, stored))
    if abs(found - wanted) > 1e-3 * abs(wanted):  # half precision rounds each
        raise InputError(
            "DoRA's magnitudes do not arrive in the pipeline", where=file, got=f"their sum is {found:.6g}",
            expected=f"{wanted:.6g}, as in the file",
            fix="merge it into its base with the tool that made it, and give that pipeline",
        )  # fmt: skip
