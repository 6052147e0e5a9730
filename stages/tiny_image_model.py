"""Builds a tiny SDXL, SD 1.5, SD 3, FLUX.1 or CLIP, for demos and tests of images without downloads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prefmill.core.config import StrictConfig, later
from prefmill.core.stage import Metrics, Stage, Task


class TinyImageModelConfig(StrictConfig):
    """Which model."""

    architecture: Literal["sdxl", "sd15", "sd3", "flux_dev", "flux_schnell", "clip"] = Field(
        "sdxl", description="clip judges images, the others make them"
    )
    seed: int = Field(0, description="of the random weights, and of what the SDXL learns from")
    pretrain_steps: int = later(0, ge=0, description="of the SDXL's UNet, on sample pictures; 0: random weights")

    @model_validator(mode="after")
    def _others_are_random(self) -> TinyImageModelConfig:
        if self.pretrain_steps and self.architecture != "sdxl":
            raise ValueError("of the architectures only the SDXL is trained: leave out pretrain_steps")
        return self


def run(config: TinyImageModelConfig, task: Task) -> Metrics:
    """Write a plain diffusers or Hugging Face folder."""
    from prefmill.demo.tiny_models import build

    build(config.architecture, task.output, config.seed)
    if not config.pretrain_steps:
        return {"architecture": config.architecture}
    from prefmill.demo.pretrain_images import pretrain_unet

    return {
        "architecture": config.architecture,
        **pretrain_unet(task.output, config.pretrain_steps, config.seed, task),
    }


STAGE = Stage(
    name="tiny_image_model",
    config=TinyImageModelConfig,
    run=run,
    root="checkpoints",
    on="images",
    writes="checkpoint",
    preload=(
        "torch",
        "transformers",
        "diffusers",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    ),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
