"""Bounds on the pixels of images, and which parts of a model with a vision part are trained, as configuration."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig, later


class ImageLimits(StrictConfig):
    """Images are scaled to between `min_pixels` and `max_pixels`; None is what the model's processor says."""

    min_pixels: int | None = Field(
        None, ge=1, description="images are scaled up to this many pixels; none: the limit of the model's processor"
    )
    # 784 is 28 x 28 pixels: a single image token of Qwen2-VL, 2 x 2 patches of 14.
    max_pixels: int | None = Field(
        None, ge=784, description="images are scaled down to this many pixels; none: the limit of the model's processor"
    )

    def tell_unread_without(self, images: bool) -> None:
        """Log what is said of images where there are none."""
        if not images:
            said = {*ImageLimits.model_fields, "image_folder"} & type(self).model_fields.keys()
            self.tell_unread("no row has an image", *sorted(said))


class FrozenParts(StrictConfig):
    """Which parts of a model that also takes images stay as they are: its encoder, its way to the text, the text part.

    None is frozen where no row has an image, and trained where one has.
    """

    freeze_vision_tower: bool | None = later(
        None, description="keep the encoder of images as it is; none: where no row has an image"
    )
    freeze_projector: bool | None = later(
        None, description="keep the layers that bring images to the text; none: where no row has an image"
    )
    freeze_language_model: bool = later(False, description="keep the text part and its head as they are")
