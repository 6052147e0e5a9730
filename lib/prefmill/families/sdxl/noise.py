"""Noise: what a pair is noised with in an epoch, and what a model is to predict of it, by diffusion or flow."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefmill.core.errors import ConfigError
from prefmill.families.sdxl.backbone import Call, call_sdxl
from prefmill.training.objective_names import Need

_READ = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
_FEW_STEPS = re.compile(r"(?<![a-z])(turbo|lightning|hyper|lcm|tcd|dmd2?)(?![a-z])", re.IGNORECASE)
_DISTILLED = {"LCMScheduler": 50, "TCDScheduler": 50}  # and diffusers' default of their `original_inference_steps`
_NOTHING_LEFT = 1e-6  # a signal-to-noise ratio that only zero terminal SNR (Lin et al. 2023) has; SDXL's own is 5e-3


@dataclass(frozen=True)
class Draw:
    """A pair's timestep and noise, [C, H, W] fp32: the same for winner and loser."""

    timestep: int
    noise: Tensor


Sampling = Callable[[int, torch.Generator], int]
Shift = Callable[[Tensor, Sequence[int]], Tensor]


def few_steps(scheduler: Mapping[str, Any], denoiser: Mapping[str, Any], name: str) -> str | None:
    """What says that a pipeline called `name` draws in a few steps without guidance, as Turbo and Lightning; or None.

    Nothing in a folder says so itself: these models have their scheduler's class, or its spacing, from their cards.
    """
    kind = str(scheduler.get("_class_name"))
    if denoiser.get("time_cond_proj_dim") or denoiser.get("guidance_embeds"):  # told its guidance, any, as LCM's UNet
        return None
    if kind in _DISTILLED:
        return kind
    # Models whose noise ends in nothing have this spacing too, and are drawn with guidance.
    is_ordinary = scheduler.get("prediction_type") == "v_prediction" or scheduler.get("rescale_betas_zero_snr")
    if scheduler.get("timestep_spacing") == "trailing" and not is_ordinary:
        return f"{kind}, timestep_spacing: trailing"
    found = _FEW_STEPS.search(name)
    return f"{found[0]} in its name" if found else None


def require_steps(scheduler: Mapping[str, Any], steps: int, key: str) -> None:
    """Raise ConfigError for more steps than LCM's and TCD's schedules have: diffusers would in the midst of drawing."""
    most = scheduler.get("original_inference_steps", _DISTILLED.get(str(scheduler.get("_class_name"))))
    if most and steps > most:
        raise ConfigError(
            "more steps than this model's scheduler has", where=key, got=steps,
            expected=f"at most {most}, of {scheduler.get('_class_name')}",
            fix=f"lower {key}; such models need 1 to 8",
        )  # fmt: skip


def uniform(num_timesteps: int, generator: torch.Generator) -> int:
    """A timestep below `num_timesteps`, all of them alike."""
    return int(torch.randint(num_timesteps, (), generator=generator))


def logit_normal(num_timesteps: int, generator: torch.Generator) -> int:
    """A timestep as SD 3 draws it, s(N(0, 1)) of the way (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    share = torch.sigmoid(torch.randn((), generator=generator))
    return min(int(share * num_timesteps), num_timesteps - 1)  # s(x) rounds to 1 for a large x


def draw(
    seed: int, pair_id: str, epoch: int, shape: tuple[int, ...], num_timesteps: int, offset: float = 0.0,
    sample: Sampling = uniform,
) -> Draw:  # fmt: skip
    """What follows from (seed, pair, epoch), on any rank and machine, in whatever order it is asked for.

    With an `offset` each channel's noise is moved by offset x N(0, 1) as a whole (Guttenberg 2023): pictures may
    become dark or bright.
    """
    # sha256 and not hash(), which differs from process to process for the same text.
    digest = hashlib.sha256(f"{seed}:{epoch}:{pair_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    timestep = sample(num_timesteps, generator)
    noise = torch.randn(shape, generator=generator)
    if offset:  # drawn last: a run without it keeps its noise
        noise += offset * torch.randn(shape[0], 1, 1, generator=generator)
    return Draw(timestep, noise)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process of diffusion: `alphas` are the cumulative products, [T], fp32."""

    supplies: ClassVar[Need] = "noise_errors"

    alphas: Tensor
    prediction: str = "epsilon"
    min_snr_gamma: float | None = None
    call: Call = call_sdxl
    sample: Sampling = uniform

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas)

    def times(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        """What a UNet is told of the timesteps: their numbers, [S]."""
        return timesteps

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


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): `sigmas` are the shares of noise, [T], falling, fp32.

    `shift` moves them by the picture's size, [height, width] of its latents, where the scheduler does.
    """

    supplies: ClassVar[Need] = "velocity_errors"

    sigmas: Tensor
    call: Call
    shift: Shift | None = None
    sample: Sampling = logit_normal

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.sigmas)

    def times(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        """What a transformer is told of the timesteps: T sigma, [S] fp32."""
        return self._sigmas(timesteps, latents) * self.num_timesteps

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = (1 - sigma) x_0 + sigma eps, [S, ...]."""
        sigma = self._sigmas(timesteps, latents).view(-1, *[1] * (latents.dim() - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, eps - x_0, the same at all timesteps."""
        return noise - latents

    def weights(self, timesteps: Tensor) -> None:
        """None: min-SNR's weights are for errors of noise."""

    def _sigmas(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        sigmas = self.sigmas.to(timesteps.device, non_blocking=True)[timesteps]
        return sigmas if self.shift is None else self.shift(sigmas, latents.shape[-2:])


Schedule = NoiseSchedule | FlowSchedule


def load_schedule(folder: Path, min_snr_gamma: float | None, call: Call = call_sdxl, patch: int = 1) -> Schedule:
    """The training schedule of a pipeline's folder; raises ConfigError for one that cannot be trained."""
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    if name.startswith("FlowMatch"):
        return _load_flow(folder, min_snr_gamma, call, patch)
    return _load_diffusion(folder, name, min_snr_gamma, call)


def _load_flow(folder: Path, min_snr_gamma: float | None, call: Call, patch: int) -> FlowSchedule:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    if min_snr_gamma is not None:
        raise ConfigError(
            "min-SNR weighs errors of noise, a flow-matching model predicts velocities", where="min_snr_gamma",
            got=min_snr_gamma, fix="leave out min_snr_gamma",
        )  # fmt: skip
    shift = shift_by_size(scheduler, patch) if scheduler.config.use_dynamic_shifting else None
    return FlowSchedule(scheduler.sigmas.float(), call, shift)


def shift_by_size(scheduler: Any, patch: int) -> Shift:
    """The rule by which pipelines sample: a line through two shifts, from few tokens, `patch` latents wide, to many."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    line = [scheduler.config[name] for name in names]

    def shift(sigmas: Tensor, size: Sequence[int]) -> Tensor:
        mu = calculate_shift((size[0] // patch) * (size[1] // patch), *line)
        shifted: Tensor = scheduler.time_shift(mu, 1.0, sigmas)
        return shifted

    return shift


def _load_diffusion(folder: Path, name: str, min_snr_gamma: float | None, call: Call) -> NoiseSchedule:
    import diffusers

    # The folder's own class first: where its file does not say the betas, that has them, and they are not DDPM's.
    own = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    if not hasattr(own, "alphas_cumprod"):
        raise ConfigError(
            "a UNet of this kind of schedule cannot be trained", where=folder / "scheduler", got=name,
            expected="a diffusion of T timesteps, as of EulerDiscreteScheduler", fix="start from another checkpoint",
        )  # fmt: skip
    # DDPM's, whatever the folder samples with: only the betas and the kind of prediction are read.
    scheduler = diffusers.DDPMScheduler(**{key: own.config[key] for key in _READ if key in own.config})
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
    return NoiseSchedule(scheduler.alphas_cumprod.float(), prediction, min_snr_gamma, call)
