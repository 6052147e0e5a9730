"""A pipeline made small on a user's own reviews."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from prefmill.core.stage import load_stage
from prefmill.pipeline.checked_plan import plan_to_run
from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.slurm.cluster import ClusterFile
from prefmill.slurm.rehearsal_plan import rehearsal_of
from tests.conftest import REPOSITORY
from tests.e2e.pipeline_runs import run

DATA = ("ingest_reviews", "score_reviews", "build_datasets", "validate_datasets")


@pytest.mark.slow
def test_real_reviews_fit_the_tiny_models(reviews_file: Path, tmp_path: Path) -> None:
    """All rows of validate_datasets were too long once, as a tiny tokenizer makes many tokens of real texts."""
    source = tmp_path / "pipelines" / "reviews.yaml"
    source.parent.mkdir()
    shipped = yaml.safe_load((REPOSITORY / "configs/pipelines/review.yaml").read_text())
    stages = {name: shipped["stages"][name] for name in DATA}
    stages["score_reviews"] = {"config": "demo"}
    source.write_text(yaml.safe_dump({"name": "own", "stages": stages}))
    for name in DATA:
        (tmp_path / name).symlink_to(REPOSITORY / "configs" / name)
    given = f'ingest_reviews.sources=[{{format: jsonl, path: "{reviews_file}"}}]'
    pipeline = read_pipeline(source, [f"workspace={tmp_path / 'work'}", given])
    small, _ = rehearsal_of(pipeline, make_plan(pipeline, source), source, ClusterFile())
    (path := tmp_path / "small.yaml").write_text(yaml.safe_dump(small.model_dump(mode="json")))
    run(tmp_path / "work", pipeline=path)
    report = tmp_path / "work/data/own-rehearsal/validate_datasets/all/report.json"
    tokens = json.loads(report.read_text())["checks"]["tokens"]
    assert (tokens["result"], tokens["warnings"]) == ("passed", 0)


def test_a_slice_is_the_users_rows_with_their_texts_cut(tmp_path: Path) -> None:
    rows = [json.dumps({"id": str(n), "sub": {"text": ["long " * 1000]}, "rating": n}) for n in range(500)]
    broken = [b'{"rating": 1, "rating": 2}', b"\xff" * 2000, b"[" * 100_000]
    lines = [rows[0].encode(), *broken, *(row.encode() for row in rows[1:])]
    (reviews := tmp_path / "reviews.jsonl").write_bytes(gzip.compress(b"\n".join(lines)))  # by content, not by name
    demo = REPOSITORY / "configs/pipelines/demo.yaml"
    given = f'ingest_reviews.sources=[{{format: jsonl, path: "{reviews}"}}]'
    pipeline = read_pipeline(demo, [f"workspace={tmp_path}", given])
    rehearsal_of(pipeline, make_plan(pipeline, demo), demo, ClusterFile())
    (made,) = tmp_path.rglob("slice0.jsonl")
    found = made.read_bytes().splitlines()
    assert len(found) == 400
    assert found[1:4] == broken  # the real run says what is wrong with them
    for number, line in enumerate(itertools.chain(found[:1], found[4:])):
        assert json.loads(line) == {"id": str(number), "sub": {"text": [("long " * 1000)[:400]]}, "rating": number}


def test_a_slice_is_of_a_folder_and_of_parquet_too(tmp_path: Path) -> None:
    (folder := tmp_path / "reviews").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([{"id": "a"}, {"id": "b" * 500}]), folder / "1.parquet")
    (folder / "2.jsonl").write_text('{"id": "c"}')
    demo = REPOSITORY / "configs/pipelines/demo.yaml"
    given = f'ingest_reviews.sources=[{{format: jsonl, path: "{folder}"}}]'
    pipeline = read_pipeline(demo, [f"workspace={tmp_path}", given])
    rehearsal_of(pipeline, make_plan(pipeline, demo), demo, ClusterFile())
    (made,) = tmp_path.rglob("slice0.jsonl")
    assert [json.loads(line)["id"] for line in made.read_text().splitlines()] == ["a", "b" * 400, "c"]


@pytest.mark.parametrize("name", ["review", "mdlm_llada", "sdxl"])
def test_a_rehearsal_keeps_the_trackers_of_this_machine(name: str, tmp_path: Path) -> None:
    """All were left out, and sdxl_dpo's default one, which crashed, was met first in the real run."""
    source = REPOSITORY / f"configs/pipelines/{name}.yaml"
    training = [stage for stage in read_pipeline(source).stages if load_stage(stage).trains]
    given = [f"{stage}.report_to=[tensorboard,wandb,trackio]" for stage in training[1:]]  # the first has the default
    pipeline = read_pipeline(source, [f"workspace={tmp_path}", *given])
    _, rehearsed = rehearsal_of(pipeline, make_plan(pipeline, source), source, ClusterFile())
    found = {task.stage.name: task.config.report_to for task in rehearsed.tasks if task.stage.name in training}
    assert found == {training[0]: ["tensorboard"]} | {stage: ["tensorboard", "trackio"] for stage in training[1:]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in sorted((REPOSITORY / "configs/pipelines").glob("*.yaml"))])
def test_every_shipped_pipeline_has_a_rehearsal(name: str, tmp_path: Path) -> None:
    source = REPOSITORY / "configs/pipelines" / f"{name}.yaml"
    model = ["sft.model_name_or_path=Qwen/Qwen2.5-0.5B-Instruct"] if name == "demo_model" else []
    mine = (
        ["ingest_reviews.sources=[{format: generated, num_papers: 9}]"]
        if name in ("demo_model", "demo_reviews")
        else []
    )
    pipeline = read_pipeline(source, [f"workspace={tmp_path}", *model, *mine])
    plan = plan_to_run(pipeline, source)
    small, rehearsed = rehearsal_of(pipeline, plan, source, ClusterFile())
    assert plan_to_run(small, source).tasks == rehearsed.tasks
    assert [task.key for task in rehearsed.tasks] == [task.key for task in plan.tasks]
    for task in rehearsed.tasks:  # nobody answers at a rehearsal's web page
        assert getattr(getattr(task.config, "rater", None), "by", "") != "people"
