"""Tunes a model on preference pairs, against itself as it was before the first step."""

from __future__ import annotations

from prefmill.errors import PipelineError
from prefmill.preference.config import PreferenceConfig
from prefmill.records import Modality
from prefmill.stage import Metrics, Reads, Stage, Task
from prefmill.training import start_model


class DpoConfig(PreferenceConfig):
    """`modality` says which of the datasets to train on."""

    modality: Modality = "clean"


def run(config: DpoConfig, task: Task) -> Metrics:
    """Train, and write the model as a plain Hugging Face folder."""
    from prefmill.causal.dpo import train_dpo

    if config.modality != "clean":
        raise PipelineError(
            f"dpo cannot train on '{config.modality}' yet", got=config.modality, expected="clean",
            fix="leave the image modalities out of the stage's array; their datasets build and validate already",
        )  # fmt: skip
    datasets = task.input("datasets")
    train = datasets.file(f"dpo_{config.modality}_train/data.jsonl")
    val = datasets.path / f"dpo_{config.modality}_val" / "data.jsonl"
    policy = start_model(config, task, "policy")
    return train_dpo(config, task, policy, train, val if val.is_file() and val.stat().st_size else None)


STAGE = Stage(
    name="dpo",
    config=DpoConfig,
    run=run,
    root="checkpoints",
    trains=True,
    writes="checkpoint",
    reads={
        "policy": Reads("checkpoint", "sft", match="elementwise", optional=True),
        "datasets": Reads("preference_datasets", "build_datasets"),
        "validation": Reads("validation", "validate_datasets", optional=True),
    },
    preload=("torch", "transformers", "transformers.trainer", "safetensors.torch"),
)

if __name__ == "__main__":
    from prefmill.pipeline.worker import main

    main(STAGE)
