"""`prefmill advance` on a real Slurm: only what failed runs again, and what waits for it is re-pointed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import Site
from tests.slurm.test_job import rows
from tests.slurm.test_submit import digests, jobs

pytestmark = pytest.mark.slow


def attempts(site: Site, run: str, task: str) -> list[dict[str, Any]]:
    return rows(site.workspace / "logs" / run / task.replace(":", "/") / "attempts.jsonl")


def where(site: Site) -> list[str]:
    return ["--workspace", str(site.workspace)]


def test_two_at_once_resubmit_the_failed_element_once_and_its_siblings_not_at_all(site: Site) -> None:
    site.submit("toy", "run=twice", "make.fail_first=1")  # with no job that looks after it
    site.submit("toy", "run=calm")
    site.wait(lambda: len(site.queue()) == 2 and "DependencyNeverSatisfied" in "".join(site.queue()))  # use_1, join
    command = [sys.executable, "-m", "prefmill.cli.main", "advance", "twice", *where(site)]
    environment = {"PYTHONPATH": f"{site.checkout}/lib:{site.checkout}", "PATH": "/usr/bin:/bin"}
    both = [
        subprocess.Popen(
            command, env=environment | site.cluster.environment, cwd=site.checkout, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    printed = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert printed.count("make:shard1 retry: bug (retry 1 of 2): ValueError: told to fail once") == 1, printed
    site.wait()
    assert digests(site.workspace, "twice") == digests(site.workspace, "calm"), site.logs()
    tries = [job["indices"] for job in jobs(site, "twice") if job["stage"] == "make"]
    assert tries == [[0, 1, 2], [1]]
    assert [job["stage"] for job in jobs(site, "twice")] == ["make", "use", "join", "make"]  # children are kept
    assert len(attempts(site, "twice", "make:shard1")) == 2
    assert {len(attempts(site, "twice", f"make:shard{shard}")) for shard in (0, 2)} == {1}
    again = site.prefmill("advance", "twice", *where(site))
    assert again.stdout == "run twice: 0 tasks open, 0 queued or running, 0 resubmitted\n"


def test_a_parent_that_fails_for_good_stops_what_reads_from_it_and_says_what_to_do(site: Site) -> None:
    with (site.checkout / "configs/clusters/heal.yaml").open("a") as stream:
        stream.write("webhook: TOY_HOOK\n")
    site.submit("toy", "run=bad", "make.fail=true", cluster="heal")
    site.wait(lambda: "stop" in _decisions(site.workspace, "bad") and not _running(site))
    told = [path.read_text() for path in site.workspace.glob("logs/bad/advance/*.out")]
    assert sum("no webhook called: TOY_HOOK" in text for text in told) == 1, told  # at the end, and only then
    shown = site.prefmill("status", "bad", *where(site))
    assert shown.returncode == 1
    assert "stopped" in shown.stdout
    assert "the same error twice" in shown.stdout
    assert "make:shard0 has stopped" in shown.stdout
    assert "to do: fix what the traceback shows" in shown.stdout
    files = ["configs/pipelines/toy.yaml", "join", f"workspace={site.workspace}", "run=bad", "make.fail=true"]
    why = site.prefmill("why", *files).stdout
    assert "make:shard0: missing" in why
    assert "stopped (bug, by status file): ValueError: told to fail" in why
    assert "to do: fix what the traceback shows" in why
    assert not list(site.workspace.glob("logs/bad/use/*/status.json"))  # nothing downstream has run
    assert not list(site.workspace.glob("logs/bad/join/*/status.json"))
    mended = site.submit("toy", "run=bad", cluster="heal")
    assert "7 to submit" in mended
    site.wait()
    assert len(digests(site.workspace, "bad")) == 7, site.logs()


def test_rerun_makes_finished_work_again_and_cancel_ends_it_for_good(site: Site) -> None:
    site.submit("toy", "run=again", cluster="heal")
    site.wait()
    before = digests(site.workspace, "again")
    done = site.prefmill("rerun", "use:shard1", "--run", "again", *where(site))
    assert done.returncode == 0, done.stderr
    assert "join:all retry" in done.stdout  # it waits for the new one
    assert digests(site.workspace, "again") == before  # the old ones stay until the new ones are there
    site.wait()
    assert digests(site.workspace, "again") == before
    assert [len(attempts(site, "again", f"use:shard{shard}")) for shard in range(3)] == [1, 2, 1]

    # Slurm takes either partition; a person's settings for its commands are not for ours.
    either = "stages.make.resources={partition: 'low,main'}"
    site.submit("toy", "run=ended", "make.seconds=30", either, cluster="heal")
    site.wait(lambda: _running(site))
    personal = {"SCANCEL_INTERACTIVE": "true", "SQUEUE_PARTITION": "low", "SBATCH_PARTITION": "nowhere"}
    assert "7 tasks cancelled" in site.prefmill("cancel", "--run", "ended", *where(site), **personal).stdout
    site.wait()
    site.prefmill("advance", "ended", *where(site))
    assert site.queue() == []
    assert "cancelled" in site.prefmill("status", "ended", *where(site)).stdout


def test_a_gpu_too_small_gets_smaller_microbatches_until_it_fits_or_nothing_is_left(site: Site) -> None:
    site.submit("hungry", "run=fits", "hungry.per_device_train_batch_size=6", cluster="heal")
    site.submit("hungry", "run=never", "hungry.per_device_train_batch_size=2", "hungry.fits=0", cluster="heal")
    site.wait()
    given = [row.get("smaller") for row in _rows(site.workspace, "fits")]
    assert given == [
        {"per_device_train_batch_size": 3}, {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 1, "activation_checkpointing": True},
    ]  # fmt: skip
    manifest = json.loads((site.workspace / "checkpoints/fits/hungry/all/manifest.json").read_text())
    assert manifest["config"]["per_device_train_batch_size"] == 6  # what was asked for: nothing downstream is stale
    assert manifest["metrics"]["per_device_train_batch_size"] == 1  # what it ran with
    assert manifest["metrics"]["activation_checkpointing"] is True
    steps = rows(site.workspace / "logs/fits/hungry/all/executed_steps.jsonl")
    # Each from the beginning: the saved random states are those of other microbatches.
    assert [(row["step"], row["rows"]) for row in steps] == [(s, n) for n in (6, 3, 1, 1) for s in (1, 2)]
    assert [row["action"] for row in _rows(site.workspace, "never")] == ["retry", "retry", "stop"]
    shown = site.prefmill("status", "never", *where(site)).stdout
    assert "nothing is left that would make it smaller by itself" in shown
    assert "to do: lower" in shown
    assert "nothing to submit" in site.submit("hungry", "run=fits", "hungry.per_device_train_batch_size=6")


def _rows(workspace: Path, run: str) -> list[dict[str, Any]]:
    return rows(workspace / "logs" / run / "submissions" / "decisions.jsonl")


def _decisions(workspace: Path, run: str) -> set[str]:
    return {row["action"] for row in _rows(workspace, run)}


def _running(site: Site) -> bool:
    return any("RUNNING" in line for line in site.queue())
