"""Turns ratings into pairs of a preferred and a rejected image with soft labels on every dimension, split by prompt."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.images.pair_sources import PairSource
from prefmill.images.pairs import ImageSplitConfig, Labels


class BuildImagePairsConfig(StrictConfig):
    """Which ratings, and what makes a pair of them."""

    sources: list[PairSource] = Field(
        [], description="ratings, scores or pairs of yours, Pick-a-Pic's, ImageReward's, HPDv2's; see the page"
    )
    labels: Labels = Field(
        "votes", description="shares of the votes, or bradley_terry: smoothed over a prompt's images"
    )
    min_agreement: float = Field(0.6, gt=0.5, le=1, description="set pairs aside whose voters agree less overall")
    splits: ImageSplitConfig = Field(default_factory=ImageSplitConfig, description="shares of the prompts")
    max_quarantined_share: float = Field(0.1, ge=0, le=1, description="fail when more of the ratings are bad")
    low_yield: float = Field(0.5, ge=0, le=1, description="warn when fewer of the prompts give a pair")


def run(config: BuildImagePairsConfig, task: Task) -> Metrics:
    """Write `pairs.jsonl`, the images they name, and what was set aside; interrupted, it starts over."""
    from prefmill.images.build_pairs import PairBuilding, build_pairs

    building = PairBuilding(
        sources=config.sources,
        labels=config.labels,
        min_agreement=config.min_agreement,
        splits=config.splits,
        max_quarantined_share=config.max_quarantined_share,
        low_yield=config.low_yield,
    )
    return build_pairs(building, task.inputs.get("ratings", ()), task)


STAGE = Stage(
    name="build_image_pairs",
    config=BuildImagePairsConfig,
    run=run,
    root="data",
    on="images",
    writes="image_pairs",
    reads={"ratings": Reads("image_ratings", "rate_images", optional=True)},
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
