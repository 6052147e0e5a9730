"""The worker inside a job: warnings, requeue, several nodes, secrets at run time."""

from __future__ import annotations

import json
import shutil
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


def test_the_node_whose_gpu_fails_is_left_out_and_not_the_one_that_was_with_it(site: Site) -> None:
    where = "stages.train.resources={nodes: 2, processes: 2}"
    site.submit("train", "run=broken", "train.meet=true", "train.break_gpu_of_rank=3", where, cluster="heal")
    site.wait(lambda: len(attempts(site, "broken")) == 2)
    first, second = attempts(site, "broken")
    (decision,) = rows(site.workspace / "logs" / "broken" / "submissions" / "decisions.jsonl")
    assert (decision["kind"], decision["action"]) == ("gpu", "retry"), site.logs()
    nodes = site.cluster.ask("sacct", "-XnP", "-o", "NodeList", "-j", decision["element"])
    assert nodes == "n[1-2]\n"
    assert decision["exclude"] == "n2" != first["node"]  # rank 3 was there; the batch script was on n1
    again = (site.cluster.ask("sacct", "-XnP", "-o", "NodeList", "-j", decision["job"]) or "").strip()
    assert "n2" not in (site.cluster.ask("scontrol", "show", "hostnames", again) or "n2").split()
    assert second["outcome"] == "complete"


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


def warn(site: Site, element: str) -> None:
    """Send the warning that precedes a time limit, as Slurm itself would."""
    assert site.cluster.ask("scancel", "--signal=USR1", "--batch", element) is not None


def go_on(site: Site, element: str) -> None:
    """End the hold of a requeued job as soon as there is one."""
    site.wait(lambda: any("PENDING" in line for line in site.queue() if line.startswith(f"{element} ")))
    site.cluster.ask("scontrol", "update", f"jobid={element}", "StartTime=now")


def slow_to_answer(site: Site) -> str:
    """Name a cluster whose scontrol does what it is asked, and answers when Slurm has long begun to end the job."""
    folder = site.checkout / "slow"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\n{shutil.which("scontrol")} "$@"\ncode=$?\nsleep 2\nexit $code\n')
    (folder / "scontrol").chmod(0o755)
    setup = json.dumps([f'export PATH="{folder}:$PATH"'])
    (site.checkout / "configs/clusters/slow.yaml").write_text(f"signal_seconds: 60\nadvance: false\nsetup: {setup}\n")
    return "slow"


def test_one_requeue_for_several_signals_and_five_with_progress_go_on(site: Site) -> None:
    site.submit("train", "run=often", "train.steps=12", "train.step_seconds=0.5", cluster=slow_to_answer(site))
    element = f"{jobs(site, 'often')[0]['job_id']}_0"
    for count in range(1, 6):
        taken = len(steps(site, "often"))
        site.wait(lambda taken=taken: len(steps(site, "often")) > taken)
        warn(site, element)
        warn(site, element)
        site.wait(lambda count=count: len(attempts(site, "often")) == count)
        go_on(site, element)
    site.wait()
    made = attempts(site, "often")
    assert [row["outcome"] for row in made] == ["requeued"] * 5 + ["complete"]
    assert [row.get("restart_count") for row in made] == [None, "1", "2", "3", "4", "5"]
    assert steps(site, "often") == list(range(1, 13))
    assert digests(site.workspace, "often"), site.logs()


def test_a_warning_stops_reference_scoring_and_only_what_was_not_kept_is_scored_again(site: Site) -> None:
    site.submit("train", "run=scores", "train.groups=16", "train.step_seconds=0.3", "train.steps=1")
    element = f"{jobs(site, 'scores')[0]['job_id']}_0"
    noted = site.workspace / "logs" / "scores" / "train" / "all" / "scored.jsonl"
    site.wait(lambda: len(rows(noted)) >= 4)
    warn(site, element)
    go_on(site, element)
    site.wait()
    first, second = attempts(site, "scores")
    assert [first["outcome"], second["outcome"]] == ["requeued", "complete"], site.logs()
    assert first["progressed"]
    assert "kept " in (site.workspace / "logs" / "scores" / "train" / "all.log").read_text()
    found = [row["group"] for row in rows(noted)]
    assert set(found) == set(range(16))
    assert len(found) == 16 + 1  # one that was kept is looked at again


def test_five_without_progress_stop(site: Site) -> None:
    (site.checkout / "configs/clusters/brief.yaml").write_text("signal_seconds: 1\nadvance: false\n")
    site.submit("train", "run=idle", "train.steps=2", "train.step_seconds=60", cluster="brief")
    element = f"{jobs(site, 'idle')[0]['job_id']}_0"
    status = site.workspace / "logs/idle/train/all/status.json"
    for count in range(1, 6):
        site.wait(lambda: status.exists() and json.loads(status.read_text())["state"] == "running")
        warn(site, element)
        site.wait(lambda count=count: len(attempts(site, "idle")) == count)
        if count < 5:
            go_on(site, element)
    site.wait()
    record = json.loads(status.read_text())
    assert (record["state"], record["kind"]) == ("failed", "NoProgress")
    assert "raise its `time_limit_minutes`" in record["error"]


def test_a_cancelled_job_stays_cancelled(site: Site) -> None:
    site.submit("train", "run=gone", "train.steps=40", "train.step_seconds=0.5")
    element = f"{jobs(site, 'gone')[0]['job_id']}_0"
    site.wait(lambda: steps(site, "gone"))
    site.cluster.ask("scancel", element)
    site.wait()
    (only,) = attempts(site, "gone")
    assert (only["outcome"], only["signal"]) == ("terminated", "SIGTERM")
    site.submit("train", "run=gone", "train.steps=40", "train.step_seconds=0")
    site.wait()
    assert digests(site.workspace, "gone")
    assert steps(site, "gone") == list(range(1, 41))  # it had saved before it went


def test_preemption_saves_and_the_element_goes_on_later(site: Site) -> None:
    low = "stages.train.resources={partition: low, cpus: 16}"
    site.submit("train", "run=low", "train.steps=30", "train.step_seconds=0.5", "stages.train.array={shard: 4}", low)
    site.wait(lambda: all(steps(site, "low", f"shard{shard}") for shard in range(4)))
    urgent = site.run(["sbatch", "--partition=main", "--nodes=1", "--exclusive", "--wrap=sleep 1"])
    assert urgent.returncode == 0, urgent.stderr
    site.wait()
    outcomes = [[row["outcome"] for row in attempts(site, "low", f"shard{shard}")] for shard in range(4)]
    assert sorted(outcomes) == [["complete"]] * 3 + [["requeued", "complete"]], site.logs()
    for shard in range(4):
        assert steps(site, "low", f"shard{shard}") == list(range(1, 31))


def test_inputs_are_checked_before_anything_else(site: Site) -> None:
    site.submit("toy", "run=torn")
    site.wait()
    data = site.workspace / "data/torn"
    numbers = data / "make/shard1/numbers.jsonl"
    numbers.write_text(numbers.read_text() + "{}\n")
    array = site.workspace / "logs/torn/submissions/0001/arrays/use.0.json"
    (data / "use/shard1/manifest.json").unlink()
    done = site.run(["sbatch", "--wait", "--array=1", str(array.with_suffix(".sbatch"))])
    assert done.returncode == 2, site.logs()
    log = (site.workspace / "logs/torn/use/shard1.log").read_text()
    assert "artifact is damaged" in log
    assert not (data / "use/shard1/work/attempt").exists()
