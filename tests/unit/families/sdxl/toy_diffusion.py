"""A diffusion small enough to train in seconds: 16 numbers around +1 or around -1, a denoiser, samples of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefmill.families.sdxl.backbone import call_sdxl
from prefmill.families.sdxl.family import SdxlBatch, SdxlFamily, errors, predict
from prefmill.families.sdxl.noise import FlowSchedule, NoiseSchedule, Schedule
from prefmill.training.objectives import Objective, Settings

DIM, MEAN, SPREAD, STEPS = 16, 1.0, 0.5, 100


def make_schedule() -> NoiseSchedule:
    """A hundred steps, almost nothing left of the data after the last."""
    return NoiseSchedule(torch.cumprod(1 - torch.linspace(1e-3, 0.12, STEPS), 0))


def make_flow() -> FlowSchedule:
    """A hundred steps from noise to data, evenly."""
    return FlowSchedule(torch.arange(STEPS, 0, -1) / STEPS, call_sdxl)


class Denoiser(nn.Module):
    """Called as a UNet is, on [S, 16, 1, 1]; its conditions say nothing."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(DIM + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, DIM)
        )

    def forward(self, noised: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        angles = timestep[:, None] / STEPS * math.pi * torch.tensor([0.5, 1, 2, 4, 8, 16, 32, 64])
        known = torch.cat([noised.flatten(1), angles.sin(), angles.cos()], 1)
        return (self.layers(known).view_as(noised),)


def draw_data(count: int, mode: float, generator: torch.Generator) -> Tensor:
    """Points of one of the modes, [N, 16, 1, 1]."""
    return mode * MEAN + SPREAD * torch.randn(count, DIM, 1, 1, generator=generator)


def make_batch(winners: Tensor, losers: Tensor, schedule: Schedule, generator: torch.Generator) -> SdxlBatch:
    """Pairs with noise and timestep in common."""
    n = len(winners)
    noise = torch.randn(n, DIM, 1, 1, generator=generator)
    timesteps = torch.randint(schedule.num_timesteps, (n,), generator=generator)
    nothing = torch.zeros(2 * n, 1)
    return SdxlBatch(
        torch.cat([winners, losers]), torch.cat([noise, noise]), torch.cat([timesteps, timesteps]), nothing, nothing,
        nothing, torch.ones(n),
    )  # fmt: skip


def pretrain(seed: int, schedule: Schedule, steps: int = 1500) -> Denoiser:
    """A denoiser of both modes in equal parts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = make_batch(draw_data(128, 1, generator), draw_data(128, -1, generator), schedule, generator)
        loss = errors(*predict(model, batch, schedule)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


@dataclass(frozen=True)
class Tuning:
    """How a preference is trained in; `labels` says which side of a pair wins."""

    objective: Objective
    beta: float
    lr: float
    steps: int
    labels: str = "true"


def tune(base: Denoiser, tuning: Tuning, schedule: Schedule, seed: int, residuals: bool = False) -> Denoiser:
    """`base` tuned on pairs whose winner is of the mode +1, through the family and the objective of the stage."""
    generator = torch.Generator().manual_seed(1000 + seed)
    model = copy.deepcopy(base)
    family = SdxlFamily(lambda *_: None, lambda *_: torch.zeros(1), schedule, residuals)
    optimizer = torch.optim.Adam(model.parameters(), lr=tuning.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, tuning.steps)
    for _ in range(tuning.steps):
        winners, losers = draw_data(64, 1, generator), draw_data(64, -1, generator)
        if tuning.labels == "swapped":
            winners, losers = losers, winners
        if tuning.labels == "shuffled":
            swap = (torch.rand(64, generator=generator) < 0.5)[:, None, None, None]
            winners, losers = torch.where(swap, losers, winners), torch.where(swap, winners, losers)
        batch = make_batch(winners, losers, schedule, generator)
        with torch.no_grad():
            predictions, target = predict(base, batch, schedule)
            reference = -errors(predictions, target)
        if residuals:
            batch = SdxlBatch(**{**vars(batch), "ref_predictions": predictions[:64]})
        scores = family.pair_scores(model, batch, *reference.chunk(2))
        loss = tuning.objective.loss(scores, Settings(beta=tuning.beta, num_timesteps=schedule.num_timesteps)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model


@dataclass(frozen=True)
class Measured:
    """Of samples: the share nearer +1, and mean and spread of those; and how the winners' error has changed."""

    share: float
    mean: float
    spread: float
    winner_error_change: float


def measure(model: Denoiser, base: Denoiser, schedule: Schedule, count: int = 4000) -> Measured:
    """What `model` makes, and how much worse than `base` it predicts the noise of points around +1."""
    generator = torch.Generator().manual_seed(77)
    samples = sample(model, schedule, count, generator).flatten(1)
    good = samples[samples.mean(1) > 0]
    batch = make_batch(draw_data(8000, 1, generator), draw_data(8000, -1, generator), schedule, generator)
    with torch.no_grad():
        change = [errors(*predict(one, batch, schedule))[:8000].mean().item() for one in (model, base)]
    mean = good.mean().item() if len(good) else math.nan
    return Measured(len(good) / count, mean, (good - good.mean(0)).std().item(), change[0] - change[1])


@torch.no_grad()
def sample(model: Denoiser, schedule: Schedule, count: int, generator: torch.Generator) -> Tensor:
    """Samples of a model, [N, 16, 1, 1]: Euler's steps along a flow, ancestral ones of a diffusion."""
    x = torch.randn(count, DIM, 1, 1, generator=generator)
    if isinstance(schedule, NoiseSchedule):
        return _ancestral(model, schedule, x, generator)
    for t in range(STEPS):
        after = schedule.sigmas[t + 1] if t + 1 < STEPS else torch.tensor(0.0)
        velocity = model(x, schedule.times(torch.full((count,), t), x))[0]
        x = x + (after - schedule.sigmas[t]) * velocity
    return x


def _ancestral(model: Denoiser, schedule: NoiseSchedule, x: Tensor, generator: torch.Generator) -> Tensor:
    """Ho et al. 2020, nothing clipped."""
    alphas = schedule.alphas
    for t in range(STEPS - 1, -1, -1):
        before = alphas[t - 1] if t else torch.tensor(1.0)
        ratio = alphas[t] / before
        noise = model(x, torch.full((len(x),), t))[0]
        x = (x - (1 - ratio) / (1 - alphas[t]).sqrt() * noise) / ratio.sqrt()
        if t:
            x += ((1 - before) / (1 - alphas[t]) * (1 - ratio)).sqrt() * torch.randn(x.shape, generator=generator)
    return x
