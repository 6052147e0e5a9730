"""Bounds on the pixels of images, as configuration."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig


class ImageLimits(StrictConfig):
    """Images are scaled to between `min_pixels` and `max_pixels`; None is what the model's processor says."""

    min_pixels: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=784)
