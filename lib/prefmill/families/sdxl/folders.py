"""Folders of pipelines as people have them: found, and looked through before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.errors import InputError
from prefmill.core.places import expand_home, looks_local
from prefmill.core.revisions import snapshot
from prefmill.training.adapter_folder import is_adapter

PIPELINE_FILE = "model_index.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
MERGED = "merged"  # beside an adapter: the whole pipeline with it
_SDXL = "StableDiffusionXLPipeline"
# By names of weights in single files, the class that reads them.
_SINGLE = {
    "double_blocks.": "FluxTransformer2DModel", "joint_blocks.": "SD3Transformer2DModel",
    "cond_stage_model.": "StableDiffusionPipeline",
}  # fmt: skip
# By a setting of the scheduler, the marks of it in single files: names of tensors, or what their heads say.
_MARKS = {
    ("prediction_type", "v_prediction"): {"v_pred", "modelspec.prediction_type=v", "ss_v_parameterization=true"},
    ("rescale_betas_zero_snr", True): {"ztsnr", "ss_zero_terminal_snr=true"},
}
_EDM = {"edm_vpred.sigma_max", "edm_mean"}
_ADAPTER_KEY = re.compile(r"lora_|\.lora\.|\.(hada|lokr)_")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def local_folder(name: str) -> Path | None:
    """The pipeline's folder on this machine; None for a hub name. Raises InputError for a path without a pipeline."""
    path = expand_home(name)
    if (path / PIPELINE_FILE).is_file():
        return path
    # Beside a config.json it is a part of a model, or another kind of model.
    single = [] if (path / "config.json").is_file() else sorted(path.glob("*.safetensors"))
    files = [path] if path.is_file() else single
    if adapter := next((one for one in (path, *files) if is_pipeline_adapter(one)), None):
        raise InputError(
            "an adapter, not a pipeline", where=adapter, expected=f"a folder with {PIPELINE_FILE}",
            fix=merged_once(adapter),
        )  # fmt: skip
    if files:
        raise InputError(
            "no diffusers pipeline here", where=path, got=f"a single file, {files[0].name}",
            expected=f"a folder with {PIPELINE_FILE}", fix=f"make one of it once, in Python: {_folder_of(files[0])}",
        )  # fmt: skip
    if looks_local(name) or path.is_dir():
        raise InputError(
            "no diffusers pipeline here", where=name, expected=f"a folder with {PIPELINE_FILE}",
            fix="give a diffusers folder, or a hub name such as stabilityai/stable-diffusion-xl-base-1.0",
        )  # fmt: skip
    return None


def is_flow(name: str, revision: str | None = None) -> bool | None:
    """Whether the pipeline predicts velocities, as those with a transformer do; None where it is not here."""
    index = (snapshot(name, revision) or expand_home(name)) / PIPELINE_FILE
    try:
        return "transformer" in json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _folder_of(file: Path) -> str:
    """The line of Python that makes a pipeline's folder of a file with all weights, by the names it has for them."""
    names, marks = _head_of(file)
    if found := _EDM & {*names}:
        return f"start from another checkpoint: this one has EDM's noise ({', '.join(found)}), which cannot be trained"
    kind = next((kind for mark, kind in _SINGLE.items() if any(mark in name for name in names)), _SDXL)
    read = f"diffusers.{kind}.from_single_file('{file}')"
    if kind.endswith("Model"):  # files of these mostly lack the text encoders
        whole = f"diffusers.DiffusionPipeline.from_pretrained('BASE', transformer={read})"
        return f"{whole}.save_pretrained('FOLDER'), BASE being the pipeline that it was made from"
    # diffusers passes these marks over, and the folder would be one that predicts noise.
    told = ", ".join(f"{key}={value!r}" for key, value in marks.items())
    then = f"p.scheduler.register_to_config({told}); " if told else ""
    return f"p = {read}; {then}p.save_pretrained('FOLDER')"


def _head_of(file: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of a file's tensors, and the scheduler's settings that it has marks of, as kohya's and NoobAI's do."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            names, said = list(opened.keys()), opened.metadata() or {}
    except (OSError, SafetensorError):  # a .ckpt, or damaged
        return [], {}
    found = {*names, *(f"{key}={value}".lower() for key, value in said.items())}
    return names, {key: value for (key, value), marks in _MARKS.items() if marks & found}


def require_one_schedule(folder: Path, scheduler: Mapping[str, Any], *elsewhere: Mapping[str, Any]) -> None:
    """Raise InputError where a folder says elsewhere than in its scheduler's file what kind of noise it predicts.

    Nothing else is read, by diffusers or here: the model would be trained as one of another kind.
    """
    heads = (_head_of(file)[1] for part in ("unet", "transformer") for file in (folder / part).glob("*.safetensors"))
    for said in (*elsewhere, *heads):
        for key in ("prediction_type", "rescale_betas_zero_snr", "shift"):
            if said.get(key) not in (None, scheduler.get(key)):
                raise InputError(
                    "the scheduler says otherwise than the model", where=folder / "scheduler",
                    got=f"{key}: {said[key]} beside {scheduler.get(key)}", expected="the same in the scheduler's file",
                    fix=f"write the right {key} into scheduler_config.json, and take the other away",
                )  # fmt: skip


def is_pipeline_adapter(path: Path) -> bool:
    """Whether a folder has an adapter alone, diffusers' file or PEFT's, or a file the keys of any tool's."""
    names = _head_of(path)[0] if path.is_file() else []
    return (path / ADAPTER_FILE).is_file() or is_adapter(path) or any(map(_ADAPTER_KEY.search, names))


def merged_once(path: Path) -> str:
    """How to go on from what the adapter in `path` has learnt: as a pipeline with it in its weights."""
    merged = [folder / MERGED for folder in (path, path.parent) if (folder / MERGED / PIPELINE_FILE).is_file()]
    if merged:
        return f"give model_name_or_path={merged[0]}"
    file = path.parent if path.is_dir() and (path.parent / ADAPTER_FILE).is_file() else path
    put_on = f"from prefmill.families.sdxl.generator import add_adapter; add_adapter(p, pathlib.Path('{file}'), 1.0)"
    if is_adapter(file):  # by PEFT's own keys
        put_on = (
            "import peft; part = 'unet' if hasattr(p, 'unet') else 'transformer'; setattr(p, part, "
            f"peft.PeftModel.from_pretrained(getattr(p, part), '{file}').merge_and_unload())"
        )
    return (
        "give the base it was trained on, or merge the two once, in Python: import diffusers, pathlib; "
        f"p = diffusers.DiffusionPipeline.from_pretrained('BASE'); {put_on}; p.fuse_lora(); p.unload_lora_weights(); "
        "p.save_pretrained('FOLDER'), and give model_name_or_path=FOLDER"
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The parts of a pipeline's folder by name, (library, class) each, without those that are left out."""
    return {name: value for name, value in read_json(folder / PIPELINE_FILE).items() if value != [None, None]}


def read_json(path: Path) -> dict[str, Any]:
    """What a file of settings says; raises InputError for one that cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("not JSON", where=path, got=str(error), fix="download that file again") from None
    return found


def require_files(folder: Path, index: Mapping[str, Any], variant: str | None) -> None:
    """Raise InputError where the folder of a part lacks files that loading reads; some would be replaced in silence."""
    parts = [name for name, value in index.items() if isinstance(value, list)]
    weights = [name for part in parts for name in _weights(folder / part)]
    if variant and weights and not any(f".{variant}" in name for name in weights):
        raise InputError(
            "no weights of this variant", where=folder, got=f"variant={variant}; {', '.join(sorted({*weights}))}",
            fix="leave variant out, or download those files too",
        )  # fmt: skip
    for part in parts:
        _require_part(folder / part, variant)


def variant_of(part: Path, variant: str | None) -> str | None:
    """`variant`, or None where the folder of a part has no files of it: pipelines mix them."""
    return variant if variant is None or any(f".{variant}" in name for name in _weights(part)) else None


def files_of(part: Path, variant: str | None) -> list[Path]:
    """The files of weights that are read of a part."""
    chosen = variant_of(part, variant)
    return [part / name for name in _weights(part) if (f".{chosen}" in name if chosen else name.count(".") == 1)]


def _require_part(part: Path, variant: str | None) -> None:
    kind = part.name.partition("_")[0]
    wanted = {"scheduler": ("scheduler_config.json",), "tokenizer": _TOKENIZER_FILES, "feature": ()}
    names = wanted.get(kind, ("config.json",))
    fix = "download the whole pipeline: every folder that its model_index.json names"
    if not part.is_dir() or (names and not any((part / name).is_file() for name in names)):
        raise InputError("a part of the pipeline is missing", where=part, expected=" or ".join(names), fix=fix)
    if kind in wanted:
        return
    if quantized := read_json(part / "config.json").get("quantization_config"):
        # Loaded as it is it would train on rounded weights, or, of a kind that is not known, on other numbers.
        raise InputError(
            "a part of the pipeline is quantized", where=part, got=quantized.get("quant_method"),
            expected="whole weights", fix="give the pipeline before this part was quantized",
        )  # fmt: skip
    found = _weights(part)
    if not any("." not in name.removesuffix(".safetensors") or (variant and f".{variant}" in name) for name in found):
        others = sorted(path.name for path in part.iterdir() if path.suffix in (".bin", ".safetensors", ".msgpack"))
        named = next((name.split(".")[1].partition("-")[0] for name in found), None)
        raise InputError(
            "no weights of a part of the pipeline", where=part, got=", ".join(others) or "none",
            expected="safetensors; a .bin is a pickle and is not opened",
            fix=f"set variant: {named}, or download the others" if named else fix,
        )  # fmt: skip


def _weights(part: Path) -> list[str]:
    return sorted(path.name for path in part.glob("*.safetensors"))
