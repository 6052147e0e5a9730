"""How images are drawn: the keys that the stages which make images share."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from prefmill.core.config import StrictConfig

Seed = Annotated[int, Field(ge=0, lt=2**64)]  # of torch's generators


class ImageSampling(StrictConfig):
    """Seeds, and how images are drawn, in diffusers' terms; a size of None is the model's own."""

    seeds: list[Seed] = Field([0, 1], min_length=1, description="an image of each prompt for every seed (and model)")
    # Models are trained with 1000 timesteps: with more steps than that diffusers' schedules end as one repeated step.
    num_inference_steps: int = Field(30, ge=1, le=1000, description="denoising steps")
    guidance_scale: float | None = Field(
        None, ge=0, description="classifier-free guidance, up to 1 none; not set: the default of the model's pipeline"
    )
    negative_prompt: str | None = Field(None, description="what guidance leads away from")
    height: int | None = Field(None, ge=8, multiple_of=8, description="in pixels; none: the model's")
    width: int | None = Field(None, ge=8, multiple_of=8, description="in pixels; none: the model's")

    @model_validator(mode="after")
    def _is_used_as_given(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands there twice, and would make one image: take it out")
        if self.negative_prompt and self.guidance_scale is not None and self.guidance_scale <= 1:
            raise ValueError("negative_prompt: has no effect with guidance_scale up to 1, leave it out or raise that")
        return self
