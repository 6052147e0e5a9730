"""A tiny SDXL, a batch of pairs for its UNet, and adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefmill.core.config import validate
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.family import SdxlBatch
from prefmill.families.sdxl.loading import SdxlFolder, load_policy
from prefmill.families.sdxl.noise import NoiseSchedule

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.01, 1000))


def make_batch(num_pairs: int = 2, seed: int = 0) -> SdxlBatch:
    """Random latents, noise and conditions of the tiny UNet's shapes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def twice(value: Tensor) -> Tensor:
        return torch.cat([value, value])

    return SdxlBatch(
        latents=normal(2 * num_pairs, 4, 16, 16),
        noise=twice(normal(num_pairs, 4, 16, 16)),
        timesteps=twice(torch.randint(1000, (num_pairs,), generator=generator)),
        embeddings=twice(normal(num_pairs, 77, 64)),
        pooled=twice(normal(num_pairs, 32)),
        time_ids=torch.tensor([[1345.0, 1000, 0, 12, 32, 32]]).repeat(2 * num_pairs, 1),
        weight=torch.ones(num_pairs),
    )


def make_policy(sdxl: SdxlFolder, precision: str = "fp32", lora: Any = "dora", seed: int = 0) -> Any:
    """The UNet with `dora`, `lora` or no adapter, rank 4 and alpha 16."""
    adapter = None if lora is None else {"r": 4, "use_dora": lora == "dora"}
    torch.manual_seed(seed)
    return load_policy(sdxl, validate(SdxlPreferenceConfig, {"precision": precision, "lora": adapter}))


def disturb(model: Any, scale: float = 0.2) -> Any:
    """`model` with all that is trained moved, as if it had been."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += scale * value.std().clamp_min(0.05) * torch.randn(value.shape, generator=generator)
    return model
