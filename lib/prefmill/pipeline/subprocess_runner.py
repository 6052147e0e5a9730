"""Runs a task's stage in processes of its own: one, or one for every GPU on every node of the job."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefmill.core.errors import AttemptError
from prefmill.core.files import read_record
from prefmill.core.graceful_stop import Stopped, clear_request, request_stop
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.launchers import RANK_VARIABLES
from prefmill.distributed.limits import ProcessLimits
from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.rank_entrypoint import FAILURE, RESULT, write_spec
from prefmill.pipeline.task_status import in_short

REQUEUED, TERMINATED = "requeued", "terminated"
# Slurm kills 30 seconds after SIGTERM unless its KillWait says otherwise: 20 and 3 end before that.
_POLL_SECONDS, _KILL_SECONDS, _TERM_SECONDS = 0.1, 3.0, 20.0
_SAVING_SHARE = 0.85  # of the warning's time may pass before a training that is still saving is ended
_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# How every node's torchrun reports the process that failed first there.
_FIRST_FAILURE = re.compile(r"time\s*: (\S+)\s+host\s*: (\S+)\s+rank\s*: (\d+).*\s+exitcode\s*: (-?\d+)")


@dataclass(frozen=True)
class Layout:
    """What the job has: its nodes, and processes and CPUs on each."""

    nodes: int = 1
    processes: int = 1
    cpus: int = 1

    @classmethod
    def of_job(cls, environment: Mapping[str, str], trains: bool, processes: int | None = None) -> Layout:
        """From Slurm's variables: a training has a process for every GPU unless told otherwise, other stages one."""
        cpus = int(environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or "1")
        if not trains:
            return cls(cpus=cpus)
        gpus = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
        return cls(int(environment.get("SLURM_NNODES", "1")), processes or max(gpus, 1), cpus)

    def command(self, spec: Path) -> list[str]:
        """The command that runs every process."""
        worker = ["-m", "prefmill.pipeline.rank_entrypoint", str(spec)]
        if self.nodes * self.processes == 1:
            return [sys.executable, *worker]
        size = [str(self.nodes), str(self.processes)]
        torchrun = [sys.executable, "-m", "prefmill.distributed.torchrun", *size, *worker]
        if self.nodes == 1:
            return torchrun
        # srun takes neither the CPUs nor the whole environment of the job by itself.
        spread = [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1", "--export=ALL"]
        # Without --kill-on-bad-exit the other nodes wait for the lost one until a collective call times out.
        return ["srun", *spread, f"--cpus-per-task={self.cpus}", "--kill-on-bad-exit=1", *torchrun]


@dataclass
class SignalWatcher:
    """The signals a job gets before it is ended: USR1 by its own --signal or by preemption, TERM by scancel."""

    seconds: float
    received: list[signal.Signals] = field(default_factory=list)

    def listen(self) -> None:
        """Note the signals from now on instead of dying of them."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda caught, _: self.received.append(signal.Signals(caught)))

    @property
    def cancelled(self) -> bool:
        """Whether somebody ends the job for good, or Slurm because its time is over."""
        return signal.SIGTERM in self.received

    @property
    def patience(self) -> float:
        """Seconds that a training has for saving."""
        return _TERM_SECONDS if self.cancelled else self.seconds * _SAVING_SHARE


def run_elsewhere(
    task: PlannedTask, context: Task, layout: Layout, warnings: SignalWatcher, extra: Mapping[str, str]
) -> Metrics:
    """The metrics of the stage, run in child processes; raises AttemptError when they fail, stop or are ended."""
    folder = context.work / "attempt"
    # A result that an earlier attempt left would be taken for this one's.
    shutil.rmtree(folder, ignore_errors=True)
    clear_request(context.logs)
    spec = write_spec(folder, task.stage, task.config, context)
    # Where it is not set torchrun gives each of several ranks a single thread.
    threads = {"OMP_NUM_THREADS": str(max(1, layout.cpus // layout.processes))}
    log = task.logs.parent / f"{task.name}.log"
    # The log holds earlier attempts too: only what this one prints may explain its end.
    offset = log.stat().st_size if log.is_file() else 0
    own = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}  # a job is no rank
    process = subprocess.Popen(
        layout.command(spec), env={**threads, **allocator(os.environ, task.stage.trains), **own, **extra},
        preexec_fn=partial(_shield, task.stage.trains),
    )  # fmt: skip
    code = _wait(process, warnings, context.logs, task.stage.trains)
    return _collect(folder, code, warnings, log, offset)


def run_ranks(task: PlannedTask, ranks: int, context: Task) -> Metrics:
    """The stage's work by torchrun on this machine; a command that is interrupted lets it save, and raises Stopped."""
    warnings = SignalWatcher(0.0)
    warnings.listen()
    try:
        return run_elsewhere(task, context, Layout(1, ranks, ProcessLimits().cpus()), warnings, {})
    except AttemptError as error:
        if error.state in (REQUEUED, TERMINATED):  # a job's states: here nobody starts it again
            raise Stopped(error.what) from None
        raise


def allocator(environment: Mapping[str, str], trains: bool) -> dict[str, str]:
    """Where lengths vary, blocks of one size fit no other, unless segments of a GPU's memory can grow.

    Only for trainings (vLLM's own pool does not bear it), and where the user has set nothing.
    """
    asked = any(name in environment for name in ("PYTORCH_ALLOC_CONF", _ALLOCATOR))
    return {_ALLOCATOR: "expandable_segments:True"} if trains and not asked else {}


def _shield(trains: bool) -> None:
    """Slurm warns every process of a job: those that are to save must not die of it, and their parent asks them."""
    # What is ignored stays ignored after exec; a handler would be reset, and the signal deadly again.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if trains:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait(process: subprocess.Popen[bytes], warnings: SignalWatcher, logs: Path, trains: bool) -> int:
    """The exit code; after a warning a training is asked to save, anything else is ended to be resumed."""
    deadline, told = None, 0
    while (code := process.poll()) is None:
        if len(warnings.received) > told:
            told = len(warnings.received)
            patience = warnings.patience if trains else 0.0
            # A second warning can only bring the end nearer: SIGTERM leaves less time than SIGUSR1.
            deadline = min(deadline or time.monotonic() + patience, time.monotonic() + patience)
            if trains:
                request_stop(logs, patience)
        if deadline is not None and time.monotonic() > deadline:
            return _end(process)
        time.sleep(_POLL_SECONDS)
    return code


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _collect(folder: Path, code: int, warnings: SignalWatcher, log: Path, offset: int) -> Metrics:
    result, failure = read_record(folder / RESULT), read_record(folder / FAILURE)
    if code == 0 and "metrics" in result:
        metrics: Metrics = result["metrics"]
        return metrics
    # A stage that failed by itself has failed, whatever warning came too: requeueing would hide it.
    if warnings.received and not failure:
        raise _interrupted(warnings, result)
    number, first, host = _first_failure(log, offset) or ("", code, failure.get("failed_on"))
    exit_code = code if code < 0 else first
    name = signal.Signals(-exit_code).name if exit_code < 0 else None
    record = {"exit_code": exit_code, "signal": name, "kind": failure.get("kind", "ProcessEnded"), "failed_on": host}
    # Of a rank that was killed the others fail: what they say is not why.
    if failure and not name:
        raise AttemptError(failure["error"], record=record)
    who = f"rank {number}'s" if number else "the stage's"
    raise AttemptError(
        f"{who} process ended by {name}" if name else f"{who} process ended with exit code {code}",
        record=record, where=log, got=in_short(failure["error"]) if failure else None,
        fix="see the end of its log; SIGKILL is often memory running out",
    )  # fmt: skip


def _interrupted(warnings: SignalWatcher, result: Mapping[str, Any]) -> AttemptError:
    state = TERMINATED if warnings.cancelled else REQUEUED
    name = warnings.received[-1].name
    how = result.get("stopped", "ended before it had saved")
    return AttemptError(f"warned by {name}: {how}", state=state, record={"signal": name, "kind": state})


def _first_failure(log: Path, offset: int) -> tuple[str, int, str] | None:
    """The rank, the exit code, negative for a signal, and the node of the process that failed first on any node.

    The others fail of it: within the same second one that was killed comes before one that lost its peer.
    """
    try:
        with log.open("rb") as stream:
            stream.seek(offset)
            found = _FIRST_FAILURE.findall(stream.read().decode(errors="replace"))
    except FileNotFoundError:
        return None
    if not found:
        return None
    _, host, number, code = min(found, key=lambda item: (item[0], int(item[3]) >= 0))
    return number, int(code), host
