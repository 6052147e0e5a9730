"""Loading a diffusers pipeline, whole or as an adapter on a base, for making images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.precision import Precision, torch_dtype
from prefmill.distributed.devices import device_type
from prefmill.families.causal.loading import loading
from prefmill.families.sdxl.backbone import BACKBONES, Backbone, denoiser, unpack
from prefmill.families.sdxl.folders import ADAPTER_FILE
from prefmill.families.sdxl.kohya import merge, read_factors
from prefmill.families.sdxl.whole import require_place, require_whole_adapter, unfitting
from prefmill.training.adapter_folder import PEFT_WEIGHTS
from prefmill.training.finished import tensor_names

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from prefmill.core.artifact import Artifact

_ADAPTER_NAME = "adapter"


class ModelKeys(Protocol):
    """The configuration keys that name a model; see the stage generate_images."""

    @property
    def model_name_or_path(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def variant(self) -> str | None: ...
    @property
    def adapter(self) -> Path | None: ...
    @property
    def adapter_scale(self) -> float: ...
    @property
    def precision(self) -> Precision: ...


@dataclass(frozen=True)
class GeneratorSource:
    """What makes images: a pipeline's folder or hub name and, on top of it, an adapter's folder.

    `label` names them in the images' metadata, without a path of this machine.
    """

    model: str
    label: str
    precision: Precision
    revision: str | None = None
    variant: str | None = None
    adapter: Path | None = None
    adapter_scale: float = 1.0


def choose_source(keys: ModelKeys, model: Artifact | None, tuned: Artifact | None, where: str) -> GeneratorSource:
    """The model of a configuration and of artifacts: a pipeline, and an adapter on it.

    `model` is a `checkpoint`; `tuned`, of sdxl_dpo, is an adapter on that, or a pipeline of its own. Raises ConfigError
    when there is no pipeline, or two of either.
    """
    if tuned is not None and not (tuned.path / ADAPTER_FILE).is_file():
        if model is not None:
            raise _two("models", where, f"inputs.model={model.path} and inputs.tuned={tuned.path}, a whole pipeline")
        model, tuned = tuned, None
    if model is not None and keys.model_name_or_path is not None:
        raise _two("models", where, f"inputs: {model.path} and model_name_or_path={keys.model_name_or_path}")
    if tuned is not None and keys.adapter is not None:
        raise _two("adapters", where, f"inputs.tuned={tuned.path} and adapter={keys.adapter}")
    base = str(model.path) if model is not None else keys.model_name_or_path
    if base is None:
        raise ConfigError(
            "no model to make images with", where=where,
            fix="give model_name_or_path, or inputs.model=FOLDER of a finished diffusers pipeline",
        )  # fmt: skip
    name = _label(model) if model is not None else Path(base).name if Path(base).is_dir() else base
    folder = tuned.path if tuned is not None else keys.adapter
    if folder is None and keys.adapter_scale != 1:
        raise ConfigError(
            "an adapter_scale without an adapter", where=where, got=keys.adapter_scale,
            fix="leave adapter_scale out, or give adapter",
        )  # fmt: skip
    added = _label(tuned) if tuned is not None else keys.adapter.name if keys.adapter is not None else None
    return GeneratorSource(
        model=base, label=name if added is None else f"{name} + {added}", precision=keys.precision,
        revision=keys.revision, variant=keys.variant, adapter=folder, adapter_scale=keys.adapter_scale,
    )  # fmt: skip


def open_pipeline(source: GeneratorSource) -> Any:
    """diffusers' pipeline on this machine's device; the VAE is in fp32, where it cannot overflow.

    Raises InputError when it cannot be loaded or is of no kind that `backbone` knows.
    """
    import torch

    from prefmill.families.sdxl.loading import open_folder

    folder = open_folder(source.model, source.revision, source.variant)
    pipeline = folder.load_pipeline(dtype={"default": torch_dtype(source.precision), "vae": torch.float32})
    if source.adapter is not None:
        add_adapter(pipeline, source.adapter, source.adapter_scale)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device_type())
    return pipeline


def unpacked(pipeline: Any, latents: Tensor, height: int | None, width: int | None) -> Tensor:
    """What a pipeline gives as latents, [B, C, h, w], for pictures of this size in pixels; FLUX's come as tokens."""
    backbone = BACKBONES[type(pipeline).__name__]
    if not backbone.packed:
        return latents
    side = backbone.side(denoiser(pipeline).config)
    sides = (given // pipeline.vae_scale_factor if given else side for given in (height, width))
    return unpack(latents, *(side // backbone.patch for side in sides))


def decode(model: Any, latents: Tensor) -> Image:
    """One image of a pipeline's latents [C, h, w], decoded in the VAE's own precision, whatever runs around it."""
    import torch

    vae = model.vae
    scaled = latents[None].to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        scaled = scaled * scaled.new_tensor(std).view(shape) + scaled.new_tensor(mean).view(shape)
    # In training's autocast the VAE would run in fp16 or bf16, where it overflows.
    with torch.inference_mode(), torch.autocast(latents.device.type, enabled=False):
        pixels = vae.decode(scaled, return_dict=False)[0]
    image: Image = model.image_processor.postprocess(pixels, output_type="pil")[0]
    return image


def too_long(
    tokenizers: Mapping[str, Any], backbone: Backbone, settings: Mapping[str, Any], prompts: Iterable[str]
) -> list[str]:
    """The prompts of which no text encoder reads the end, sorted; `tokenizers` by their parts' names.

    `settings` are the denoiser's.
    """
    # SDXL's two tokenizers differ in their padding alone. T5's, where it is there, reads the farthest.
    t5 = tokenizers.get(backbone.t5[0]) if backbone.t5 else None
    tokenizer = t5 or tokenizers["tokenizer"]
    longest = backbone.reads(settings)["max_sequence_length"] if t5 else tokenizer.model_max_length
    return sorted(prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) > longest)


def add_adapter(pipeline: Any, folder: Path, scale: float) -> None:
    """Put an adapter on the pipeline: that of `folder`, or a file of another tool; by kohya's keys it is merged."""
    names = (ADAPTER_FILE, PEFT_WEIGHTS)
    file = folder if folder.is_file() else next((folder / name for name in names if (folder / name).is_file()), folder)
    if not file.is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        raise InputError(
            "no adapter in this folder", where=folder, got=others or None, expected=ADAPTER_FILE,
            fix="give the file itself" if others else "give the folder it was saved to",
        )  # fmt: skip
    if (read := read_factors(file))[0]:
        merge(pipeline, file, *read, scale)
        return
    require_place(pipeline, file)
    model, given = denoiser(pipeline), {"weight_name": file.name, "adapter_name": _ADAPTER_NAME}
    modules = {name for name, _ in model.named_modules()}
    try:
        with loading("the adapter", file):
            if any(key.partition(".lora_")[0] in modules for key in tensor_names(file)):
                model.load_lora_adapter(file.parent, prefix=None, **given)  # as save_lora_adapter wrote it
            else:
                pipeline.load_lora_weights(file.parent, **given)
    except InputError as error:  # the file is sound: it was read above
        raise unfitting(file, str(error.details["got"]), f"a LoRA of {type(pipeline).__name__}") from error
    require_place(pipeline, file, _ADAPTER_NAME)
    require_whole_adapter(pipeline, file, _ADAPTER_NAME)
    _scale(pipeline, scale)


def _scale(pipeline: Any, scale: float) -> None:
    """Have `scale` times the adapter's whole change of the weights added; DoRA's is merged for that, see decision 0183.

    PEFT's own scale leaves what DoRA's magnitudes change: at 0 the pipeline would not be the base.
    """
    parts = [part for part in pipeline.components.values() if hasattr(part, "modules")]
    layers = [layer for part in parts for layer in part.modules() if hasattr(layer, "lora_A")]
    if scale == 1 or not any(layer.lora_magnitude_vector for layer in layers):
        pipeline.set_adapters(_ADAPTER_NAME, scale)
        return
    bases = [(layer.get_base_layer(), layer.get_base_layer().weight.data.clone()) for layer in layers]
    pipeline.fuse_lora()
    for layer, before in bases:
        layer.weight.data = before.lerp(layer.weight.data, scale)
    pipeline.unload_lora_weights()


def _label(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage}@{artifact.manifest.content_digest[:12]}"


def _two(what: str, where: str, got: str) -> ConfigError:
    return ConfigError(f"two {what} to make images with", where=where, got=got, fix="leave one out")
