"""`prefmill submit` on a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefmill.artifacts import read_manifest
from tests.slurm.conftest import Site

pytestmark = pytest.mark.slow


def digests(workspace: Path, run: str) -> dict[str, str]:
    """The content digest of every finished artifact of a run."""
    found = {}
    for path in sorted(workspace.glob(f"*/{run}/*/*/manifest.json")):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        found[f"{manifest.stage}:{manifest.task}"] = manifest.content_digest
    return found


def jobs(site: Site, run: str, number: int = 1) -> list[dict[str, object]]:
    """What a submission recorded of its jobs."""
    path = site.workspace / "logs" / run / "submissions" / f"{number:04d}" / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pipeline_gives_what_a_local_run_gives_and_its_arrays_wait_for_each_other(site: Site) -> None:
    printed = site.submit("toy", "run=far", "make.seconds=1")
    first, second, third = jobs(site, "far")
    assert second["dependency"] == f"aftercorr:{first['job_id']}"
    assert third["dependency"] == f"afterok:{second['job_id']}"
    assert [job["indices"] for job in (first, second, third)] == [[0, 1, 2], [0, 1, 2], [0]]
    assert "7 to submit" in printed
    site.wait()
    site.prefmill("run", "configs/pipelines/toy.yaml", f"workspace={site.workspace}", "run=near", "make.seconds=1")
    assert digests(site.workspace, "far") == digests(site.workspace, "near")
    assert len(digests(site.workspace, "far")) == 7
    assert "nothing to submit" in site.submit("toy", "run=far", "make.seconds=1")
