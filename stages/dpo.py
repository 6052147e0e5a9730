"""DPO: trains on preference pairs, with the starting model as reference."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.families.causal.chat_rows import ChatRows
from prefmill.pairs.sources import SOURCE_KEYS, PairSource
from prefmill.pairs.writing import write_pairs
from prefmill.training.bad_rows import BAD_ROWS
from prefmill.training.config import start_model
from prefmill.training.data import rows_of_input
from prefmill.training.objective_names import VAL_METRICS
from prefmill.training.preference_config import PreferenceConfig


class DpoConfig(PreferenceConfig, PairSource, ChatRows):
    """`modality` says which of build_datasets' datasets to train on; `dataset` names any other one."""

    modality: Modality = Field(
        "clean", description="dataset to train on: clean (text), clean_images (figures) or vision (page images)"
    )


def run(config: DpoConfig, task: Task) -> Metrics:
    """Train, and write the model as a plain Hugging Face folder."""
    from prefmill.families.causal.dpo import train_dpo

    policy = start_model(config, task, "policy")
    given = rows_of_input(task, f"dpo_{config.modality}", config.has_source, "dataset=NAME_OR_FILE")
    train, val = given or write_pairs(config, task.work / "pairs", task.logs / BAD_ROWS)
    return train_dpo(config, task, policy, train, val, config)


STAGE = Stage(
    name="dpo",
    config=DpoConfig,
    run=run,
    root="checkpoints",
    trains=True,
    metrics=tuple(VAL_METRICS),
    writes="checkpoint",
    reads={
        "policy": Reads("checkpoint", "sft", match="elementwise", optional=True, instead_of=("model_name_or_path",)),
        "datasets": Reads("preference_datasets", "build_datasets", optional=True, instead_of=SOURCE_KEYS),
        "validation": Reads("validation", "validate_datasets", optional=True),
    },
    preload=("torch", "transformers", "transformers.trainer", "safetensors.torch"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
