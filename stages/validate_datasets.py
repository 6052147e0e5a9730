"""Checks the datasets before any GPU is used: form, contrast, leaks, duplicates, length bias, images, token lengths."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.errors import PrefmillError
from prefmill.core.files import write_atomic, write_json
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.datasets.validate import Limits, Part, Validation, validate_datasets
from prefmill.report.validation_report import describe, error_table, to_markdown


class ValidateDatasetsConfig(StrictConfig):
    """What to check, and where a check begins to complain."""

    unread_with = {
        "model_name_or_path=none": ("max_length", "max_too_long_fraction"),
        "stage=sft": ("max_length_accuracy",),
    }
    stage: Part = Field("all", description="all, sft or dpo: which datasets to check")
    model_name_or_path: str | None = Field(None, description="count tokens with this model's tokenizer; none: do not")
    max_length: int | None = Field(None, ge=1, description="tokens per row may have; none: the model's context")
    max_too_long_fraction: float = Field(0.05, ge=0, le=1, description="share of too long rows that is an error")
    max_length_accuracy: float = Field(0.65, ge=0.5, le=1, description="warn when length predicts the label better")
    min_shared_characters: int = Field(400, ge=0, description="a shorter review in two splits is only a warning")
    max_listed: int = Field(20, ge=1, description="findings listed of each check; all are counted")


def run(config: ValidateDatasetsConfig, task: Task) -> Metrics:
    """Write report.json and report.md; raises PrefmillError with a table of the errors if there are any."""
    found = validate_datasets(
        task.input("datasets"),
        task.optional_input("corpus"),
        task.inputs.get("scores", ()),
        config.stage,
        config.model_name_or_path,
        Limits(
            length_accuracy=config.max_length_accuracy,
            min_shared_characters=config.min_shared_characters,
            max_length=config.max_length,
            max_too_long_fraction=config.max_too_long_fraction,
            max_listed=config.max_listed,
        ),
        task.progress,
    )
    report = describe(found)
    for folder in (task.logs, task.output):
        write_json(folder / "report.json", report)
        write_atomic(folder / "report.md", to_markdown(report))
    _require_no_errors(found, task)
    return {"errors": report["errors"], "warnings": report["warnings"], "length_bias": report["length_bias"]}


def _require_no_errors(found: Validation, task: Task) -> None:
    count = found.findings.total("error")
    if count:
        raise PrefmillError(
            f"validation found {count:,} errors in the datasets", where=task.input("datasets").path,
            got="\n" + error_table(found.findings),
            fix=f"fix the source or the configuration and rerun build_datasets; all of it: {task.logs / 'report.md'}",
        )  # fmt: skip


STAGE = Stage(
    name="validate_datasets",
    config=ValidateDatasetsConfig,
    run=run,
    root="data",
    writes="validation",
    reads={
        "datasets": Reads("preference_datasets", "build_datasets"),
        "corpus": Reads("review_corpus", "ingest_reviews", optional=True),
        "scores": Reads("review_scores", "score_reviews", match="all", optional=True),
    },
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
