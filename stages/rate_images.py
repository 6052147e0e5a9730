"""Has images of the same prompt compared: by people on a web page, by a reward model, or by a stand-in for demos."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.core.image_rows import DIMENSIONS, Dimension
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.images.rate import PeopleConfig, RateImages, RaterConfig, rate_images


class RateImagesConfig(StrictConfig):
    """Who compares which images, on which dimensions."""

    rater: RaterConfig = Field(
        PeopleConfig(by="people"), description="people, reward, sharpness or brightness; see the page"
    )
    images: ExternalPath | None = Field(None, description="a folder of yours with images.csv, in place of the input")
    dimensions: list[Dimension] = Field(list(DIMENSIONS), min_length=1, description="what is asked, in this order")
    max_pairs_per_prompt: int | None = Field(None, ge=1, description="of more images per prompt; none: every two")
    seed: int = Field(0, description="of the sides, the order and the pairs drawn")

    @model_validator(mode="after")
    def _asked_once(self) -> Self:
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError("one of dimensions stands there twice, and would be answered once: take it out")
        return self


def run(config: RateImagesConfig, task: Task) -> Metrics:
    """Write `ratings.csv` and the images it is about; interrupted, it goes on behind the last answer."""
    wanted = RateImages(
        rater=config.rater,
        images=config.images,
        dimensions=config.dimensions,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        seed=config.seed,
    )
    return rate_images(wanted, task)


STAGE = Stage(
    name="rate_images",
    config=RateImagesConfig,
    run=run,
    root="data",
    on="images",
    writes="image_ratings",
    reads={
        "images": Reads("generated_images", "generate_images", optional=True, instead_of=("images",)),
        "reward": Reads("reward_model", optional=True),
    },
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
