"""A rehearsal on a real Slurm interrupts a training twice and sees it resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.e2e.pipeline_runs import SMALL
from tests.slurm.conftest import Site
from tests.slurm.test_job import attempts, rows, steps
from tests.slurm.test_submit import digests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_the_fire_drill_is_survived_and_reported(site: Site) -> None:
    keys = ["train.steps=120", "train.save_steps=10", "train.step_seconds=0.1", "run=real"]
    files = ["configs/pipelines/train.yaml", "--cluster", "configs/clusters/heal.yaml"]
    done = site.prefmill("rehearse", *files, f"workspace={site.workspace}", *keys)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   every task complete" in done.stdout
    assert "ok   warning before a time limit" in done.stdout
    assert "ok   kill -9 of a training process" in done.stdout
    run = "real-rehearsal"  # the real run is not touched
    assert not (site.workspace / "checkpoints" / "real").exists()
    outcomes = [row["outcome"] for row in attempts(site, run)]
    assert outcomes == ["requeued", "failed", "complete"], outcomes
    assert len(steps(site, run)) <= 120 + 10


def test_the_review_pipeline_rehearses_with_its_real_stages(site: Site, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("export: [OMP_NUM_THREADS, HF_HUB_OFFLINE]\nresources: {partition: main, cpus: 4}\n")
    far = Site(site.cluster, REPOSITORY, tmp_path / "work")
    files = ["configs/pipelines/demo.yaml", "--cluster", str(cluster), f"workspace={far.workspace}", *SMALL]
    done = far.prefmill("rehearse", *files, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", seconds=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert len(digests(far.workspace, "demo-rehearsal")) == 14
    drilled = {}
    for stage in ("sft", "dpo"):
        first, second = rows(far.workspace / "logs" / "demo-rehearsal" / stage / "clean" / "attempts.jsonl")
        drilled[stage] = first["outcome"]
        assert second["outcome"] == "complete"
        assert 1 < second["first_step"] <= first["last_step"] + 1  # resumed, not begun again
    assert drilled == {"sft": "requeued", "dpo": "failed"}  # a warning, a kill -9: each trainer had one


def test_a_rehearsal_that_cannot_end_well_says_so_at_once(site: Site) -> None:
    files = ["configs/pipelines/toy.yaml", "--cluster", "configs/clusters/heal.yaml", f"workspace={site.workspace}"]
    done = site.prefmill("rehearse", *files, "run=bad", "make.fail=true")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL every task complete" in done.stdout
    assert "the same error twice" in done.stdout


def test_what_can_never_start_is_refused_before_anything_is_submitted(site: Site) -> None:
    files = ["configs/pipelines/train.yaml", "--cluster", "configs/clusters/heal.yaml", f"workspace={site.workspace}"]
    done = site.prefmill("estimate", *files, "stages.train.resources={nodes: 9, time_limit_minutes: 100000}")
    assert done.returncode == 2
    assert "nodes: 9 asked for, main has 4" in done.stderr
    assert "time_limit_minutes: 100000 asked for, main has 2880" in done.stderr
    refused = site.prefmill("submit", *files, "stages.train.resources={nodes: 9}")
    assert refused.returncode == 2
    assert "nodes: 9 asked for, main has 4" in refused.stderr
    assert site.prefmill("estimate", *files).returncode == 0
    assert site.queue() == []
