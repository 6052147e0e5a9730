"""A rehearsal leaves out what belongs to the real corpus and judge, and has models of the same architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prefmill.core.config import validate
from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.slurm.cluster import ClusterFile
from prefmill.slurm.rehearsal_plan import rehearsal_of
from tests.conftest import REPOSITORY
from tests.e2e.pipeline_runs import run


def test_labels_and_a_temperature_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("review_id,item_id,label\nr,summary,yes\n")
    source = tmp_path / "configs" / "pipelines" / "mine.yaml"
    source.parent.mkdir(parents=True)
    source.write_text(
        f"name: mine\nworkspace: {tmp_path}\nstages:\n"
        "  ingest_reviews: {set: {sources: [{format: generated, num_papers: 20}]}}\n"
        f"  score_reviews: {{inputs: {{calibration: {tmp_path}/fitted}}}}\n"
        f"  judge_quality: {{set: {{labels: {tmp_path}/labels.csv, calibrate: true}}}}\n"
        "  evaluate: {set: {model: human}, needs: {calibration: judge_quality}}\n"
    )
    pipeline = read_pipeline(source)
    small, plan = rehearsal_of(pipeline, make_plan(pipeline, source), source, validate(ClusterFile, {}))
    assert small.stages["score_reviews"].inputs == {}
    assert small.stages["judge_quality"].set["labels"] is None
    assert small.stages["judge_quality"].set["calibrate"] is False
    assert small.stages["evaluate"].needs == {}
    assert {task.stage.name for task in plan.tasks} == set(small.stages)


@pytest.mark.slow
def test_a_checklist_is_optimised_without_a_judge_that_judges(tmp_path: Path) -> None:
    source = REPOSITORY / "configs" / "pipelines" / "checklist.yaml"
    real = read_pipeline(source).model_copy(update={"workspace": str(tmp_path)})
    small, _ = rehearsal_of(real, make_plan(real, source), source, validate(ClusterFile, {}))
    first = ("ingest_reviews", "optimize_checklist")
    made = small.model_copy(update={"stages": {name: small.stages[name] for name in first}})
    (path := tmp_path / "small.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    run(tmp_path, pipeline=path)
    found = tmp_path / "data" / small.run / "optimize_checklist" / "all" / "optimal_checklist.json"
    assert json.loads(found.read_text())["items"]


@pytest.mark.parametrize(
    ("pipeline", "stage", "architecture"),
    [
        ("review", "sft", "Qwen2ForCausalLM"),
        ("review_images", "sft", "Qwen2_5_VLForConditionalGeneration"),
        ("review_images", "evaluate", "Qwen2_5_VLForConditionalGeneration"),
    ],
)
def test_tiny_models_are_of_the_real_ones_architecture(
    pipeline: str, stage: str, architecture: str, tmp_path: Path
) -> None:
    source = REPOSITORY / "configs" / "pipelines" / f"{pipeline}.yaml"
    real = read_pipeline(source).model_copy(update={"workspace": str(tmp_path)})
    small, _ = rehearsal_of(real, make_plan(real, source), source, validate(ClusterFile, {}))
    model = Path(small.stages[stage].set["model_name_or_path"])
    assert json.loads((model / "config.json").read_text())["architectures"] == [architecture]
