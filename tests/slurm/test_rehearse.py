"""A rehearsal on a real Slurm interrupts a training twice and sees it resumed."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import Site
from tests.slurm.test_job import attempts, steps

pytestmark = pytest.mark.slow


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


def test_what_can_never_start_is_refused_before_anything_is_submitted(site: Site) -> None:
    files = ["configs/pipelines/train.yaml", "--cluster", "configs/clusters/heal.yaml", f"workspace={site.workspace}"]
    done = site.prefmill("estimate", *files, "stages.train.resources={nodes: 9, minutes: 100000}")
    assert done.returncode == 2
    assert "nodes: 9 asked for, main has 4" in done.stderr
    assert "minutes: 100000 asked for, main has 2880" in done.stderr
    refused = site.prefmill("submit", *files, "stages.train.resources={nodes: 9}")
    assert refused.returncode == 2
    assert "nodes: 9 asked for, main has 4" in refused.stderr
    assert site.prefmill("estimate", *files).returncode == 0
    assert site.queue() == []
