"""Evaluates masked-diffusion models before and after tuning: likelihoods, preferences, answers, benchmarks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from prefmill.core.config import ExternalPath, validate
from prefmill.core.errors import ConfigError
from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig
from prefmill.training.bad_rows import BAD_ROWS


class MdlmEvaluateConfig(DiffusionEvaluationConfig):
    """`pairs_path` is a file of preference rows, in place of build_datasets' held-out pairs of this `modality`."""

    unread_with = {"pairs_path": ("modality",)}
    modality: Modality = Field("clean", description="dataset to evaluate on")
    pairs_path: ExternalPath | None = Field(
        None, description="a file of preference pairs in any form; none: those of the input `datasets`"
    )


def run(config: MdlmEvaluateConfig, task: Task) -> Metrics:
    """Write `metrics.json`, `rows.jsonl` and `report.md`; the metrics are every figure of every model."""
    from prefmill.families.mdlm.evaluation import evaluate_models

    checkpoints = {name: task.optional_input(name) for name in ("before", "after")}
    models = {name: str(artifact.path) for name, artifact in checkpoints.items() if artifact is not None}
    if config.model_name_or_path is not None:
        models = {"model": config.model_name_or_path, **models}
    pairs = _pairs(config, task)
    if not models or (pairs is None and not config.benchmarks and config.harness is None):
        raise ConfigError(
            "no model to evaluate" if not models else "nothing to evaluate on", where=task.key,
            fix="give inputs.before, inputs.after or model_name_or_path; and inputs.datasets, pairs_path or harness",
        )  # fmt: skip
    return evaluate_models(config, task, models, pairs, _harness(config))


def _harness(config: MdlmEvaluateConfig) -> Any:
    """What adds the rows of the harness's tasks; None without tasks."""
    if config.harness is None:
        return None
    try:
        from prefmill.integrations.lm_harness import task_rows
    except ModuleNotFoundError as error:
        raise ConfigError(
            "lm-evaluation-harness is not installed", where="harness", got=f"no module {error.name}",
            fix="pip install 'prefmill[harness]'",
        ) from None  # fmt: skip
    return partial(task_rows, config)


def _pairs(config: MdlmEvaluateConfig, task: Task) -> Path | None:
    """The held-out pairs of `datasets`, or a file's, in any form that mdlm_dpo reads; None without either."""
    datasets = task.optional_input("datasets")
    if config.pairs_path is None:
        return None if datasets is None else datasets.file(f"dpo_{config.modality}_val/data.jsonl")
    if datasets is not None:
        raise ConfigError(
            "two sets of pairs to evaluate on", where=task.key,
            got=f"inputs.datasets = {datasets.path} and {config.pairs_path}", fix="leave one of them out",
        )  # fmt: skip
    from prefmill.pairs.sources import PairSource
    from prefmill.pairs.writing import write_pairs

    source = validate(PairSource, {"dataset_file": str(config.pairs_path)})
    return write_pairs(source, task.work / "pairs", task.logs / BAD_ROWS)[0]


STAGE = Stage(
    name="mdlm_evaluate",
    version=3,  # answers stop at the turn's end
    config=MdlmEvaluateConfig,
    run=run,
    root="data",
    writes="diffusion_evaluation",
    result="report.md",
    reads={
        "before": Reads("checkpoint", "mdlm_sft", match="elementwise", optional=True),
        "after": Reads("checkpoint", "mdlm_dpo", match="elementwise", optional=True),
        "datasets": Reads("preference_datasets", "build_datasets", optional=True),
    },
    preload=("torch", "transformers"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
