"""Faults injected into a real Slurm: each run ends as an undisturbed one, and repeats no more than it must."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefmill.slurm.failures import Evidence, classify
from prefmill.slurm.jobs import accounting
from tests.slurm.conftest import Site
from tests.slurm.test_job import attempts, rows, steps
from tests.slurm.test_submit import digests, jobs

pytestmark = pytest.mark.slow

STEPS, SAVE, SECONDS = 30, 5, 0.2
KEYS = [f"train.steps={STEPS}", f"train.save_steps={SAVE}", f"train.step_seconds={SECONDS}"]


def train(site: Site, run: str, *keys: str, cluster: str = "heal") -> None:
    site.submit("train", f"run={run}", *KEYS, *keys, cluster=cluster)


def reached(site: Site, run: str, step: int, task: str = "all") -> Callable[[], bool]:
    return lambda: step in steps(site, run, task)


def decisions(site: Site, run: str) -> list[dict[str, Any]]:
    return rows(site.workspace / "logs" / run / "submissions" / "decisions.jsonl")


def status(site: Site, run: str, task: str = "all") -> dict[str, Any]:
    record: dict[str, Any] = json.loads((site.workspace / "logs" / run / "train" / task / "status.json").read_text())
    return record


def complete(site: Site, run: str) -> Callable[[], bool]:
    return lambda: bool(digests(site.workspace, run))


def check_steps(site: Site, run: str, task: str = "all", interruptions: int = 1) -> None:
    """All steps were taken in order, and each interruption repeated at most one save interval."""
    taken = steps(site, run, task)
    assert sorted(set(taken)) == list(range(1, STEPS + 1)), site.logs()
    assert len(taken) - STEPS <= interruptions * SAVE, taken
    back = [(before, after) for before, after in itertools.pairwise(taken) if after != before + 1]
    assert len(back) <= interruptions
    assert all(after % SAVE == 1 and after <= before + 1 for before, after in back), back


def kill_trainer(site: Site, run: str, task: str = "all") -> None:
    pattern = f"pipeline.rank_entrypoint {site.workspace}.*/{run}/train/{task}/"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)


def test_processes_that_die_are_started_again_where_they_had_saved(site: Site) -> None:
    small = "stages.train.resources={memory_gb: 0.25}"
    low = "stages.train.resources={partition: low, options: {nodelist: n3}}"
    other = site.checkout / "configs/clusters/other.yaml"  # nothing that is not preempted keeps n3
    other.write_text(
        "resources: {partition: main, time_limit_minutes: 10, options: {exclude: n3}}\n"
        "stages: {advance: {options: {exclude: n3}}}\n"
    )
    train(site, "calm", "train.step_seconds=0", cluster="other")
    slowly = "train.step_seconds=0.4"  # so that it still trains when the fault comes, on a busy machine too
    train(site, "killed", slowly, cluster="other")
    train(site, "hungry", small, "train.eat_gb=0.3", slowly, cluster="other")
    train(site, "torn", slowly, cluster="other")
    train(site, "preempted", low, slowly, cluster="other")
    # First, while nothing that was started again has been given the same node.
    site.wait(reached(site, "preempted", 3))
    higher = ("-p", "main", "--exclusive", "-w", "n3", "-o", "/dev/null", "--wrap", "sleep 2")
    assert site.cluster.ask("sbatch", *higher)
    site.wait(reached(site, "killed", 12))
    kill_trainer(site, "killed")
    site.wait(reached(site, "torn", 17))
    (site.workspace / "checkpoints/torn/train/all/checkpoint-15/weights.txt").write_text("")
    kill_trainer(site, "torn")
    site.wait()
    for run in ("killed", "hungry", "torn", "preempted"):
        assert digests(site.workspace, run) == digests(site.workspace, "calm"), site.logs()
    check_steps(site, "killed")
    assert [row["signal"] for row in attempts(site, "killed") if "signal" in row] == ["SIGKILL"]
    assert [(row["kind"], row["action"]) for row in decisions(site, "killed")] == [("killed", "retry")]
    assert steps(site, "torn").count(15) == 2  # from checkpoint 10: the newer one was torn
    check_steps(site, "preempted")
    assert [row["outcome"] for row in attempts(site, "preempted")] == ["requeued", "complete"]
    check_steps(site, "hungry")
    (hungry,) = decisions(site, "hungry")
    assert (hungry["kind"], hungry["source"], hungry["memory_gb"]) == ("host_memory", "log", 0.5)
    assert "exceeded memory limit" in hungry["why"]  # Slurm's own words
    first, second = [job for job in jobs(site, "hungry") if job["kind"] == "array"]
    # 22.05 without cgroups does not write OUT_OF_MEMORY: that it killed it, and that it held more than it may.
    accounts = accounting([str(first["job_id"]), str(second["job_id"])]) or {}
    killed, done = accounts[str(first["job_id"]), 0], accounts[str(second["job_id"]), 0]
    assert (killed.state, killed.signal, done.state) == ("FAILED", 9, "COMPLETED")
    assert (killed.peak_gb or 0) > (killed.memory_gb or 1) == 0.25
    assert classify(Evidence(account=killed)).kind == "host_memory"  # also where no log says so


def test_a_storm_over_one_array_and_a_parent_that_slurm_has_forgotten(site: Site) -> None:
    forget_ended_jobs_after(site, 2)
    site.submit("toy", "run=forgotten", "make.fail_first=1")  # nobody looks after it
    each = ["stages.train.array={shard: 4}", "stages.train.resources={options: {exclusive: true}}"]
    train(site, "storm", *each, "train.step_seconds=1.0")
    train(site, "calm", each[0], "train.step_seconds=0")
    site.wait(lambda: all(len(steps(site, "storm", f"shard{shard}")) > 6 for shard in range(4)))
    cut = status(site, "storm", "shard2")["host"]
    site.cluster.power_cut(cut)
    kill_trainer(site, "storm", "shard0")
    job = jobs(site, "storm")[0]["job_id"]
    site.cluster.ask("scontrol", "update", f"jobid={job}_1", "EndTime=now+1")
    site.cluster.stop("slurmdbd")
    site.cluster.stop("slurmctld")
    site.cluster.start_controller()
    try:
        site.wait(lambda: len(digests(site.workspace, "storm")) == 4)
    finally:
        site.cluster.power_on(cut)
        site.cluster.start_accounting_daemon()
    assert digests(site.workspace, "storm") == digests(site.workspace, "calm")
    for shard in range(3):
        check_steps(site, "storm", f"shard{shard}")
    check_steps(site, "storm", "shard3", interruptions=0)
    assert [row["outcome"] for row in attempts(site, "storm", "shard3")] == ["complete"]
    assert [row["outcome"] for row in attempts(site, "storm", "shard2")] == ["lost", "complete"]
    assert attempts(site, "storm", "shard2")[1]["node"] != cut

    parent = jobs(site, "forgotten")[0]["job_id"]
    site.wait(lambda: not [line for line in site.queue("%F %t") if line.split()[0] == parent])
    site.wait(lambda: parent not in (site.cluster.ask("squeue", "-h", "-t", "all", "-o", "%F") or ""))
    forget_ended_jobs_after(site, 300)
    assert site.prefmill("advance", "forgotten", "--workspace", str(site.workspace)).returncode == 0
    site.wait()
    site.submit("toy", "run=remembered")
    site.wait()
    assert len(digests(site.workspace, "forgotten")) == 7, site.logs()
    assert digests(site.workspace, "forgotten") == digests(site.workspace, "remembered")


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """A disk of 2 MB for the site's checkpoints, seen from here and from node n4."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk: run this test as root")
    folder = site.workspace / "checkpoints"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    restart(site, "n4")  # a node sees what was mounted when it started
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)


def restart(site: Site, node: str) -> None:
    site.cluster.power_cut(node)
    site.cluster.power_on(node)
    site.wait(lambda: node in (site.cluster.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N") or ""))


def test_a_full_disk_is_waited_for_and_when_it_is_freed_training_goes_on(site: Site, small_disk: Path) -> None:
    (site.checkout / "configs/clusters/disk.yaml").write_text(
        "resources: {partition: main, time_limit_minutes: 10, options: {nodelist: n4}}\n"
        "stages: {advance: {options: {nodelist: n4}}}\n"
    )
    train(site, "calm", "train.step_seconds=0", cluster="disk")
    train(site, "full", cluster="disk")
    site.wait(reached(site, "full", 7))
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        fill(filler)
    site.wait(lambda: decisions(site, "full"))
    assert [(row["kind"], row["action"]) for row in decisions(site, "full")] == [("disk", "wait")]
    assert "still full" in site.prefmill("status", "full", "--workspace", str(site.workspace)).stdout
    site.wait(
        lambda: [line for line in site.queue("%j %r") if re.match(r"full.advance.\w+ BeginTime", line)]
    )  # it looks again
    filler.unlink()
    done = site.prefmill("advance", "full", "--workspace", str(site.workspace))
    assert "train:all retry: disk" in done.stdout, done.stdout + done.stderr
    site.wait(lambda: len(digests(site.workspace, "full")) == 1)
    assert digests(site.workspace, "full") == digests(site.workspace, "calm")
    check_steps(site, "full")


def forget_ended_jobs_after(site: Site, seconds: int) -> None:
    """Have slurmctld purge ended jobs after that time; it looks once a minute."""
    config = site.cluster.root / "etc" / "slurm.conf"
    lines = [
        f"MinJobAge={seconds}" if line.startswith("MinJobAge") else line for line in config.read_text().split("\n")
    ]
    config.write_text("\n".join(lines))
    assert site.cluster.ask("scontrol", "reconfigure") is not None
