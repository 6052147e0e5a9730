"""The configuration of preference training, under the names TRL's DPOConfig gives its keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefmill.training import TrainingConfig


class PreferenceConfig(TrainingConfig):
    """`effective_batch_size` counts pairs. `shuffle_labels` swaps chosen and rejected by a seeded coin: a control."""

    learning_rate: float = Field(5e-6, gt=0)
    num_train_epochs: int = Field(2, ge=1)
    beta: float = Field(0.1, gt=0)
    loss_type: list[str] = ["sigmoid"]
    loss_weights: list[float] = [1.0]
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    simpo_gamma: float = 0.5
    layout: Literal["pairwise"] = "pairwise"
    shuffle_labels: bool = False
