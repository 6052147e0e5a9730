"""Fine-tunes a model on the best reviews, on their completions only."""

from __future__ import annotations

from pydantic import Field

from prefmill.causal.image_limits import ImageLimits
from prefmill.records import Modality
from prefmill.stage import Metrics, Reads, Stage, Task
from prefmill.training import TrainingConfig, start_model


class SftConfig(TrainingConfig, ImageLimits):
    """`modality` says which of the datasets to train on."""

    modality: Modality = "clean"
    learning_rate: float = Field(1e-5, gt=0)
    num_train_epochs: int = Field(3, ge=1)


def run(config: SftConfig, task: Task) -> Metrics:
    """Train, and write the model as a plain Hugging Face folder."""
    from prefmill.causal.sft import train_sft

    datasets = task.input("datasets")
    train = datasets.file(f"sft_{config.modality}_train/data.jsonl")
    val = datasets.path / f"sft_{config.modality}_val" / "data.jsonl"
    model = start_model(config, task, "model")
    return train_sft(config, task, model, train, val if val.is_file() and val.stat().st_size else None, config)


STAGE = Stage(
    name="sft",
    config=SftConfig,
    run=run,
    root="checkpoints",
    trains=True,
    writes="checkpoint",
    reads={
        "model": Reads("checkpoint", match="elementwise", optional=True),
        "datasets": Reads("preference_datasets", "build_datasets"),
        "validation": Reads("validation", "validate_datasets", optional=True),
    },
    preload=("torch", "transformers", "trl", "trl.trainer.sft_trainer", "datasets"),
)

if __name__ == "__main__":
    from prefmill.pipeline.worker import main

    main(STAGE)
