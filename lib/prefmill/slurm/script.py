"""Batch scripts and their submission through submitit, which here submits a command and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from prefmill.slurm.cluster import ClusterFile, Resources
from prefmill.slurm.jobs import environment, setting

DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own
_SECONDS = 120


class ScriptExecutor(submitit.SlurmExecutor):
    """submitit's Slurm executor, which also renders scripts on a machine without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Always positive: Slurm is here."""
        # Where it finds no srun submitit refuses to make an executor; a dry run and the tests need none.
        return 2


def array_script(
    cluster: ClusterFile, resources: Resources, name: str, indices: Sequence[int], array_file: Path, code: Path
) -> str:
    """The script of one chunk: what it asks for, and the command that runs the element it finds itself to be."""
    logs = array_file.parents[3] / name.rpartition(".")[2] / "slurm"
    special = {"array": array_spec(indices, resources.max_concurrent), "signal": f"B:USR1@{cluster.signal_seconds}"}
    command = ["-m", "prefmill.slurm.job", str(array_file)]
    return _render(cluster, resources, name, f"{str(logs).replace('%', '%%')}/%A_%a.out", special, command, code)


def healer_script(cluster: ClusterFile, resources: Resources, run: str, workspace: Path, code: Path) -> str:
    """The script of the job that looks after a run: it ends when the run is over, and is requeued until then.

    However its process ends, the shell has Slurm start this job again; that takes no room on any disk.
    """
    command = ["-m", "prefmill.slurm.healer", run, str(workspace)]
    output = str(workspace / "logs" / run / "advance" / "advance.out").replace("%", "%%")
    text = _render(cluster, resources, f"{run}.advance", output, {}, command, code)
    before, _, last = text.rstrip("\n").rpartition("exec ")
    # A requeue sends TERM: the shell has to outlive python to know how that has ended.
    return f"{before}trap '' TERM\n{last} && exit 0\n{_AGAIN}"


# If the update is never accepted, the requeued job still starts once its node has forgotten it.
_AGAIN = """scontrol requeue "$SLURM_JOB_ID"
for _ in 1 2 3 4 5 6 7 8 9 10; do  # accepted as soon as Slurm counts the job as pending again
  sleep 0.5
  scontrol update "jobid=$SLURM_JOB_ID" StartTime=now+10minutes && break
done
"""


def array_spec(indices: Sequence[int], max_concurrent: int | None = None) -> str:
    """`indices` as Slurm writes them: 0-3,7 with %N where at most N may run at once."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{text}%{max_concurrent}" if max_concurrent else text


@dataclass(frozen=True)
class SbatchAnswer:
    """What sbatch said: the job's id, or the error, which may be that it gave no answer in time."""

    job_id: str = ""
    error: str = "no answer"


def sbatch(script: Path, options: Sequence[str] = ()) -> SbatchAnswer:
    """Submit `script` with further sbatch options, once."""
    executor = ScriptExecutor(script.parent)
    program, *path = executor._make_submission_command(script)
    command = [program, *options, *path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment())
    except subprocess.TimeoutExpired:
        return SbatchAnswer(error=f"no answer in {_SECONDS} seconds")
    except OSError as error:
        return SbatchAnswer(error=f"fatal: {error}")
    text = done.stderr.strip() or done.stdout.strip() or f"no answer, exit code {done.returncode}"
    try:
        job_id = "" if done.returncode else str(executor._get_job_id_from_submission_command(done.stdout))
    except FailedJobError:
        job_id = ""
    return SbatchAnswer(job_id, text)


def refusal(cluster: ClusterFile, resources: Resources) -> list[str]:
    """Why Slurm would refuse a task with these resources, by `sbatch --test-only`; empty where it would not."""
    here = Path.cwd()
    text = array_script(cluster, resources, "test.only", [0], here / "logs/test/submissions/0/arrays/only.json", here)
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=_SECONDS, check=False,
            env=environment(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    told = done.stderr.strip().splitlines() if done.returncode else []
    # A limit on submitted jobs is full for now: the rest follows as jobs end.
    return [f"Slurm says: {told[-1]}"] if told and not re.search(r"Submit\w*Limit", done.stderr) else []


def max_array_size(cluster: ClusterFile) -> int:
    """How many elements an array may have: what the cluster file says, else Slurm itself, else Slurm's default."""
    if cluster.max_array_size:
        return cluster.max_array_size
    # The largest index is one less than this, so an array that begins at 0 may have exactly as many elements.
    return setting("MaxArraySize", DEFAULT_MAX_ARRAY_SIZE)


def _render(
    cluster: ClusterFile,
    resources: Resources,
    name: str,
    output: str,
    special: dict[str, Any],
    command: list[str],
    code: Path,
) -> str:
    python = resources.python or cluster.python or sys.executable
    options = {
        **resources.options,
        **special,
        "chdir": os.getcwd(),
        "export": ",".join(cluster.exported),
        "kill-on-invalid-dep": "no",  # a child whose parent failed can then still be repaired
        "output": output,
        # Some sites set JobRequeue=0, and Slurm then refuses to requeue a job that has not asked for it.
        "requeue": True,
    }
    executor = ScriptExecutor(code)
    executor.update_parameters(
        **_parameters(cluster, resources), job_name=name, setup=_setup(cluster, resources, code), use_srun=False,
        # Unless told None, submitit asks for the wckey "submitit", which sites that track such keys refuse.
        stderr_to_stdout=True, wckey=None, additional_parameters=options,
    )  # fmt: skip
    # By exec python takes the shell's place: the warning (B:USR1) goes to the batch script's process alone.
    text: str = executor._make_submission_file_text(f"exec {shlex.join([python, *command])}", "")
    return text


def _parameters(cluster: ClusterFile, resources: Resources) -> dict[str, Any]:
    return {
        "partition": resources.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": resources.time_limit_minutes,
        "nodes": resources.nodes,
        # One on every node: torchrun starts the ranks there.
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": ":".join(filter(None, (resources.gpu_type, str(resources.gpus)))) if resources.gpus else None,
        "mem": None if resources.memory_gb is None else f"{round(resources.memory_gb * 1024)}M",
    }


def _setup(cluster: ClusterFile, resources: Resources, code: Path) -> list[str]:
    path = shlex.quote(f"{code}/lib:{code}")
    own = [
        "set -e",
        "unset SLURM_EXPORT_ENV",  # steps get what the job has, not the list the job was submitted with
        # Without PYTHONSAFEPATH `python -m` puts the working folder first: the checkout, which may have changed since.
        f"export PYTHONPATH={path} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false",
    ]
    return [*cluster.setup, *resources.setup, *own]
