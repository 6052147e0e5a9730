"""The parts of an SDXL pipeline, from a folder or the hub, and the UNet to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import digest_json, digest_path
from prefmill.core.precision import Precision, torch_dtype
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.training.config import weights_precision

PIPELINE_FILE = "model_index.json"


@dataclass(frozen=True)
class SdxlFolder:
    """A pipeline's folder on this machine; `variant` names which of its weight files are read."""

    path: Path
    variant: str | None = None

    def load(self, loader: Any, part: str, precision: Precision) -> Any:
        """The part of that name, by diffusers' or transformers' class `loader`."""
        # safetensors alone: a .bin is a pickle, which may run code when it is opened.
        return loader.from_pretrained(
            self.path, subfolder=part, torch_dtype=torch_dtype(precision), variant=self.variant, use_safetensors=True
        )

    def digest(self, *parts: str) -> str:
        """What the weights and settings of these parts are, wherever they lie."""
        return digest_json([[part, self.variant, digest_path(self.path / part)] for part in parts])


def open_folder(name: str, revision: str | None, variant: str | None) -> SdxlFolder:
    """The pipeline called `name`, fetched from the hub where it is no folder; raises InputError for anything else."""
    path = Path(name)
    if not path.is_dir():
        path = _fetch(name, revision, variant)
    if not (path / PIPELINE_FILE).is_file() or not (path / "text_encoder_2").is_dir():
        raise InputError(
            "no SDXL pipeline here", where=name, expected=f"a folder with {PIPELINE_FILE}, unet, vae and two encoders",
            fix="give a diffusers SDXL folder, or a hub name such as stabilityai/stable-diffusion-xl-base-1.0",
        )  # fmt: skip
    return SdxlFolder(path, variant)


def load_policy(folder: SdxlFolder, config: SdxlPreferenceConfig) -> Any:
    """The UNet to train, with its adapter: a frozen base in the precision of the run, what is trained in fp32."""
    from diffusers import UNet2DConditionModel

    unet = folder.load(UNet2DConditionModel, "unet", weights_precision(config))
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
    """`unet` with the adapter of the configuration, step 0 being the base to the bit; unchanged without one."""
    if config.lora is None:
        return unet
    import peft

    from prefmill.core.seeding import seeded
    from prefmill.families.sdxl.dora import make_exact
    from prefmill.families.sdxl.lora import make_lean

    given = config.lora
    targets = given.target_modules
    settings = peft.LoraConfig(
        r=given.r, lora_alpha=given.alpha, lora_dropout=0.0, use_dora=given.use_dora,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )  # fmt: skip
    try:
        with seeded(config.seed):  # an adapter begins at random weights
            model = peft.get_peft_model(unet, settings)
    except ValueError as error:
        raise ConfigError(
            "the adapter does not fit this UNet", where="lora.target_modules", got=str(error).splitlines()[0],
            fix="name linear layers of the UNet, such as to_q, to_k, to_v, to_out.0",
        ) from None  # fmt: skip
    make_exact(model)
    make_lean(model)
    return model


def optimizer_name(config: SdxlPreferenceConfig) -> str:
    """The Trainer's name of the optimizer; raises ConfigError where the package it needs is missing."""
    import importlib.util

    if config.optim == "adamw_bnb_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "an 8-bit optimizer needs a package that is not installed", where="optim", got="no bitsandbytes",
            fix="pip install bitsandbytes (it needs a GPU), or set optim: adamw_torch",
        )  # fmt: skip
    return config.optim


def _use_attention(unet: Any, name: str | None) -> None:
    """diffusers' default already is torch's memory-efficient attention."""
    if name == "sliced":
        unet.set_attention_slice("auto")
    if name == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError, NotImplementedError) as error:
            raise ConfigError(
                "this attention cannot be used here", where="attn_implementation", got=str(error).splitlines()[0],
                fix="install xformers on a machine with a GPU, or set attn_implementation: sdpa",
            ) from None  # fmt: skip


def _fetch(name: str, revision: str | None, variant: str | None) -> Path:
    from diffusers import StableDiffusionXLPipeline

    options: Mapping[str, Any] = {"revision": revision, "variant": variant, "use_safetensors": True}
    try:
        return Path(StableDiffusionXLPipeline.download(name, **options))
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot fetch the SDXL pipeline", where=name, got=str(error).splitlines()[0],
            fix="check the name, the network or HF_HOME, and access to gated models; or give a folder",
        ) from None  # fmt: skip
