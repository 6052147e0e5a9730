"""Bounds on the pixels of images, as configuration."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig


class ImageLimits(StrictConfig):
    """Images are scaled to between `min_pixels` and `max_pixels`; None is what the model's processor says."""

    min_pixels: int | None = Field(
        None, ge=1, description="images are scaled up to this many pixels; none: the limit of the model's processor"
    )
    max_pixels: int | None = Field(
        None, ge=784, description="images are scaled down to this many pixels; none: the limit of the model's processor"
    )
