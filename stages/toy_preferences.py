"""Writes a small preference dataset whose right answer is known: kind answers are preferred to harsh ones."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.stage import Metrics, Stage, Task


class ToyConfig(StrictConfig):
    """How much of the toy language to write."""

    num_sft: int = Field(1600, ge=2, description="rows to fine-tune on, every other one kind")
    num_pairs: int = Field(800, ge=1, description="preference pairs, the kind answer chosen")
    num_prompts_held_out: int = Field(20, ge=1, le=99, description="of 100 prompts: for validation and evaluation")
    seed: int = Field(0, description="of what is drawn")


def run(config: ToyConfig, task: Task) -> Metrics:
    """Write the datasets; the metrics are their rows."""
    from prefmill.demo.toy_language import write_toy

    return dict(write_toy(task.output, config.num_sft, config.num_pairs, config.num_prompts_held_out, config.seed))


STAGE = Stage(name="toy_preferences", config=ToyConfig, run=run, root="data", writes="preference_datasets")

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
