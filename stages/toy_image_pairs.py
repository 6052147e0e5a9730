"""Draws sample pictures with ratings and pairs whose better side is known, one fault a pair, on five dimensions."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.stage import Metrics, Stage, Task


class ToyImagePairsConfig(StrictConfig):
    """How much to draw."""

    num_prompts: int = Field(60, ge=4, le=200, description="prompts, each of two things side by side")
    pairs_per_prompt: int = Field(5, ge=1, description="pairs of a good picture and one with a fault")
    held_out_share: float = Field(0.3, gt=0, lt=1, description="of the prompts: half for validation, half for testing")
    seed: int = Field(0, description="of what is drawn")


def run(config: ToyImagePairsConfig, task: Task) -> Metrics:
    """Write the pictures, `ratings.csv` and `pairs.jsonl`; the metrics are their counts."""
    from prefmill.demo.sample_pictures import write_samples

    return dict(
        write_samples(task.output, config.num_prompts, config.pairs_per_prompt, config.held_out_share, config.seed)
    )


STAGE = Stage(
    name="toy_image_pairs", config=ToyImagePairsConfig, run=run, root="data", on="images", writes="image_pairs"
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
