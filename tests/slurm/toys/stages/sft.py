"""The toy training, once for every modality."""

from __future__ import annotations

from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Stage, Task
from stages.train import TrainConfig
from stages.train import run as train


class SftConfig(TrainConfig):
    """As the toy training."""

    modality: Modality = "clean"


def run(config: SftConfig, task: Task) -> Metrics:
    """Train."""
    return train(config, task)


STAGE = Stage("sft", SftConfig, run, "checkpoints", "checkpoint", trains=True)
