"""DPO for masked-diffusion language models, with the starting model as reference."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.families.mdlm.config import DiffusionPreferenceConfig
from prefmill.pairs.sources import SOURCE_KEYS, PairSource
from prefmill.pairs.writing import write_pairs
from prefmill.training.bad_rows import BAD_ROWS
from prefmill.training.config import start_model
from prefmill.training.data import rows_of_input
from prefmill.training.objective_names import VAL_METRICS


class MdlmDpoConfig(DiffusionPreferenceConfig, PairSource):
    """`modality` says which of build_datasets' datasets to train on; `preference_data_path` names any other one.

    `preference_data_path` is another name of `dataset`: a file, or a name on the hub.
    """

    modality: Modality = Field("clean", description="dataset to train on")

    @model_validator(mode="before")
    @classmethod
    def _data_path(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preference_data_path") is None:
            return values
        if values.get("dataset") is not None:
            raise ValueError("preference_data_path is another name of dataset: give one of them")
        return {key: value for key, value in values.items() if key != "preference_data_path"} | {
            "dataset": values["preference_data_path"]
        }


def run(config: MdlmDpoConfig, task: Task) -> Metrics:
    """Train, and write the model as a plain Hugging Face folder."""
    from prefmill.families.mdlm.dpo import train_diffusion_dpo

    policy = start_model(config, task, "policy")
    given = rows_of_input(task, f"dpo_{config.modality}", config.has_source, "preference_data_path=FILE")
    train, val = given or write_pairs(config, task.work / "pairs", task.logs / BAD_ROWS)
    return train_diffusion_dpo(config, task, policy, train, val)


STAGE = Stage(
    name="mdlm_dpo",
    version=2,  # balanced draws in independent blocks
    config=MdlmDpoConfig,
    run=run,
    root="checkpoints",
    trains=True,
    metrics=tuple(VAL_METRICS),
    writes="checkpoint",
    reads={
        "policy": Reads(
            "checkpoint", "mdlm_sft", match="elementwise", optional=True, instead_of=("model_name_or_path",)
        ),
        "datasets": Reads("preference_datasets", "build_datasets", optional=True, instead_of=SOURCE_KEYS),
    },
    preload=("torch", "transformers", "transformers.trainer", "safetensors.torch"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
