"""Runs under a fault: their pipeline, their commands, and squeue and sbatch that can be switched to misbehave."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm.conftest import Site
from tests.slurm.test_job import rows

NUM_TASKS, NUM_STEPS = 7, 20
PIPELINE = f"""
name: storm
stages:
  make: {{ array: {{ shard: 2 }}, set: {{ seconds: 2 }} }}
  use: {{ array: {{ shard: 2 }} }}
  join: {{}}
  train: {{ array: {{ shard: 2 }}, set: {{ steps: {NUM_STEPS}, step_seconds: 0.8, save_steps: 5 }} }}
"""
REAL = 'exec {real} "$@"\n'
SQUEUE = """case $mode in
empty) exit 0;;
fails) echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1;;
slow) sleep 4;;
esac
"""
SBATCH = """error='sbatch: error: Batch job submission failed: Socket timed out on send/recv operation'
dice=$(od -An -N1 -tu1 /dev/urandom)
case $mode in
fails) [ $((dice % 3)) = 0 ] && { echo "$error" >&2; exit 1; };;
lost) [ $((dice % 2)) = 0 ] && { {real} "$@" >/dev/null && echo "$error" >&2; exit 1; };;
esac
"""


@dataclass
class Scene:
    """Some runs under one fault, in a workspace of their own; `arguments` go to their `submit`."""

    site: Site
    programs: Path
    runs: list[str]
    random: random.Random
    arguments: list[str] = field(default_factory=list)
    cluster: str = "storm"
    advised: bool = False  # somebody runs `prefmill advance` where `status` says so

    def switch(self, program: str, mode: str) -> None:
        """Have squeue or sbatch, as the runs see it, behave like that; "" for as always."""
        (self.programs / f"{program}.mode").write_text(mode)

    def prefmill(self, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """A command of prefmill that sees these programs."""
        path = f"{self.programs}:{os.environ['PATH']}"
        return self.site.prefmill(*arguments, seconds=seconds, PATH=path, OMP_NUM_THREADS="1")

    def about(self, command: str, run: str, *more: str) -> subprocess.CompletedProcess[str]:
        """A command on a run."""
        where = ["--workspace", str(self.site.workspace)]
        return self.prefmill(command, *(["--run", run] if command in ("cancel", "rerun") else [run]), *more, *where)

    def command(self, run: str) -> list[str]:
        """What submits a run."""
        files = ["configs/pipelines/storm.yaml", "--cluster", f"configs/clusters/{self.cluster}.yaml"]
        return ["submit", *files, f"workspace={self.site.workspace}", f"run={run}", *self.arguments]

    def submit(self, run: str) -> subprocess.CompletedProcess[str]:
        """Submit a run; where Slurm gave no clear answer for long, as it may by chance, do what the message says."""
        done = self.prefmill(*self.command(run))
        for _ in range(3):
            if done.returncode and f"`prefmill advance {run}` when it answers again" in done.stderr:
                done = self.about("advance", run)
        return done

    def pause(self, low: float, high: float) -> None:
        """A random time."""
        time.sleep(self.random.uniform(low, high))

    def trained(self, run: str, steps: int) -> str:
        """The train task that has just got so far, drawn anew for each run."""
        task = f"shard{self.random.randrange(2)}"
        path = self.site.workspace / "logs" / run / "train" / task / "executed_steps.jsonl"
        self.site.wait(lambda: len(rows(path)) >= steps, seconds=180)
        return task

    def host(self, run: str, task: str) -> str:
        """The node a train task is on."""
        status = json.loads((self.site.workspace / "logs" / run / "train" / task / "status.json").read_text())
        return str(status["host"])

    def element(self, run: str, task: str) -> str:
        """The newest element of a train task."""
        found = self.site.workspace.glob(f"logs/{run}/submissions/*/jobs.jsonl")
        jobs = [job for path in sorted(found) for job in rows(path) if job["stage"] == "train"]
        index = int(task.removeprefix("shard"))
        return f"{[job for job in jobs if index in job['indices']][-1]['job_id']}_{index}"

    def each(self, strike: Callable[[str, str], object], steps: int = 4) -> None:
        """Strike a training of every run when it has got to a random step."""
        for run in self.runs:
            strike(run, self.trained(run, self.random.randrange(steps, NUM_STEPS // 2)))


def live(site: Site, run: str) -> list[str]:
    """The run's jobs in the queue, whoever submitted them."""
    shown = site.cluster.ask("squeue", "-h", "-r", "-o", "%i %j %T %r")
    lines = ["Slurm does not answer"] if shown is None else shown.splitlines()
    return [line for line in lines if shown is None or line.split()[1].startswith(f"{run}.")]


def fake_programs(folder: Path) -> Path:
    """squeue and sbatch that can be switched to misbehave, in a folder to put first on the path."""
    folder.mkdir()
    for name, body in (("squeue", SQUEUE), ("sbatch", SBATCH)):
        real = shutil.which(name)
        text = f"#!/bin/sh\nmode=$(cat {folder}/{name}.mode 2>/dev/null)\n{body}{REAL}".replace("{real}", str(real))
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder
