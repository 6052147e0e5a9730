"""A sweep on a real Slurm: four workers share a study, one of them is killed, and no trial is lost or run twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prefmill.store.artifacts import read_manifest
from prefmill.store.jsonl import read_jsonl
from prefmill.sweep.study import read_claim
from tests.conftest import REPOSITORY
from tests.slurm.conftest import Site
from tests.slurm.test_job import rows
from tests.slurm.test_submit import digests, jobs

pytestmark = pytest.mark.slow

NUM_TRIALS, NUM_STEPS = 12, 4
PIPELINE = f"""
name: search
stages:
  sweep:
    array: {{worker: 4}}
    set:
      stage: guess
      set: {{steps: {NUM_STEPS}, step_seconds: 0.4}}
      space: {{rate: {{low: 0.1, high: 10.0, log: true}}}}
      metric: accuracy
      n_trials: {NUM_TRIALS}
      heartbeat_seconds: 0.5
      stale_seconds: 6.0
"""


def test_four_workers_one_of_them_killed(site: Site) -> None:
    shutil.copy(REPOSITORY / "stages" / "sweep.py", site.checkout / "stages")
    (site.checkout / "configs" / "pipelines" / "search.yaml").write_text(PIPELINE)
    site.submit("search", "run=search")
    study = site.workspace / "checkpoints" / "search" / "sweep" / "study-study"
    site.wait(lambda: any(runs(study, "worker1")))
    site.wait(lambda: any(len(rows(trial / "steps_taken.jsonl")) >= 2 for trial in runs(study, "worker1")))
    site.cluster.ask("scancel", "--signal=KILL", f"{jobs(site, 'search')[0]['job_id']}_1")
    site.wait()

    outputs = [site.workspace / "checkpoints" / "search" / "sweep" / f"worker{n}" for n in (0, 2, 3)]
    assert len(digests(site.workspace, "search")) == 3, site.logs()
    assert len(set(digests(site.workspace, "search").values())) == 1, "every worker tells the same of the study"
    assert read_manifest(outputs[0].parent / "worker1") is None
    trials = list(read_jsonl(outputs[0] / "trials.jsonl"))
    assert [trial["number"] for trial in trials] == list(range(NUM_TRIALS))
    assert {trial["state"] for trial in trials} == {"complete"}
    assert all(trial["value"] == pytest.approx(-abs(trial["params"]["rate"] - 3)) for trial in trials)

    folders = sorted((study / "trials").iterdir())
    tried = {folder.name: read_claim(folder) for folder in folders}
    attempts = {name: claim.attempts for name, claim in tried.items() if claim}
    assert len(attempts) == NUM_TRIALS
    assert len({names[0] for names in attempts.values()}) == 4, "all four have worked"
    taken_over = [name for name, names in attempts.items() if len(names) > 1]
    assert len(taken_over) == 1
    assert attempts[taken_over[0]][0] == "worker1" != attempts[taken_over[0]][1]
    for folder in folders:
        steps = [row["step"] for row in read_jsonl(folder / "steps_taken.jsonl")]
        assert steps == list(range(1, NUM_STEPS + 1)), f"{folder.name}: no step of a trial is taken twice"


def runs(study: Path, worker: str) -> list[Path]:
    """The trials that a worker has begun."""
    found = sorted((study / "trials").iterdir()) if (study / "trials").is_dir() else []
    return [trial for trial in found if (claim := read_claim(trial)) and claim.worker == worker]
