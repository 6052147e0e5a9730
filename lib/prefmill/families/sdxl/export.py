"""The finished model: an adapter for diffusers, PEFT, ComfyUI and LyCORIS, and whole pipelines."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from prefmill.core.files import write_atomic
from prefmill.core.precision import torch_dtype
from prefmill.core.stage import Task
from prefmill.families.sdxl.backbone import Backbone
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.dora import row_norms
from prefmill.families.sdxl.folders import ADAPTER_FILE, MERGED
from prefmill.families.sdxl.kohya import DORA_NORM, DoraNorm, original_name
from prefmill.families.sdxl.loading import SdxlFolder
from prefmill.training.adapter import ADAPTER, save_adapter
from prefmill.training.finished import require_finite
from prefmill.training.publish import LOST_SHARE, accepted_with_losses, model_card, precisions

# By kohya's key names. Tools disagree on DoRA's `dora_scale`: a file for each of the two rules.
COMFYUI_FILE, LYCORIS_FILE = "comfyui.safetensors", "lycoris.safetensors"
_PEFT_PREFIX = "base_model.model."


def save_finished(
    model: Any, weights: Mapping[str, Tensor] | None, config: SdxlPreferenceConfig, task: Task, folder: SdxlFolder
) -> None:
    """Write the artifact: the adapter in each tool's form and, where asked for, merged; a whole UNet as a pipeline.

    `weights` are the whole UNet's, where that is what was trained.
    """
    if weights is not None:
        # With the buffers: SD 3 keeps its table of positions as one.
        save_pipeline({**model.state_dict(), **weights}, task.output, folder, config)
    elif config.lora is not None:
        modules = adapted_modules(model)
        state, part = adapter_state(model), folder.backbone.part
        save_diffusers(state, model.peft_config["default"], task.output / ADAPTER_FILE, part)
        name = config.model_name_or_path
        # A folder of this machine says nothing to others: its content does.
        base = name if name and not Path(name).is_dir() else f"sha256:{folder.digest(part)}"
        save_adapter(model, base, config.revision, task.output / ADAPTER)
        save_kohya(model, config.lora.alpha, "base", task.output / COMFYUI_FILE, folder.backbone)
        if config.lora.use_dora and part == "unet":
            save_kohya(model, config.lora.alpha, "merged", task.output / LYCORIS_FILE, folder.backbone)
        if config.save_merged:
            whole = folder.load_denoiser("fp32").state_dict()
            merged = {**whole, **{f"{name}.weight": merged_weight(layer) for name, layer in modules.items()}}
            save_pipeline(merged, task.output / MERGED, folder, config)
    # The first one is the card's library_name, by which the hub chooses the code it shows for loading.
    write_atomic(task.output / "README.md", model_card(task, config).replace("transformers", "diffusers", 1))


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, by the UNet's module names; magnitudes end in `.lora_magnitude_vector`."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {name.removeprefix(_PEFT_PREFIX): value.detach().cpu().contiguous() for name, value in sorted(state.items())}


def save_diffusers(state: Mapping[str, Tensor], settings: Any, path: Path, part: str = "unet") -> None:
    """An adapter that `pipeline.load_lora_weights` reads, with the metadata without which it takes alpha for rank."""
    said = {
        "r": settings.r, "lora_alpha": settings.lora_alpha, "use_dora": settings.use_dora, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(target_modules(state)),
    }  # fmt: skip
    said = {f"{part}.{name}": value for name, value in said.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(said, sort_keys=True)}
    save_with_metadata({f"{part}.{name}": value for name, value in state.items()}, path, metadata)


def save_kohya(model: Any, alpha: float, norm: DoraNorm, path: Path, backbone: Backbone) -> None:
    """An adapter by kohya's keys, alpha as it is, and DoRA's `dora_scale` [out, 1] for tools that divide it by `norm`.

    `base`: ComfyUI's rule, rows of W + s B A times dora_scale / |W|. `merged`: LyCORIS', which is DoRA's own, rows
    times dora_scale / |W + s B A|, dora_scale being the magnitude. The metadata say which. LoRA has no scale.
    """
    state, layers = adapter_state(model), adapted_modules(model)
    scales = {name: dora_scale(layer, norm) for name, layer in layers.items() if layer.lora_magnitude_vector}
    modules = sorted(target_modules(state))
    names: dict[str, str | None] = dict(zip(modules, modules, strict=True))
    if backbone.original_names:
        original = {name: original_name(name, model.get_base_model().config.layers_per_block) for name in modules}
        names = names if None in original.values() else original  # one file holds one kind of names
    tensors: dict[str, Tensor] = {}
    for module, name in names.items():
        key = f"{backbone.prefix}{str(name).replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = state[f"{module}.lora_A.weight"]
        tensors[f"{key}.lora_up.weight"] = state[f"{module}.lora_B.weight"]
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        if module in scales:
            tensors[f"{key}.dora_scale"] = scales[module].contiguous()
    rank = min(value.shape[0] for name, value in tensors.items() if name.endswith("lora_down.weight"))
    metadata = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
    metadata |= {DORA_NORM: norm} if scales else {}
    save_with_metadata(tensors, path, {**metadata, "ss_network_alpha": str(float(alpha))})


def save_with_metadata(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file whose metadata are in order: safetensors itself writes them in one of its own each time."""
    data = save(dict(tensors))
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8 : 8 + length])})
    # Spaces up to a multiple of 8, as the format allows: the tensors behind the header stay aligned.
    padded = header.encode().ljust(-(-len(header.encode()) // 8) * 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + length :])


def dora_scale(layer: Any, norm: DoraNorm, adapter: str = "default") -> Tensor:
    """The magnitude m by row, [out, 1], fp32, on the CPU; for the `base` rule m |W| / |W + s B A|."""
    magnitude: Tensor = layer.lora_magnitude_vector[adapter].weight.detach().float()
    if norm == "base":
        # Given m itself a tool that divides by |W| would make a model that nobody trained.
        weight, a, b, scaling = _factors(layer, adapter)
        squares = weight.square().sum(1)
        magnitude = magnitude * squares.sqrt() / row_norms(weight, a, b, scaling, squares)
    return magnitude[:, None].cpu()


def target_modules(state: Mapping[str, Tensor]) -> set[str]:
    """The names of the modules that an adapter's tensors belong to."""
    return {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}


def adapted_modules(model: Any) -> dict[str, Any]:
    """The UNet's layers with an adapter, by their names."""
    named = model.get_base_model().named_modules()
    return {name: layer for name, layer in named if len(getattr(layer, "lora_A", ()))}


def merged_weight(layer: Any, adapter: str = "default") -> Tensor:
    """W + s B A, for DoRA with every row brought to its magnitude; fp32, on the CPU."""
    weight, a, b, scaling = _factors(layer, adapter)
    merged = weight + scaling * (b @ a)
    if layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
        merged = (magnitude / row_norms(weight, a, b, scaling, weight.square().sum(1)))[:, None] * merged
    result: Tensor = merged.cpu()
    return result


def save_pipeline(unet: Mapping[str, Tensor], output: Path, folder: SdxlFolder, config: SdxlPreferenceConfig) -> None:
    """A whole pipeline: this UNet or transformer as `save_dtype` says, and all else as it is in `folder`."""
    name, loader = folder.backbone.part, folder.denoiser_class
    output.mkdir(parents=True, exist_ok=True)
    for part in sorted(folder.path.iterdir()):
        if part.is_dir() and part.name != name and _is_part(part):
            shutil.copytree(part, output / part.name, dirs_exist_ok=True)
    shutil.copyfile(folder.path / "model_index.json", output / "model_index.json")
    # Without storage, and the tensors put in its place: there is no second model in memory.
    with torch.device("meta"):
        model = loader.from_config(loader.load_config(folder.path, subfolder=name))
    model.load_state_dict(_rounded(unet, folder, config), assign=True)
    model.register_to_config(_name_or_path="")  # a path of this machine is no part of the content
    model.save_pretrained(output / name, variant=folder.variant)


def _rounded(unet: Mapping[str, Tensor], folder: SdxlFolder, config: SdxlPreferenceConfig) -> dict[str, Tensor]:
    """Weights in the precision to save, by what they lose of their change; raises DivergedError for one not finite."""
    for name, value in unet.items():
        require_finite(name, value)
    for precision in precisions(config, folder.denoiser_precision):
        state = {name: value.detach().to("cpu", torch_dtype(precision)) for name, value in unet.items()}
        if precision == "fp32":
            break
        start = folder.load_denoiser("fp32").state_dict()
        lost, effect = (sum(_distance(a[name], b[name]) for name in unet) for a, b in ((state, unet), (unet, start)))
        share = (lost / effect) ** 0.5 if effect else float(lost > 0)
        told = f"{share:.0%} of the training"
        if share <= LOST_SHARE[precision] or accepted_with_losses(told, math.isfinite(share), precision, config):
            break
    return state


def _distance(left: Tensor, right: Tensor) -> float:
    """The sum of squared differences."""
    return float((left.detach().cpu().double() - right.detach().cpu().double()).square().sum())


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """W, A, B in fp32, and s."""
    a, b = (getattr(layer, side)[adapter].weight.detach().float() for side in ("lora_A", "lora_B"))
    return layer.get_base_layer().weight.detach().float(), a, b, float(layer.scaling[adapter])


def _is_part(folder: Path) -> bool:
    """Whether this is a component of a pipeline, and no folder that someone left there."""
    return any((folder / name).is_file() for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"))
