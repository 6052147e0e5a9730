"""Drift: how far tuning has moved the error with which held-out winners and losers are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefmill.core.artifact import Artifact
from prefmill.core.image_rows import ImageSplit
from prefmill.core.statistics import MIN_PAPERS, Resampling, means
from prefmill.distributed.devices import device_type
from prefmill.families.sdxl.backbone import denoiser
from prefmill.families.sdxl.data import PairImages, read_image_pairs
from prefmill.families.sdxl.encoding import ImageKeys, text_keys
from prefmill.families.sdxl.family import PairReader, errors, predict
from prefmill.families.sdxl.generator import GeneratorSource, open_pipeline
from prefmill.families.sdxl.loading import SdxlFolder, open_folder
from prefmill.families.sdxl.noise import Schedule
from prefmill.store.tensor_cache import TensorCache

# Fixed, so that the drifts of two trainings come from the same draws and can be compared.
_SEED = 0
_VAE_BATCH, _PAIRS_AT_ONCE = 4, 4
_DIGITS = 8
_Errors = NDArray[np.float64]


def denoising_drift(
    base: GeneratorSource,
    tuned: GeneratorSource,
    pairs: Artifact,
    splits: Sequence[ImageSplit],
    num_draws: int,
    resolution: int | None,
    guidance: float | None,
    cache: Path,
    resampling: Resampling,
) -> dict[str, Any] | None:
    """m(tuned) - m(base), m the mean squared error of the predicted noise, of `winner` and `loser`; over prompts.

    Both models see the same timestep and noise, `num_draws` of them a pair, and are told the `guidance` that pictures
    are drawn with where they read one. A winner's drift above 0 says that the
    tuned model explains preferred images worse than before, whatever its margin says (Diffusion-DPO can lower both
    sides' likelihood). None where the splits hold no pairs.
    """
    held_out = [pair for split in splits for pair in read_image_pairs(pairs, split)]
    if not held_out:
        return None
    folder = open_folder(base.model, base.revision, base.variant)
    schedule = folder.schedule(guidance=guidance if folder.denoiser_settings.get("guidance_embeds") else None)
    reader = _encoded(base, folder, schedule, held_out, resolution, cache)
    # A generator: one model is in memory at a time.
    before, after = (_errors(source, reader, held_out, num_draws) for source in (base, tuned))
    difference = after - before
    names = sorted({pair.prompt_id for pair in held_out})
    # A mean per prompt: pairs of one prompt are no independent draws.
    rows = np.stack([difference[[pair.prompt_id == name for pair in held_out]].mean(axis=0) for name in names])
    return {
        "num_pairs": len(held_out),
        "num_prompts": len(names),
        **{side: _estimate(rows[:, place], before[:, place], resampling) for place, side in enumerate(_SIDES)},
    }


_SIDES = ("winner", "loser")


def _encoded(
    base: GeneratorSource, folder: SdxlFolder, schedule: Schedule, pairs: Sequence[PairImages], resolution: int | None,
    cache: Path,
) -> PairReader:  # fmt: skip
    """Latents and embeddings of the pairs, by the base's VAE in fp32 and its text encoders."""
    images = ImageKeys(folder.digest("vae"), resolution or folder.native_resolution, "fp32")
    texts = text_keys(folder, base.precision)
    # Without min-SNR, whatever training used: else two trainings would be measured by different errors.
    reader = PairReader(TensorCache(cache), images, texts, schedule, _SEED)
    reader.encode(folder, [(pair, 0) for pair in pairs], _VAE_BATCH, torch.device(device_type()))
    return reader


def _errors(source: GeneratorSource, reader: PairReader, pairs: Sequence[PairImages], num_draws: int) -> _Errors:
    """m of winner and loser, [N, 2], the mean over the draws."""
    unet = denoiser(open_pipeline(source)).eval()
    device = next(unet.parameters()).device
    totals = np.zeros((len(pairs), 2))
    for epoch in range(num_draws):
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            part = pairs[start : start + _PAIRS_AT_ONCE]
            batch = reader.batch(part, [epoch] * len(part)).to(device)
            with torch.no_grad(), torch.autocast(device.type, unet.dtype, enabled=unet.dtype != torch.float32):
                found = errors(*predict(unet, batch, reader.schedule))
            totals[start : start + len(part)] += torch.stack(found.chunk(2), dim=1).double().cpu().numpy()
    return totals / num_draws


def _estimate(rows: _Errors, before: _Errors, resampling: Resampling) -> dict[str, float | None]:
    found = {"base": round(float(before.mean()), _DIGITS), "value": round(float(rows.mean()), _DIGITS)}
    if len(rows) < MIN_PAPERS:
        return {**found, "low": None, "high": None}
    (estimate,) = means(rows[:, None], resampling)
    return {**found, "low": round(estimate.low, _DIGITS), "high": round(estimate.high, _DIGITS)}
