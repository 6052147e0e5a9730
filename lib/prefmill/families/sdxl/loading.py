"""The parts of a pipeline, from a folder or the hub, and the UNet or transformer to train."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import digest_json, digest_path
from prefmill.core.precision import Precision, torch_dtype
from prefmill.families.causal.loading import loading
from prefmill.families.sdxl.backbone import Backbone, backbone_of, call_sdxl
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.folders import (
    PIPELINE_FILE,
    files_of,
    local_folder,
    read_index,
    read_json,
    require_files,
    require_one_schedule,
    variant_of,
)
from prefmill.families.sdxl.noise import Schedule, few_steps, load_schedule, require_steps
from prefmill.families.sdxl.whole import require_whole_part, require_whole_pipeline
from prefmill.training.adapter import new_adapter, unfitting_targets
from prefmill.training.config import weights_precision
from prefmill.training.finished import precision_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SdxlFolder:
    """A pipeline's folder on this machine; `variant` names which of its weight files are read."""

    path: Path
    variant: str | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The parts by name, library and class."""
        return read_index(self.path)

    @cached_property
    def backbone(self) -> Backbone:
        """What differs in this kind of pipeline."""
        return backbone_of(self.index.get("_class_name"), self.path)

    @property
    def denoiser_class(self) -> Any:
        """diffusers' class of the UNet or transformer."""
        import diffusers

        return getattr(diffusers, self.index[self.backbone.part][1])

    @property
    def encoders(self) -> list[str]:
        """The names of the text encoders and tokenizers that are there."""
        return [name for name in sorted(self.index) if name.startswith(("text_encoder", "tokenizer"))]

    @cached_property
    def denoiser_settings(self) -> dict[str, Any]:
        """What the config.json of the UNet or transformer says."""
        return dict(self.denoiser_class.load_config(self.path, subfolder=self.backbone.part))

    @property
    def native_resolution(self) -> int:
        """The size in pixels that the model was made for."""
        blocks = read_json(self.path / "vae" / "config.json")["block_out_channels"]
        return self.backbone.side(self.denoiser_settings) << len(blocks) - 1

    def schedule(self, min_snr_gamma: float | None = None, guidance: float | None = None) -> Schedule:
        """The training schedule, with how the denoiser is called; raises ConfigError for what it cannot follow."""
        if width := self.denoiser_settings.get("time_cond_proj_dim"):
            # Called without, it is a model that nobody draws with.
            raise ConfigError(
                "a UNet that has learnt its guidance cannot be trained", where=self.path / "unet",
                got=f"time_cond_proj_dim: {width}", fix="start from the model that it was distilled from",
            )  # fmt: skip
        call = self.backbone.calling(self.denoiser_settings, guidance)
        return load_schedule(self.path, min_snr_gamma, call, self.backbone.patch)

    @cached_property
    def scheduler_settings(self) -> dict[str, Any]:
        """What the file of the scheduler says."""
        return read_json(self.path / "scheduler" / "scheduler_config.json")

    def few_steps(self, name: str | None) -> str | None:
        """See `noise.few_steps`."""
        return few_steps(self.scheduler_settings, self.denoiser_settings, Path(name or "").name)

    def load_denoiser(self, precision: Precision) -> Any:
        """The UNet or transformer."""
        return self.load(self.denoiser_class, self.backbone.part, precision)

    def denoiser_precision(self) -> Precision:
        """The precision that most weights of its first file are stored in."""
        return precision_of(files_of(self.path / self.backbone.part, self.variant)[0])

    def load_pipeline(self, **parts: Any) -> Any:
        """The pipeline with these parts in place of its own, None for none."""
        import diffusers

        loader = getattr(diffusers, self.index["_class_name"])
        with loading("the pipeline", self.path):
            pipeline = loader.from_pretrained(
                self.path, variant=self.variant, use_safetensors=True, **self.backbone.options, **parts
            )
        require_whole_pipeline(pipeline, self.path, self.variant)
        return pipeline

    def load(self, loader: Any, part: str, precision: Precision) -> Any:
        """The part of that name, by diffusers' or transformers' class `loader`."""
        # safetensors alone: a .bin is a pickle, which may run code when it is opened.
        with loading(f"the pipeline's {part}", self.path):
            model = loader.from_pretrained(
                self.path, subfolder=part, torch_dtype=torch_dtype(precision), use_safetensors=True,
                variant=variant_of(self.path / part, self.variant),
            )  # fmt: skip
        require_whole_part(model, self.path / part)
        return model

    def digest(self, *parts: str) -> str:
        """What the weights and settings of these parts are, wherever they lie."""
        return digest_json([[part, self.variant, digest_path(self.path / part)] for part in parts])


def open_folder(name: str, revision: str | None, variant: str | None) -> SdxlFolder:
    """The pipeline called `name`, fetched from the hub where it is no folder; raises InputError for anything else."""
    folder = SdxlFolder(local_folder(name) or _fetch(name, revision, variant), variant)
    # Here, where a wrong kind or a missing part costs nothing yet.
    left_out = folder.backbone.options
    require_parts(folder)
    require_files(folder.path, {part: value for part, value in folder.index.items() if part not in left_out}, variant)
    require_fit(folder)
    return folder


def require_parts(folder: SdxlFolder) -> None:
    """Raise InputError where model_index.json leaves out a part that the pipeline, or what is made of it, needs."""
    import diffusers

    given = inspect.signature(getattr(diffusers, folder.index["_class_name"]).__init__).parameters.values()
    needed = {one.name for one in given if one.default is one.empty} - {"self", *folder.backbone.options}
    missing = sorted(needed - folder.backbone.spare - set(folder.index))
    if missing:
        raise InputError(
            "a part of the pipeline is missing", where=folder.path / PIPELINE_FILE, got=f"no {', '.join(missing)}",
            expected=", ".join(sorted(needed)),
            fix="download the whole pipeline: it was saved without these parts. SDXL's refiner has none: give the base",
        )  # fmt: skip


def require_fit(folder: SdxlFolder) -> None:
    """Raise InputError where the parts of a folder are of different models: they fail in the midst of a drawing."""
    backbone, settings = folder.backbone, folder.denoiser_settings
    channels = read_json(folder.path / "vae" / "config.json").get("latent_channels")
    wanted = channels * backbone.patch**2 if channels and backbone.packed else channels
    if wanted and settings.get("in_channels") != wanted:
        raise InputError(
            f"the {backbone.part} does not take the VAE's latents alone", where=folder.path / backbone.part,
            got=f"in_channels: {settings.get('in_channels')}", expected=f"{wanted}, of {channels} latent channels",
            fix="give the model that draws from text alone: this one is for inpainting or editing, or has another VAE",
        )  # fmt: skip
    for key, wanted in _conditions(folder).items() if backbone.part == "unet" else ():
        if (told := settings.get(key, wanted)) not in (wanted, [wanted] * len(settings["block_out_channels"])):
            raise InputError(
                "the unet is told other things than the text encoders say", where=folder.path / "unet",
                got=f"{key}: {told}", expected=wanted, fix="give a whole pipeline that draws from text alone: parts of "
                "two models do not go together, refiners and variations ask for more",
            )  # fmt: skip
    _require_scheduler(folder)


def _conditions(folder: SdxlFolder) -> dict[str, Any]:
    """The settings of a UNet that is told a prompt by the folder's encoders, SDXL's with six numbers, and no more."""
    encoders = [name for name in folder.encoders if name.startswith("text_encoder")]
    read = [read_json(folder.path / name / "config.json") for name in encoders]
    needed = {"cross_attention_dim": sum(one["hidden_size"] for one in read)}
    if folder.backbone.call is call_sdxl:
        ids = 6 * folder.denoiser_settings["addition_time_embed_dim"]
        needed["projection_class_embeddings_input_dim"] = read[-1]["projection_dim"] + ids
    return {**needed, "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None}


def _require_scheduler(folder: SdxlFolder) -> None:
    scheduler = folder.scheduler_settings
    require_one_schedule(folder.path, scheduler, folder.index, folder.denoiser_settings)
    kind, is_flow = str(scheduler.get("_class_name")), folder.backbone.part == "transformer"
    if is_flow != (kind.startswith("FlowMatch") or (is_flow and scheduler.get("prediction_type") == "flow_prediction")):
        raise InputError(
            "the scheduler is of another kind of model", where=folder.path / "scheduler", got=kind,
            expected="FlowMatchEulerDiscreteScheduler" if is_flow else "one of diffusion, as EulerDiscreteScheduler",
            fix="take the folder scheduler/ of the pipeline that this model was made from",
        )  # fmt: skip


def require_patches(step: int, settings: Any, *keys: str) -> None:
    """Raise ConfigError where a size in pixels is no multiple of `step`, the width of a transformer's patches."""
    for key in keys:
        if (getattr(settings, key) or 0) % step:
            raise ConfigError(
                "a picture of this size does not divide into patches", where=key, got=getattr(settings, key),
                expected=f"a multiple of {step}", fix=f"correct {key}",
            )  # fmt: skip


def require_made_for(folder: SdxlFolder, config: SdxlPreferenceConfig) -> None:
    """Raise ConfigError for samples that the scheduler cannot draw; tell of a model that was distilled."""
    if config.sample_steps is not None:
        require_steps(folder.scheduler_settings, config.sample_inference_steps, "sample_inference_steps")
    if few := folder.few_steps(config.model_name_or_path):
        _log.warning(
            "this model seems to be distilled to few steps (%s): training on noise of all times may undo that; "
            "start from the model it was made of, or look at the samples, drawn without guidance", few,
        )  # fmt: skip


def load_policy(folder: SdxlFolder, config: SdxlPreferenceConfig) -> Any:
    """The model to train, with its adapter: a frozen base in the precision of the run, what is trained in fp32."""
    unet = folder.load_denoiser(weights_precision(config))
    for module in unet.modules():
        # By hand and not by eval(): the Trainer puts a model back into training mode.
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # policy and reference must agree
    _use_attention(unet, config.attn_implementation)
    if config.activation_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.torch_compile:
        # In place: torch.compile(unet) would return a wrapper, and put `_orig_mod.` into the names of the weights.
        unet.compile()
    return add_adapter(unet, config)


def add_adapter(unet: Any, config: SdxlPreferenceConfig) -> Any:
    """`unet` with the adapter of the configuration, step 0 being the base to the bit; unchanged without one.

    Raises ConfigError for DoRA, and for save_merged, on layers that are not linear, as SD 1.5's proj_in.
    """
    if config.lora is None:
        return unet
    from prefmill.families.sdxl.dora import make_exact
    from prefmill.families.sdxl.lora import make_lean

    model = new_adapter(unet, config)
    layers = {name: unet.get_submodule(name).get_base_layer() for name in model.base_model.targeted_module_names}
    others = [f"{name} ({type(layer).__name__})" for name, layer in layers.items() if type(layer) is not nn.Linear]
    if others and (config.lora.use_dora or config.save_merged):
        raise unfitting_targets(f"not linear, with use_dora or save_merged: {others[0]}")
    make_exact(model)
    make_lean(model)
    return model


def _use_attention(unet: Any, name: str | None) -> None:
    """diffusers' default already is torch's memory-efficient attention."""
    try:
        if name == "sliced":
            unet.set_attention_slice("auto")  # which a transformer has not
        if name == "xformers":
            unet.enable_xformers_memory_efficient_attention()
    except (ModuleNotFoundError, ValueError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            "this attention cannot be used here", where="attn_implementation", got=str(error).splitlines()[0],
            fix="set attn_implementation: sdpa; xformers needs its package and a GPU, sliced a UNet",
        ) from None  # fmt: skip


def _fetch(name: str, revision: str | None, variant: str | None) -> Path:
    from diffusers import DiffusionPipeline

    options: Mapping[str, Any] = {"revision": revision, "variant": variant, "use_safetensors": True}
    try:
        return Path(DiffusionPipeline.download(name, **options))
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot fetch the pipeline", where=name, got=str(error).splitlines()[0],
            fix="check the name, the network or HF_HOME, and access to gated models; or give a folder",
        ) from None  # fmt: skip
