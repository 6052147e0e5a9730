"""The whole review pipeline with its models, on Slurm and in one process tree: the same content."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.e2e.pipeline_runs import SMALL
from tests.slurm.conftest import Site
from tests.slurm.test_submit import digests

pytestmark = pytest.mark.slow


def test_the_review_pipeline_gives_what_a_local_run_gives(site: Site, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("advance: false\nexport: [OMP_NUM_THREADS, HF_HUB_OFFLINE]\nresources: {cpus: 4}\n")
    here, there = (["configs/pipelines/demo.yaml", f"workspace={tmp_path / name}", *SMALL] for name in ("near", "far"))
    far = Site(site.cluster, REPOSITORY, tmp_path / "far")
    done = far.prefmill("submit", *there, "--cluster", str(cluster))
    assert done.returncode == 0, done.stderr
    far.wait(seconds=800)
    near = far.prefmill("run", *here)
    assert near.returncode == 0, near.stdout
    assert digests(tmp_path / "far", "demo") == digests(tmp_path / "near", "demo"), far.logs()
    assert len(digests(tmp_path / "far", "demo")) == 13
