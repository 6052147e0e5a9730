"""A rehearsal leaves out what belongs to the real corpus and the real judge: labels and a temperature."""

from __future__ import annotations

from pathlib import Path

from prefmill.config import validate
from prefmill.pipeline.cluster import ClusterFile
from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.pipeline.rehearsal import rehearsal_of


def test_labels_and_a_temperature_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("review_id,item_id,label\nr,summary,yes\n")
    source = tmp_path / "configs" / "pipelines" / "mine.yaml"
    source.parent.mkdir(parents=True)
    source.write_text(
        f"name: mine\nworkspace: {tmp_path}\nstages:\n"
        "  ingest_reviews: {set: {sources: [{format: generated, num_papers: 20}]}}\n"
        f"  score_reviews: {{inputs: {{calibration: {tmp_path}/fitted}}}}\n"
        f"  judge_quality: {{set: {{labels: {tmp_path}/labels.csv, calibrate: true}}}}\n"
    )
    pipeline = read_pipeline(source)
    small, plan = rehearsal_of(pipeline, make_plan(pipeline, source), source, validate(ClusterFile, {}))
    assert small.stages["score_reviews"].inputs == {}
    assert small.stages["judge_quality"].set["labels"] is None
    assert small.stages["judge_quality"].set["calibrate"] is False
    assert [task.stage.name for task in plan.tasks] == ["ingest_reviews", "score_reviews", "judge_quality"]
