"""Fine-tunes a masked-diffusion language model on chats, on their completions only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from prefmill.core.config import ExternalPath, later, validate
from prefmill.core.errors import PipelineError
from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.demo.text import Shape
from prefmill.families.mdlm.config import DiffusionSftConfig
from prefmill.pairs.chats import ChatSource, write_chats
from prefmill.training.bad_rows import BAD_ROWS, RowPolicy
from prefmill.training.config import start_model
from prefmill.training.data import rows_of_input


class MdlmSftConfig(DiffusionSftConfig, RowPolicy):
    """`sft_data_path` is a file of chats, instead of build_datasets' of this `modality`.

    `new_model` is the size of a model to train from scratch, with a tokenizer learnt from the training rows.
    """

    unread_with = {"sft_data_path": ("modality",)}
    modality: Modality = Field("clean", description="dataset to train on")
    sft_data_path: ExternalPath | None = Field(
        None, description="a file of chats, in any form that sft takes, instead of the input `datasets`"
    )
    on_bad_row: Literal["fail", "drop"] = later("fail", description=RowPolicy.model_fields["on_bad_row"].description)
    new_model: Shape | None = Field(
        None, description="size of a model to train from scratch, its tokenizer learned from the rows"
    )


def run(config: MdlmSftConfig, task: Task) -> Metrics:
    """Train, and write the model as a plain Hugging Face folder."""
    from prefmill.demo.toy_language import new_model
    from prefmill.families.mdlm.sft import train_diffusion_sft

    train, val = _chats(config, task)
    if config.new_model is None:
        start = start_model(config, task, "model")
    elif config.model_name_or_path is not None or task.optional_input("model") is not None:
        raise PipelineError(
            "a model to start from and a new one", where=task.key,
            fix="leave out new_model, or the other one",
        )  # fmt: skip
    else:
        start = str(new_model(train, task.work / "new_model", config.new_model, config.seed))
    return train_diffusion_sft(config, task, start, train, val)


def _chats(config: MdlmSftConfig, task: Task) -> tuple[Path, Path | None]:
    """The rows to train on and those to validate on."""
    path = config.sft_data_path
    if given := rows_of_input(task, f"sft_{config.modality}", path is not None, "sft_data_path=FILE"):
        return given
    source = validate(ChatSource, {"dataset_file": str(path), "on_bad_row": config.on_bad_row})
    return write_chats(source, task.work / "chats", task.logs / BAD_ROWS)


STAGE = Stage(
    name="mdlm_sft",
    version=3,  # answers filled to blocks of their own
    config=MdlmSftConfig,
    run=run,
    root="checkpoints",
    trains=True,
    metrics=("val_loss",),
    writes="checkpoint",
    reads={
        "model": Reads(
            "checkpoint", match="elementwise", optional=True, instead_of=("model_name_or_path", "new_model")
        ),
        "datasets": Reads("preference_datasets", "build_datasets", optional=True, instead_of=("sft_data_path",)),
    },
    preload=("torch", "transformers", "transformers.trainer"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
