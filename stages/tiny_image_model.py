"""Builds a tiny SDXL, SD 1.5, SD 3 or CLIP with random weights, for demos and tests of images without downloads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.stage import Metrics, Stage, Task


class TinyImageModelConfig(StrictConfig):
    """Which model."""

    architecture: Literal["sdxl", "sd15", "sd3", "clip"] = Field(
        "sdxl", description="sdxl, sd15 and sd3 make images, clip judges them"
    )
    seed: int = Field(0, description="of the random weights")


def run(config: TinyImageModelConfig, task: Task) -> Metrics:
    """Write a plain diffusers or Hugging Face folder."""
    from prefmill.demo.tiny_models import build

    build(config.architecture, task.output, config.seed)
    return {"architecture": config.architecture}


STAGE = Stage(
    name="tiny_image_model",
    config=TinyImageModelConfig,
    run=run,
    root="checkpoints",
    on="images",
    writes="checkpoint",
    preload=("torch", "transformers", "diffusers"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
