"""The toy training again, on what sft has made."""

from __future__ import annotations

from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Reads, Stage, Task
from stages.train import TrainConfig
from stages.train import run as train


class DpoConfig(TrainConfig):
    """As the toy training."""

    modality: Modality = "clean"


def run(config: DpoConfig, task: Task) -> Metrics:
    """Train."""
    print("policy", task.input("policy").manifest.content_digest)
    return train(config, task)


READS = {"policy": Reads("checkpoint", "sft", match="elementwise")}
STAGE = Stage("dpo", DpoConfig, run, "checkpoints", "checkpoint", READS, trains=True)
