"""Faults of a real Slurm, its disks and its users, each of which a run has to survive: one generator for each.

A fault does its part before submission, yields, and after submission injects; what follows its second `yield` fixes
what it broke, when the runs have ended. Moments and victims are drawn from the scene's random numbers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from tests.slurm.scene import Scene, live

Fault = Callable[[Scene], Iterator[None]]


def kill(pattern: str) -> None:
    """SIGKILL to the first process of this command line; one that has just ended is none."""
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout.split()
    with suppress(ProcessLookupError):
        os.kill(int(found[0]), signal.SIGKILL) if found else None


def killed_worker(scene: Scene) -> Iterator[None]:
    yield
    work = scene.site.workspace
    scene.each(lambda run, task: kill(f"prefmill.slurm.job {work}/logs/{run}/submissions/.*/train.0.json"))
    yield


def killed_child(scene: Scene) -> Iterator[None]:
    yield
    work = scene.site.workspace
    scene.each(lambda run, task: kill(f"rank_entrypoint {work}.*/{run}/train/{task}/"))
    yield


def power_cut(scene: Scene) -> Iterator[None]:
    yield
    cut = set()
    for run in scene.runs:
        node = scene.host(run, scene.trained(run, 3))
        if not cut:  # the others go on beside it
            cut.add(node)
            scene.site.cluster.power_cut(node)
    yield
    for node in cut:
        scene.site.cluster.power_on(node)


def time_limit(scene: Scene) -> Iterator[None]:
    scene.arguments.append("train.step_seconds=2.5")  # Slurm looks at time limits every thirty seconds
    yield
    ask = scene.site.cluster.ask
    scene.each(lambda run, task: ask("scontrol", "update", f"jobid={scene.element(run, task)}", "EndTime=now+1"))
    yield


def _preempted(scene: Scene, partition: str) -> Iterator[None]:
    scene.arguments += [
        "train.step_seconds=1.5",
        f"stages.train.resources={{partition: {partition}, options: {{nodelist: n3}}}}",
    ]
    yield
    for run in scene.runs:
        scene.trained(run, 3)
    higher = ("-p", "main", "--exclusive", "-w", "n3", "-o", "/dev/null", "--wrap", "sleep 2")
    assert scene.site.cluster.ask("sbatch", *higher)
    yield


def preempted_by_requeue(scene: Scene) -> Iterator[None]:
    return _preempted(scene, "low")


def preempted_by_cancel(scene: Scene) -> Iterator[None]:
    return _preempted(scene, "spare")


def full_disk(scene: Scene) -> Iterator[None]:
    yield
    scene.trained(scene.runs[0], scene.random.randrange(1, 8))  # a step that finds no room for its record
    filler = scene.site.workspace / "filler"
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(b"x" * 65536)
    scene.pause(8, 14)
    filler.unlink()
    yield


def _queue(scene: Scene, mode: str) -> Iterator[None]:
    yield
    scene.pause(0, 5)
    scene.switch("squeue", mode)
    for run in scene.runs:
        scene.about("advance", run)
        scene.about("status", run)
    scene.pause(1, 6)
    scene.switch("squeue", "")
    yield


def squeue_empty(scene: Scene) -> Iterator[None]:
    return _queue(scene, "empty")


def squeue_fails(scene: Scene) -> Iterator[None]:
    return _queue(scene, "fails")


def squeue_slow(scene: Scene) -> Iterator[None]:
    return _queue(scene, "slow")


def sbatch_fails_one_in_three(scene: Scene) -> Iterator[None]:
    scene.switch("sbatch", "fails")
    yield
    scene.each(lambda run, task: kill(f"rank_entrypoint {scene.site.workspace}.*/{run}/train/{task}/"))
    yield
    scene.switch("sbatch", "")


def sbatch_accepted_but_reported_failed(scene: Scene) -> Iterator[None]:
    scene.switch("sbatch", "lost")
    yield
    scene.each(lambda run, task: kill(f"rank_entrypoint {scene.site.workspace}.*/{run}/train/{task}/"))
    yield
    scene.switch("sbatch", "")


def submit_cut_off(scene: Scene) -> Iterator[None]:
    """The command that submits is killed at a random moment; a second submission, or its follow-up job, goes on."""
    for run in scene.runs:
        command = [sys.executable, "-m", "prefmill.cli.main", *scene.command(run)]
        process = subprocess.Popen(
            command, cwd=scene.site.checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": f"{scene.site.checkout}/lib:{scene.site.checkout}", "PYTHONSAFEPATH": "1"},
        )  # fmt: skip
        intents = scene.site.workspace / "logs" / run / "submissions" / "0001" / "intents.jsonl"
        scene.site.wait(lambda path=intents: path.is_file())  # type: ignore[misc]
        scene.pause(0, 0.25)
        process.kill()
        process.wait()
    yield
    yield


def follow_up_cancelled(scene: Scene) -> Iterator[None]:
    yield
    for run in scene.runs:
        names = (scene.site.cluster.ask("squeue", "-h", "-o", "%i %j") or "").splitlines()
        ids = [line.split()[0] for line in names if line.split()[1].startswith(f"{run}.advance.")]
        scene.site.cluster.ask("scancel", *ids)
    scene.each(lambda run, task: kill(f"rank_entrypoint {scene.site.workspace}.*/{run}/train/{task}/"))
    yield


def slurmctld_killed(scene: Scene) -> Iterator[None]:
    """It forgets the jobs of its last seconds, follow-up jobs too: then somebody does as `status` says."""
    yield
    scene.pause(0, 8)
    scene.site.cluster.kill("slurmctld")
    scene.pause(1, 6)
    scene.site.cluster.start_controller()
    scene.advised = True
    yield


def slurmdbd_down(scene: Scene) -> Iterator[None]:
    yield
    scene.site.cluster.stop("slurmdbd")
    scene.each(lambda run, task: kill(f"rank_entrypoint {scene.site.workspace}.*/{run}/train/{task}/"))
    yield
    scene.site.cluster.start_accounting_daemon()


def max_submit_jobs_6(scene: Scene) -> Iterator[None]:
    """One run at a time: each needs a place for its follow-up job."""
    set_limit = ("sacctmgr", "-iQ", "modify", "user", "name=root", "set")
    assert scene.site.cluster.ask(*set_limit, "MaxSubmitJobs=6") is not None
    time.sleep(2)
    yield
    yield
    scene.site.cluster.ask(*set_limit, "MaxSubmitJobs=-1")


def second_user(scene: Scene) -> Iterator[None]:
    """Another user looks, and is refused in words where the command would act."""
    yield
    scene.pause(0, 4)
    other = ["unshare", "--user", "--map-user=65534", "--map-group=65534", sys.executable, "-m", "prefmill.cli.main"]
    where = ["--workspace", str(scene.site.workspace)]
    for run in scene.runs:
        acts = (["advance", run, *where], ["cancel", "--run", run, *where], scene.command(run),
                ["rerun", "train", "--run", run, *where])  # fmt: skip
        for command in acts:
            done = scene.site.run([*other, *command])
            assert done.returncode == 2, (command, done.stdout + done.stderr)
            assert "belongs to another user" in done.stderr, done.stderr
        assert f"run {run}" in scene.site.run([*other, "status", run, *where]).stdout
    yield


def clock_90_s_behind(scene: Scene) -> Iterator[None]:
    """By libfaketime in the jobs of n1, where trainings are; what judges them is on another node."""
    scene.cluster = "late"
    scene.arguments.append("stages.train.resources={options: {nodelist: n1}}")
    yield
    scene.each(lambda run, task: kill(f"rank_entrypoint {scene.site.workspace}.*/{run}/train/{task}/"))
    yield


def corrupt_manifest(scene: Scene) -> Iterator[None]:
    yield
    for run in scene.runs:
        path = scene.site.workspace / "data" / run / "make" / f"shard{scene.random.randrange(2)}" / "manifest.json"
        scene.site.wait(path.is_file, seconds=240)
        path.write_text('{"kind": "review_cor')
        for command in ("advance", "status"):
            done = scene.about(command, run)
            assert done.returncode == 0 or command == "status", done.stderr
            assert "Traceback" not in done.stderr, done.stderr
    _submit_again(scene)
    yield


def flipped_bit(scene: Scene) -> Iterator[None]:
    yield
    for run in scene.runs:
        stage, name = scene.random.choice([("make", "numbers.jsonl"), ("use", "numbers.jsonl")])
        path = scene.site.workspace / "data" / run / stage / f"shard{scene.random.randrange(2)}" / name
        scene.site.wait((path.parent / "manifest.json").is_file, seconds=240)
        scene.pause(0, 3)
        data = bytearray(path.read_bytes())
        data[scene.random.randrange(len(data))] ^= 1 << scene.random.randrange(8)
        path.write_bytes(data)
        done = scene.about("verify", run)
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"DAMAGED  {stage}:{path.parent.name}: artifact's content has changed" in done.stdout, done.stdout
    _submit_again(scene)
    yield


def _submit_again(scene: Scene) -> None:
    """When nothing is left to happen: what has stopped says why, and the next `submit` makes it anew."""
    for run in scene.runs:
        scene.site.wait(lambda run=run: all("NeverSatisfied" in line for line in live(scene.site, run)), seconds=240)  # type: ignore[misc]
        done = scene.prefmill(*scene.command(run))
        assert done.returncode == 0, done.stderr


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        killed_worker, killed_child, power_cut, time_limit, preempted_by_requeue, preempted_by_cancel, full_disk,
        squeue_empty, squeue_fails, squeue_slow, sbatch_fails_one_in_three, sbatch_accepted_but_reported_failed,
        submit_cut_off, follow_up_cancelled, slurmctld_killed, slurmdbd_down, max_submit_jobs_6, second_user,
        clock_90_s_behind, corrupt_manifest, flipped_bit,
    )
}  # fmt: skip
# Faults after which some task must have had more than one attempt.
INTERRUPT = {
    "killed worker", "killed child", "power cut", "time limit", "preempted by requeue", "preempted by cancel",
    "full disk", "sbatch fails one in three", "sbatch accepted but reported failed", "follow up cancelled",
    "slurmdbd down", "clock 90 s behind",
}  # fmt: skip
ONE_AT_A_TIME = {"max submit jobs 6"}
