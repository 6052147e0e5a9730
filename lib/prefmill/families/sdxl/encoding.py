"""Images and prompts as the UNet sees them: encoded once, by content, before training; VAE and encoders then go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prefmill.core.errors import InputError
from prefmill.core.files import digest_bytes, digest_json
from prefmill.core.precision import Precision, torch_dtype
from prefmill.families.sdxl.loading import SdxlFolder
from prefmill.store.pictures import open_image
from prefmill.store.tensor_cache import TensorCache

_VERSION = 1
_DECODER = 2  # latents of pictures that were read sideways or without white are not taken again


@dataclass(frozen=True)
class ImageKeys:
    """Names cached latents: the VAE, the resolution and the precision decide what an image becomes."""

    vae: str
    resolution: int
    precision: Precision

    def of(self, image_digest: str, flipped: bool = False) -> str:
        """The key of an image with this sha256; mirrored it is another one."""
        said = [_DECODER, self.vae, self.resolution, self.precision, image_digest, flipped]
        return f"{digest_json(said)}-latents"


@dataclass(frozen=True)
class TextKeys:
    """Names cached text embeddings."""

    encoders: str
    precision: Precision

    def of(self, prompt: str) -> str:
        """The key of a prompt."""
        return f"{digest_json([_VERSION, self.encoders, self.precision, digest_bytes(prompt.encode())])}-text"


def encode_images(
    images: Sequence[tuple[Path, str, bool]],
    folder: SdxlFolder,
    keys: ImageKeys,
    cache: TensorCache,
    batch_size: int,
    device: torch.device,
) -> None:
    """Keep `latents` [C, H/8, W/8] fp32 and `time_ids` [6] fp32 of images (file, sha256, mirrored) not yet kept.

    In a distributed run each rank does its share. Raises InputError for an image that cannot be read, or whose latents
    are not numbers.
    """  # fmt: skip
    missing = _own_share(sorted({keys.of(digest, flip): (path, flip) for path, digest, flip in images}.items()), cache)
    if missing:
        from diffusers import AutoencoderKL

        vae = folder.load(AutoencoderKL, "vae", keys.precision).to(device).eval()
        for start in tqdm(range(0, len(missing), batch_size), desc="encoding images", unit=" batches"):
            part = missing[start : start + batch_size]
            read = [load_pixels(path, keys.resolution, flip) for _, (path, flip) in part]
            latents = encode_pixels(vae, torch.stack([pixels for pixels, _ in read]).to(device))
            for (key, (path, _)), (_, time_ids), latent in zip(part, read, latents, strict=True):
                _require_numbers(latent, path, keys.precision)
                cache.save(key, {"latents": latent.cpu(), "time_ids": time_ids})
    wait_for_all()


def encode_texts(
    prompts: Sequence[str], folder: SdxlFolder, keys: TextKeys, cache: TensorCache, device: torch.device
) -> None:
    """Keep `embeddings` [77, D] and `pooled` [P] of the prompts not yet kept, in the precision of the encoders."""
    missing = _own_share(sorted({keys.of(prompt): prompt for prompt in prompts}.items()), cache)
    if missing:
        encoder = load_encoders(folder, keys.precision).to(device)
        for key, prompt in tqdm(missing, desc="encoding prompts", unit=" prompts"):
            embeddings, pooled = encode_prompt(encoder, [prompt], device)
            cache.save(key, {"embeddings": embeddings[0].cpu(), "pooled": pooled[0].cpu()})
    wait_for_all()


def load_encoders(folder: SdxlFolder, precision: Precision) -> Any:
    """The pipeline with its text encoders alone."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(
        folder.path, unet=None, vae=None, torch_dtype=torch_dtype(precision), variant=folder.variant,
        use_safetensors=True, add_watermarker=False,
    )  # fmt: skip


def encode_prompt(encoder: Any, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings [B, 77, D] and pooled embeddings [B, P] of prompts, cut to 77 tokens."""
    with torch.no_grad():
        embeddings, _, pooled, _ = encoder.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return embeddings, pooled


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """The means of the latents of pixels [B, 3, H, W] in [-1, 1], scaled as the UNet expects, fp32."""
    with torch.no_grad():
        latents: Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(std).view(shape)
    return latents * float(vae.config.scaling_factor)


def load_pixels(path: Path, resolution: int, flip: bool) -> tuple[Tensor, Tensor]:
    """An image scaled and cut around its centre, [3, R, R] in [-1, 1], and SDXL's six size and crop numbers, fp32."""
    import numpy as np
    from PIL import Image, ImageOps

    image = open_image(path)
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    image = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    if flip:
        image, left = ImageOps.mirror(image), size[0] - resolution - left
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    # In fp32 down to the UNet: bf16 rounds 1345 to 1344.
    return pixels, torch.tensor([height, width, top, left, resolution, resolution], dtype=torch.float32)


def wait_for_all() -> None:
    """Have every rank come here before any goes on."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _own_share(wanted: list[tuple[str, Any]], cache: TensorCache) -> list[tuple[str, Any]]:
    """What is missing of this rank's part; parts are by place, so ranks that look at different times agree on them."""
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [(key, value) for key, value in wanted[rank::ranks] if not cache.holds(key)]


def _require_numbers(latent: Tensor, path: Path, precision: Precision) -> None:
    if not torch.isfinite(latent).all():
        raise InputError(
            "an image's latents are not numbers", where=path, got=f"NaN or infinity from the VAE in {precision}",
            fix="set vae_precision: fp32, or use the VAE weights made for fp16" if precision != "fp32" else
            "take the image out of the pairs, and check the VAE's weights",
        )  # fmt: skip
