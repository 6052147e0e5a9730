"""The worker inside a job: warnings, requeue, several nodes, secrets at run time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import Site
from tests.slurm.test_submit import digests, jobs

pytestmark = pytest.mark.slow


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may not be there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def steps(site: Site, run: str, task: str = "all") -> list[int]:
    """Every optimizer step taken, in order."""
    return [row["step"] for row in rows(site.workspace / "logs" / run / "train" / task / "executed_steps.jsonl")]


def attempts(site: Site, run: str, task: str = "all") -> list[dict[str, Any]]:
    """Every attempt that has ended."""
    return rows(site.workspace / "logs" / run / "train" / task / "attempts.jsonl")


def test_two_nodes_of_two_processes_meet(site: Site) -> None:
    where = "stages.train.resources={nodes: 2, processes: 2}"
    site.submit("train", "run=wide", "train.meet=true", where)
    site.wait()
    log = (site.workspace / "logs" / "wide" / "train" / "all.log").read_text()
    assert digests(site.workspace, "wide"), site.logs()
    assert sorted(line[:11] for line in log.splitlines() if line.startswith("rank ")) == [
        f"rank {rank} of 4" for rank in range(4)
    ]
    assert len({line.split()[-1] for line in log.splitlines() if line.startswith("rank ")}) == 2
    metrics = json.loads((site.workspace / "checkpoints" / "wide" / "train" / "all" / "manifest.json").read_text())
    assert metrics["metrics"]["ranks"] == 4


def test_a_time_limit_saves_and_requeues_that_element_alone(site: Site) -> None:
    keys = ["train.steps=40", "train.step_seconds=1.0", "stages.train.array={shard: 3}"]
    site.submit("train", "run=limit", *keys)
    site.submit("train", "run=calm", "train.steps=40", "stages.train.array={shard: 3}")
    site.wait(lambda: all(len(steps(site, "limit", f"shard{shard}")) >= 3 for shard in range(3)))
    job_id = jobs(site, "limit")[0]["job_id"]
    site.cluster.ask("scontrol", "update", f"jobid={job_id}_1", "EndTime=now+90")  # within the warning
    site.wait(lambda: attempts(site, "limit", "shard1"))
    site.wait()
    assert [row["outcome"] for row in attempts(site, "limit", "shard1")] == ["requeued", "complete"]
    for shard in (0, 2):
        assert [row["outcome"] for row in attempts(site, "limit", f"shard{shard}")] == ["complete"]
    assert steps(site, "limit", "shard1") == list(range(1, 41))  # none repeated
    first, second = attempts(site, "limit", "shard1")
    assert first["signal"] == "SIGUSR1"
    assert "restart_count" not in first
    assert second["restart_count"] == "1"
    assert second["first_step"] == first["last_step"] + 1
    assert digests(site.workspace, "limit") == digests(site.workspace, "calm")
