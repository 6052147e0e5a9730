"""Compares the evaluations and writes one self-contained page with everything that led to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.errors import PipelineError
from prefmill.core.files import write_atomic, write_json
from prefmill.core.stage import Metrics, Reads, Stage, Task

if TYPE_CHECKING:
    from prefmill.core.statistics import Resampling
    from prefmill.report.report import Report


class ReportConfig(StrictConfig):
    """How models are compared and what the page shows."""

    title: str | None = Field(None, min_length=1, description="of the page; none: the run's name")
    num_resamples: int = Field(10_000, ge=1000, le=1_000_000, description="bootstrap samples of the papers")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval; differences are called at 1 - this")
    seed: int = Field(0, ge=0, description="of the bootstrap and of the examples drawn")
    num_examples: int = Field(6, ge=0, description="papers whose reviews are shown side by side")
    show_cost: bool = Field(True, description="what the run took and what failed; false: a page that is the same bytes")


def run(config: ReportConfig, task: Task) -> Metrics:
    """Write `report.html`, `comparison.json` and of reviews `report.md`; print the conclusion and the run's cost."""
    from prefmill.report.training_logs import cost_lines

    reports = {"evaluations": _report_reviews, "images": _report_images, "diffusion": _report_diffusion}
    given = [name for name in reports if task.inputs.get(name)]
    if len(given) != 1:
        raise PipelineError(
            "a report is on one kind of evaluation", where=task.key,
            got=" and ".join(given) or f"none of {', '.join(reports)}",
            fix="give one of inputs.evaluations=[FOLDER, ...], inputs.images=[...] and inputs.diffusion=[...]",
        )  # fmt: skip
    report = reports[given[0]](config, task)
    write_atomic(task.output / "report.html", report.html)
    write_json(task.output / "comparison.json", report.comparison, allow_nan=False)
    if report.markdown:
        write_atomic(task.output / "report.md", report.markdown)
    print("\n".join([*report.conclusions, "cost, as far as recorded:", *cost_lines(report.artifacts)]))
    return {**({"verdict": report.verdicts} if report.verdicts else {}), "conclusion": report.conclusions}


def _report_diffusion(config: ReportConfig, task: Task) -> Report:
    """On masked-diffusion models."""
    from prefmill.report.diffusion_sections import build_diffusion_report

    checkpoints = (*task.inputs.get("mdlm_sft", ()), *task.inputs.get("mdlm_dpo", ()))
    title, examples = config.title or task.run, config.num_examples
    return build_diffusion_report(
        task.inputs["diffusion"], checkpoints, title, _resampling(config), examples, config.show_cost
    )


def _report_images(config: ReportConfig, task: Task) -> Report:
    """On tuned image models."""
    from prefmill.report.image_sections import build_image_report

    given = {name: task.inputs.get(name, ()) for name in ("images", "rewards", "tuned", "sweeps")}
    return build_image_report(given, config.title or task.run, config.show_cost)


def _report_reviews(config: ReportConfig, task: Task) -> Report:
    """On models that write reviews."""
    from prefmill.report.report import ReportInputs, build_report

    inputs = ReportInputs(
        evaluations=task.inputs["evaluations"],
        corpus=task.optional_input("corpus"),
        datasets=task.optional_input("datasets"),
        validation=task.optional_input("validation"),
        checkpoints=(*task.inputs.get("sft", ()), *task.inputs.get("dpo", ())),
        quality=task.inputs.get("quality", ()),
    )
    return build_report(inputs, config.title or task.run, _resampling(config), config.num_examples, config.show_cost)


def _resampling(config: ReportConfig) -> Resampling:
    from prefmill.core.statistics import Resampling

    return Resampling(config.num_resamples, config.seed, config.confidence)


STAGE = Stage(
    name="report",
    config=ReportConfig,
    run=run,
    root="data",
    on="both",
    writes="report",
    result="report.html",
    names_run=True,
    reads={
        "evaluations": Reads("evaluation", "evaluate", match="all", optional=True),
        "corpus": Reads("review_corpus", "ingest_reviews", optional=True),
        "datasets": Reads("preference_datasets", "build_datasets", optional=True),
        "validation": Reads("validation", "validate_datasets", optional=True),
        "quality": Reads("judge_quality", "judge_quality", match="all", optional=True),
        "sft": Reads("checkpoint", "sft", match="all", optional=True),
        "dpo": Reads("checkpoint", "dpo", match="all", optional=True),
        "images": Reads("image_evaluation", "evaluate_images", match="all", optional=True),
        "rewards": Reads("reward_model", "train_reward", match="all", optional=True),
        "tuned": Reads("image_checkpoint", "sdxl_dpo", match="all", optional=True),
        "diffusion": Reads("diffusion_evaluation", "mdlm_evaluate", match="all", optional=True),
        "mdlm_sft": Reads("checkpoint", "mdlm_sft", match="all", optional=True),
        "mdlm_dpo": Reads("checkpoint", "mdlm_dpo", match="all", optional=True),
        "sweeps": Reads("sweep", "sweep", match="all", optional=True),
    },
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
