"""Fine-tunes a model on the best reviews, or on other chats, on their completions only."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.families.causal.chat_rows import TrainedTurns
from prefmill.pairs.chats import ChatSource, write_chats
from prefmill.pairs.sources import SOURCE_KEYS
from prefmill.training.bad_rows import BAD_ROWS
from prefmill.training.config import TrainingConfig, start_model
from prefmill.training.data import rows_of_input


class SftConfig(TrainingConfig, ChatSource, TrainedTurns):
    """`modality` says which of build_datasets' datasets to train on; `dataset` names any other one."""

    can_quantize: ClassVar[bool] = True

    modality: Modality = Field(
        "clean", description="dataset to train on: clean (text), clean_images (figures) or vision (page images)"
    )
    learning_rate: float = Field(1e-5, gt=0)
    num_train_epochs: int = Field(3, ge=1)


def run(config: SftConfig, task: Task) -> Metrics:
    """Train, and write the model as a plain Hugging Face folder."""
    from prefmill.families.causal.sft import train_sft

    model = start_model(config, task, "model")
    given = rows_of_input(task, f"sft_{config.modality}", config.has_source, "dataset=NAME_OR_FILE")
    train, val = given or write_chats(config, task.work / "chats", task.logs / BAD_ROWS)
    return train_sft(config, task, model, train, val, config)


STAGE = Stage(
    name="sft",
    config=SftConfig,
    run=run,
    root="checkpoints",
    trains=True,
    metrics=("val_loss",),
    writes="checkpoint",
    reads={
        "model": Reads("checkpoint", match="elementwise", optional=True, instead_of=("model_name_or_path",)),
        "datasets": Reads("preference_datasets", "build_datasets", optional=True, instead_of=SOURCE_KEYS),
        "validation": Reads("validation", "validate_datasets", optional=True),
    },
    preload=("torch", "transformers", "trl", "trl.trainer.sft_trainer", "datasets"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
