"""Trains a reward model on rated image pairs: CLIP with a head for each dimension that people judged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from prefmill.core.config import renamed
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.training.config import OF_TEXT_MODELS, TrainingConfig, start_model


class TrainRewardConfig(TrainingConfig):
    """`effective_batch_size` counts pairs.

    `prompt_half` leaves a model half of the training prompts: what `judge` learns from, `policy` has never seen.
    """

    own_head: ClassVar[bool] = True
    can_shard: ClassVar[bool] = False

    learning_rate: float = Field(1e-5, gt=0)
    num_train_epochs: int = Field(3, ge=1)
    per_device_train_batch_size: int = Field(16, ge=1)
    effective_batch_size: int = Field(64, ge=1)
    prompt_half: Literal["all", "policy", "judge"] = renamed(
        "half", "all", description="`policy` or `judge`: halves of the training prompts that share none"
    )
    hidden_size: int = Field(64, ge=1, description="width of each head's hidden layer")
    trainable: Literal["all", "vision", "heads"] = Field(
        "all", description="`vision`: the text tower is frozen; `heads`: all of CLIP is"
    )
    crop_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="below 1, every epoch shows a random part of a prompt's images, at least this share of each side",
    )
    overall_for_missing: bool = Field(False, description="a head without an answer learns the overall choice")
    shuffle_labels: bool = Field(False, description="control: labels at random")
    num_resamples: int = Field(2000, ge=1000, le=1_000_000, description="bootstrap samples of the intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the intervals")

    @model_validator(mode="after")
    def _whole_weights(self) -> TrainRewardConfig:
        if foreign := self.changed(*OF_TEXT_MODELS):
            raise ValueError(f"{', '.join(foreign)}: a key of text models, leave it out")
        if self.lora is not None:
            raise ValueError("a reward model is trained without an adapter: leave out lora, or set trainable=heads")
        return self


def run(config: TrainRewardConfig, task: Task) -> Metrics:
    """Train, measure on the held-out prompts, and write a plain Hugging Face folder."""
    from prefmill.families.reward.train import RewardTraining, train_reward

    wanted = RewardTraining(
        half=config.prompt_half,
        hidden_size=config.hidden_size,
        trainable=config.trainable,
        crop_scale=config.crop_scale,
        overall_for_missing=config.overall_for_missing,
        shuffle_labels=config.shuffle_labels,
        num_resamples=config.num_resamples,
        confidence=config.confidence,
    )
    return train_reward(config, wanted, task, start_model(config, task, "clip"), task.input("pairs").path)


STAGE = Stage(
    name="train_reward",
    config=TrainRewardConfig,
    run=run,
    root="checkpoints",
    on="images",
    trains=True,
    metrics=tuple(f"{split}_{name}" for split in ("val", "test") for name in ("f1", "accuracy", "tie_aware_accuracy")),
    writes="reward_model",
    reads={
        "pairs": Reads("image_pairs", "build_image_pairs"),
        "clip": Reads("checkpoint", optional=True, instead_of=("model_name_or_path",)),
    },
    preload=("torch", "transformers", "transformers.trainer", "safetensors.torch"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
