"""Noise: what a pair is noised with in an epoch, and what a UNet is to predict of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefmill.core.errors import ConfigError


@dataclass(frozen=True)
class Draw:
    """A pair's timestep and noise, [C, H, W] fp32: the same for winner and loser."""

    timestep: int
    noise: Tensor


def draw(seed: int, pair_id: str, epoch: int, shape: tuple[int, ...], num_timesteps: int) -> Draw:
    """What follows from (seed, pair, epoch), on any rank and machine, in whatever order it is asked for."""
    digest = hashlib.sha256(f"{seed}:{epoch}:{pair_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    timestep = int(torch.randint(num_timesteps, (), generator=generator))
    return Draw(timestep, torch.randn(shape, generator=generator))


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

    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(
            "a UNet with this kind of prediction cannot be trained", where=folder / "scheduler", got=prediction,
            expected="epsilon or v_prediction", fix="start from another checkpoint",
        )  # fmt: skip
    return NoiseSchedule(scheduler.alphas_cumprod.float(), prediction, min_snr_gamma)
