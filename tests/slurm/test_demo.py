"""The whole review pipeline with its models, on Slurm and in one process tree: the same content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.e2e.pipeline_runs import SMALL, run
from tests.slurm.conftest import Site
from tests.slurm.test_job import go_on, rows, warn
from tests.slurm.test_submit import digests, jobs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a run on this machine alone."""
    workspace = tmp_path_factory.mktemp("near")
    run(workspace, *SMALL)
    return workspace


def test_the_review_pipeline_gives_what_a_local_run_gives(site: Site, near: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("advance: false\nexport: [OMP_NUM_THREADS, HF_HUB_OFFLINE]\nresources: {cpus: 4}\n")
    far = Site(site.cluster, REPOSITORY, tmp_path / "far")
    there = ["configs/pipelines/demo.yaml", f"workspace={far.workspace}", *SMALL]
    done = far.prefmill("submit", *there, "--cluster", str(cluster))
    assert done.returncode == 0, done.stderr
    far.wait(seconds=800)
    assert digests(tmp_path / "far", "demo") == digests(near, "demo"), far.logs()
    assert len(digests(tmp_path / "far", "demo")) == 14


def test_a_warning_stops_a_real_training_on_two_nodes_and_it_goes_on(site: Site, near: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("advance: false\nexport: [OMP_NUM_THREADS, HF_HUB_OFFLINE]\n")
    far = Site(site.cluster, REPOSITORY, tmp_path / "work")
    keys = ["sft.per_device_train_batch_size=2", "sft.num_train_epochs=6", "sft.save_steps=1000", "sft.logging_steps=2"]
    wide = "stages.sft.resources={nodes: 2, processes: 2, cpus: 2}"
    files = ["configs/pipelines/demo.yaml", f"workspace={far.workspace}", *SMALL, *keys, wide]
    for root in ("data", "checkpoints"):  # what is upstream of the training
        downstream = shutil.ignore_patterns("sft", "dpo", "evaluate", "report")
        shutil.copytree(near / root, far.workspace / root, symlinks=True, ignore=downstream)
    done = far.prefmill("submit", *files, "--only", "sft", "--cluster", str(cluster))
    assert done.returncode == 0, done.stderr
    logs = far.workspace / "logs" / "demo" / "sft" / "clean"
    element = f"{jobs(far, 'demo')[0]['job_id']}_0"
    far.wait(lambda: len(rows(logs / "executed_steps.jsonl")) >= 3, seconds=300)
    warn(far, element)
    far.wait(lambda: rows(logs / "attempts.jsonl"), seconds=300)
    go_on(far, element)
    far.wait(seconds=300)
    first, second = rows(logs / "attempts.jsonl")
    assert (first["outcome"], second["outcome"]) == ("requeued", "complete"), far.logs()
    assert first["last_step"] % 2 == 0  # where a loss is logged, so that the curve stays the same
    assert second["first_step"] == first["last_step"] + 1
    taken = [row["step"] for row in rows(logs / "executed_steps.jsonl")]
    assert taken == list(range(1, second["last_step"] + 1))
    assert "sft:clean" in digests(far.workspace, "demo")
