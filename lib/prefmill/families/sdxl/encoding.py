"""Images and prompts as the model sees them: encoded once, by content, before training; VAE and encoders then go."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.core.files import digest_bytes, digest_json
from prefmill.core.precision import Precision, torch_dtype
from prefmill.core.stage import Metrics
from prefmill.distributed.collectives import num_ranks, rank_zero_says, wait_for_all
from prefmill.distributed.devices import rank
from prefmill.families.sdxl.backbone import backbone_of, call_sdxl
from prefmill.families.sdxl.data import PairImages
from prefmill.families.sdxl.generator import too_long
from prefmill.families.sdxl.loading import SdxlFolder
from prefmill.store.missing import Progress, in_batches, missing, silent
from prefmill.store.pictures import DECODER, cut_images, enlarged_images, open_image
from prefmill.store.tensor_cache import TensorCache

Size = tuple[int, int]  # width, height in pixels

_VERSION = 1
_SIDED = re.compile(r"\b(?:left|right)(?:most|wards?)?\b", re.IGNORECASE)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageKeys:
    """Names cached latents: VAE, resolution, precision and buckets decide what an image becomes.

    With a `bucket_step`, in pixels, an image keeps its aspect ratio, see `bucket`; else its middle square is cut out.
    """

    vae: str
    resolution: int
    precision: Precision
    bucket_step: int | None = None

    def size(self, width: int, height: int) -> Size:
        """The width and height in pixels that an image of this size is brought to."""
        square = (self.resolution, self.resolution)
        return bucket(width, height, self.resolution, self.bucket_step) if self.bucket_step else square

    def of(self, image_digest: str, flipped: bool = False, size: Size | None = None) -> str:
        """The key of an image with this sha256; mirrored it is another one."""
        said: list[Any] = [DECODER, self.vae, self.resolution, self.precision, image_digest, flipped]
        # Nothing is added for a square: latents kept before there were buckets stay valid.
        said += [size] if size and size != (self.resolution, self.resolution) else []
        return f"{digest_json(said)}-latents"


@dataclass(frozen=True)
class TextKeys:
    """Names cached text embeddings; `zeros` says whether no prompt is zeros in place of the empty prompt."""

    encoders: str
    precision: Precision
    zeros: bool

    def of(self, prompt: str | None) -> str:
        """The key of a prompt; of None that of no prompt, as guidance leads away from it."""
        if prompt is None and self.zeros:
            return f"{digest_json([_VERSION, self.encoders, self.precision])}-zeros"
        return f"{digest_json([_VERSION, self.encoders, self.precision, digest_bytes((prompt or '').encode())])}-text"


def text_keys(folder: SdxlFolder, precision: Precision) -> TextKeys:
    """Those of a pipeline's text encoders, which compute in `precision`; SDXL's default are zeros."""
    zeros = folder.index.get("force_zeros_for_empty_prompt", folder.backbone.call is call_sdxl)
    encoders, reads = folder.digest(*folder.encoders), folder.backbone.reads(folder.denoiser_settings)
    # FLUX.1's two models have the same encoders; embeddings kept of one were taken for the other's.
    short = "".join(f"-{tokens}" for tokens in reads.values() if folder.backbone.t5 and tokens < folder.backbone.t5[1])
    return TextKeys(encoders + short, precision, zeros)


def encode_images(
    images: Sequence[tuple[Path, str, bool, Size]], folder: SdxlFolder, keys: ImageKeys, cache: TensorCache,
    batch_size: int, device: torch.device, advance: Progress = silent,
) -> None:  # fmt: skip
    """Keep `latents` [C, H/8, W/8] fp32 and `time_ids` [6] fp32 of images (file, sha256, mirrored, size) not yet kept.

    In a distributed run each rank does its share, and all stop together where `advance` raises. Raises InputError for
    an image that cannot be read, or whose latents are not numbers.
    """
    wanted = {keys.of(digest, flip, size): (path, flip, size) for path, digest, flip, size in images}
    # By size, so that a batch holds pictures of one size.
    left = _not_kept(sorted(wanted.items(), key=lambda item: (item[1][2], item[0])), cache)
    if not left:
        return
    from diffusers import AutoencoderKL

    vae = folder.load(AutoencoderKL, "vae", keys.precision).to(device).eval()
    for part in _own_share(list(_of_one_size(left, batch_size)), advance, "images encoded"):
        read = [load_pixels(path, size, flip) for _, (path, flip, size) in part]
        latents = encode_pixels(vae, torch.stack([pixels for pixels, _ in read]).to(device))
        for (key, (path, _, _)), (_, time_ids), latent in zip(part, read, latents, strict=True):
            _require_numbers(latent, path, keys.precision)
            cache.save(key, {"latents": latent.cpu(), "time_ids": time_ids})


def _of_one_size(images: Sequence[tuple[str, Any]], batch_size: int) -> Iterator[Sequence[tuple[str, Any]]]:
    for _, same in groupby(images, key=lambda item: item[1][2]):
        yield from in_batches(list(same), batch_size)


def encode_texts(
    prompts: Sequence[str | None], folder: SdxlFolder, keys: TextKeys, cache: TensorCache, device: torch.device,
    advance: Progress = silent,
) -> None:  # fmt: skip
    """Keep `embeddings` [L, D] and `pooled` [P] of the prompts not yet kept, in the precision of the encoders.

    Prompts longer than the encoders read are told in the log.
    """
    left = _not_kept(sorted({keys.of(prompt): prompt for prompt in prompts}.items()), cache)
    if not left:
        return
    encoder = load_encoders(folder, keys.precision).to(device)
    # One by one: a kept embedding must not depend on which other prompts were missing at that time.
    for ((key, prompt),) in _own_share(in_batches(left, 1), advance, "prompts encoded"):
        reads = folder.backbone.reads(folder.denoiser_settings)
        embeddings, pooled = encode_prompt(encoder, [prompt or ""], device, **reads)
        if prompt is None and keys.zeros:
            embeddings, pooled = embeddings * 0, pooled * 0
        cache.save(key, {"embeddings": embeddings[0].cpu(), "pooled": pooled[0].cpu()})


def load_encoders(folder: SdxlFolder, precision: Precision) -> Any:
    """The pipeline with its text encoders alone."""
    return folder.load_pipeline(**{folder.backbone.part: None}, vae=None, torch_dtype=torch_dtype(precision))


def encode_prompt(encoder: Any, prompts: Sequence[str], device: torch.device, **reads: int) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, D] and pooled embeddings [B, P] of prompts, cut to L tokens; P is 0 for SD 1.5.

    `reads` is what `Backbone.reads` says.
    """
    backbone = backbone_of(type(encoder).__name__, "encoder")
    given: dict[str, Any] = {name: list(prompts) for name in backbone.prompts}
    given |= reads | ({"do_classifier_free_guidance": False} if backbone.free_guidance else {})
    with torch.no_grad():
        found = encoder.encode_prompt(**given, device=device, num_images_per_prompt=1)
    embeddings: Tensor = found[0]
    return embeddings, embeddings.new_zeros(len(prompts), 0) if backbone.pooled is None else found[backbone.pooled]


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """The means of the latents of pixels [B, 3, H, W] in [-1, 1], scaled as the UNet expects, fp32."""
    with torch.no_grad():
        # The mean and not a sample: kept latents are read in every epoch, and must follow from the image alone.
        latents: Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(std).view(shape)
    return (latents - (vae.config.get("shift_factor") or 0.0)) * float(vae.config.scaling_factor)


def bucket(width: int, height: int, resolution: int, step: int) -> Size:
    """Width and height in pixels, multiples of `step`, of about resolution^2 and nearest to the image's aspect ratio.

    As SDXL was trained (Podell et al. 2023, arXiv 2307.01952, section 2.3): no bucket is larger than the square's area.
    """
    area = resolution * resolution
    wide = [(w, area // w // step * step) for w in range(resolution, area // step + 1, step)]
    sizes = [*wide, *((w, h) for h, w in wide)]  # a portrait has the size of the landscape turned
    return min(sizes, key=lambda size: (abs(log(size[0] * height / size[1] / width)), size))


def load_pixels(path: Path, size: Size, flip: bool) -> tuple[Tensor, Tensor]:
    """An image scaled to cover `size` (width, height) and cut around its centre, [3, H, W] in [-1, 1].

    With SDXL's six numbers of size and crop, fp32.
    """
    import numpy as np
    from PIL import Image, ImageOps

    image = open_image(path)
    width, height = image.size
    scale = max(size[0] / width, size[1] / height)
    scaled = (max(size[0], round(width * scale)), max(size[1], round(height * scale)))
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    image = image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + size[0], top + size[1]))
    if flip:
        # The numbers are those of the mirrored picture, as that is what the UNet is shown.
        image, left = ImageOps.mirror(image), scaled[0] - size[0] - left
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    # In fp32 down to the UNet: bf16 rounds 1345 to 1344.
    return pixels, torch.tensor([height, width, top, left, size[1], size[0]], dtype=torch.float32)


def tell_cut(pairs: Sequence[PairImages], folder: SdxlFolder, images: ImageKeys) -> Metrics:
    """How many prompts and images training sees only a part of, or blown up, for the metrics; the log names the first.

    It tells too where the resolution is not the one that the model was made for.
    """
    from transformers import AutoTokenizer

    names = [name for name in folder.encoders if name.startswith("tokenizer")]
    tokenizers = {name: AutoTokenizer.from_pretrained(folder.path, subfolder=name) for name in names}
    long = too_long(tokenizers, folder.backbone, folder.denoiser_settings, {pair.prompt for pair in pairs})
    paths = {path for pair in pairs for path in pair.images}
    cut, enlarged = (found(paths, images.size) for found in (cut_images, enlarged_images))
    if images.resolution != folder.native_resolution:
        _log.warning("resolution is %d, this model draws %d pixels", images.resolution, folder.native_resolution)
    if enlarged:
        _log.warning(
            "%d of %d images are smaller than they are trained at and blown up, by up to %.3g, such as %s; a lower "
            "resolution keeps them sharp", len(enlarged), len(paths), max(enlarged.values()), min(enlarged).name,
        )  # fmt: skip
    if long:
        _log.warning(
            "%d prompts are longer than the text encoders read; their ends have no effect: %s", len(long), long[0]
        )
    if cut:
        _log.warning(
            "%d of %d images are cut, by up to %.0f %% of their area, such as %s; bucket_step: 64 keeps them whole",
            len(cut), len(paths), 100 * max(cut.values()), min(cut).name,
        )  # fmt: skip
    return {"num_cut_prompts": len(long), "num_cut_images": len(cut), "num_enlarged_images": len(enlarged)}


def tell_mirrored(prompts: Iterable[str]) -> None:
    """Say in the log how many prompts are of a side that a mirrored picture does not have."""
    if sided := sorted(prompt for prompt in {*prompts} if _SIDED.search(prompt)):
        _log.warning(
            "%d prompts say left or right, and random_flip trains them with mirrored pictures too: %s",
            len(sided), sided[0],
        )  # fmt: skip


def _not_kept(wanted: list[tuple[str, Any]], cache: TensorCache) -> list[tuple[str, Any]]:
    """What is missing, as rank 0 sees it: ranks that look at different times would share it out differently."""
    held = rank_zero_says(lambda: {key for key, _ in wanted if cache.holds(key)})
    return [(key, value) for key, value in wanted if key not in held]


def _own_share(batches: Sequence[Sequence[Any]], advance: Progress, unit: str) -> Iterator[Sequence[Any]]:
    """This rank's of the batches: one a round, which all ranks end together."""
    for together in missing(batches, lambda _: False, advance, unit, at_once=num_ranks(), size=len):
        yield from together[rank() : rank() + 1]
        wait_for_all()


def _require_numbers(latent: Tensor, path: Path, precision: Precision) -> None:
    if not torch.isfinite(latent).all():
        raise InputError(
            "an image's latents are not numbers", where=path, got=f"NaN or infinity from the VAE in {precision}",
            fix="set vae_precision: fp32, or use the VAE weights made for fp16" if precision != "fp32" else
            "take the image out of the pairs, and check the VAE's weights",
        )  # fmt: skip
