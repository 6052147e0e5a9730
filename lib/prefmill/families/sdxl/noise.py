"""Noise: what a pair is noised with in an epoch, and what a UNet is to predict of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefmill.core.errors import ConfigError

_NOTHING_LEFT = 1e-6  # a signal-to-noise ratio that only zero terminal SNR (Lin et al. 2023) has; SDXL's own is 5e-3


@dataclass(frozen=True)
class Draw:
    """A pair's timestep and noise, [C, H, W] fp32: the same for winner and loser."""

    timestep: int
    noise: Tensor


def draw(seed: int, pair_id: str, epoch: int, shape: tuple[int, ...], num_timesteps: int, offset: float = 0.0) -> Draw:
    """What follows from (seed, pair, epoch), on any rank and machine, in whatever order it is asked for.

    With an `offset` each channel's noise is moved by offset x N(0, 1) as a whole (Guttenberg 2023): pictures may
    become dark or bright.
    """
    # sha256 and not hash(), which differs from process to process for the same text.
    digest = hashlib.sha256(f"{seed}:{epoch}:{pair_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    timestep = int(torch.randint(num_timesteps, (), generator=generator))
    noise = torch.randn(shape, generator=generator)
    if offset:  # drawn last: a run without it keeps its noise
        noise += offset * torch.randn(shape[0], 1, 1, generator=generator)
    return Draw(timestep, noise)


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process: `alphas` are the cumulative products, [T], fp32."""

    alphas: Tensor
    prediction: str = "epsilon"
    min_snr_gamma: float | None = None

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas)

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(a) x_0 + sqrt(1 - a) eps, [S, ...]."""
        a = self._at(timesteps, latents)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is to predict: eps, or v = sqrt(a) eps - sqrt(1 - a) x_0."""
        if self.prediction == "epsilon":
            return noise
        a = self._at(timesteps, latents)
        return a.sqrt() * noise - (1 - a).sqrt() * latents

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Min-SNR's weight of each error, [S] (Hang et al. 2023, arXiv 2303.09556); None where it is not asked for."""
        if self.min_snr_gamma is None:
            return None
        a = self._alphas(timesteps)
        snr = a / (1 - a)
        # The weights are for the loss on x_0: that on the noise is SNR times it, that on v SNR + 1 times.
        denominator = snr if self.prediction == "epsilon" else snr + 1
        return snr.clamp(max=self.min_snr_gamma) / denominator

    def _alphas(self, timesteps: Tensor) -> Tensor:
        """Those of the timesteps, [S]; the copy is queued behind what a GPU still has to do."""
        return self.alphas.to(timesteps.device, non_blocking=True)[timesteps]

    def _at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return self._alphas(timesteps).view(-1, *[1] * (like.dim() - 1))


def load_schedule(folder: Path, min_snr_gamma: float | None) -> NoiseSchedule:
    """The training schedule of a pipeline's folder; raises ConfigError for a prediction it cannot train."""
    from diffusers import DDPMScheduler

    # DDPM's, whatever the folder samples with: only the betas and the kind of prediction are read.
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(
            "a UNet with this kind of prediction cannot be trained", where=folder / "scheduler", got=prediction,
            expected="epsilon or v_prediction", fix="start from another checkpoint",
        )  # fmt: skip
    if prediction == "epsilon" and scheduler.alphas_cumprod[-1] < _NOTHING_LEFT:
        raise ConfigError(
            "a schedule that ends in pure noise cannot be learnt by predicting the noise", where=folder / "scheduler",
            got="rescale_betas_zero_snr: true with prediction_type: epsilon", expected="v_prediction",
            fix="correct scheduler_config.json: the checkpoint's card says which of the two it was trained with",
        )  # fmt: skip
    return NoiseSchedule(scheduler.alphas_cumprod.float(), prediction, min_snr_gamma)
