"""A stage whose ranks a launcher has started: `torchrun -m stages.X`, `accelerate launch -m stages.X`.

Rank 0 holds the task's lock, prepares and publishes, as a command does; the others wait for its word and join the work.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from prefmill.core.errors import AttemptError, PipelineError
from prefmill.core.files import read_record
from prefmill.core.graceful_stop import clear_request
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import rank, world_size
from prefmill.distributed.launchers import FORGET, told_rank
from prefmill.pipeline.interruption import interrupted_by_term
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.rank_entrypoint import FAILURE, run_rank, write_spec
from prefmill.pipeline.run_record import point_latest, write_plan
from prefmill.pipeline.task_status import at_work
from prefmill.pipeline.worker import execute, import_and_run

_WORD, _PATIENCE = "prefmill/task", timedelta(hours=1)  # rank 0 may have large inputs to check
_ENDING_SECONDS = 2.0
# What gloo and NCCL say of a peer that is gone.
_BROKEN, _NAMED = re.compile(r"by peer|ncclRemoteError|remote process exited|[Tt]imed out waiting"), 8
_ARRIVAL_MINUTES, _POLL_SECONDS = 10.0, 0.2  # until all ranks have come: containers may start one by one


def run_launched(plan: Plan, only: str | None = None, force: bool = False) -> None:
    """This rank's part of the one task; raises PipelineError for several tasks, or for one that does not train."""
    tasks = plan.select(only) if only else list(plan.tasks)
    if len(tasks) != 1 or not tasks[0].stage.trains:
        raise PipelineError(
            "ranks work on one task that trains", got=", ".join(task.key for task in tasks),
            fix="name one with task=NAME, or start the command without torchrun",
        )  # fmt: skip
    store = _meet()
    if rank():
        return _join(store)
    point_latest(plan)
    write_plan(plan)
    # A stop that was asked of an earlier attempt would end this one too.
    clear_request(tasks[0].logs)
    try:
        with at_work(plan.workspace, plan.run), interrupted_by_term():
            lead = partial(_lead, tasks[0], partial(store.set, _WORD), partial(_ended, store))
            execute(tasks[0], force, run=lead)
    finally:
        if not store.check([_WORD]):  # up to date, or refused: there is nothing to join
            store.set(_WORD, "")
            with contextlib.suppress(RuntimeError):  # the store ends with this process: all are to hear that
                store.wait([_key("heard", number) for number in range(1, world_size())], timedelta(seconds=10))


def _lead(task: PlannedTask, say: Callable[[str], None], ended: Callable[[Exception], str], context: Task) -> Metrics:
    folder = context.work / "attempt"
    # What a rank of an earlier attempt failed of would be taken for this one's.
    shutil.rmtree(folder, ignore_errors=True)
    # The others begin at this word; without them rank 0 would wait in its first collective call.
    say(str(write_spec(folder, task.stage, task.config, context)))
    try:
        return import_and_run(task.stage, task.config, context)
    except (Exception, KeyboardInterrupt) as error:
        # Of a rank that is lost the others fail, or the launcher ends them.
        if failure := read_record(folder / FAILURE):
            raise AttemptError(failure.pop("error"), record=failure) from None
        if isinstance(error, Exception) and (lost := ended(error)):
            raise AttemptError(
                f"the process of rank {lost} ended before it could say why", record={"kind": "ProcessEnded"},
                got=f"{type(error).__name__} of rank 0: {error}".splitlines()[0],
                fix="see what the launcher says of its end; SIGKILL is often memory running out",
            ) from error  # fmt: skip
        raise


def _ended(store: Any, error: Exception) -> str:
    """The other ranks of this node whose processes have ended, such as `1, 3`; for the end of this one.

    Where none has and a connection broke, those of other nodes that have not said of what they fail.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it when it has seen what is to be told here
    places = [store.get(_key("here", number)).decode().split() for number in range(1, world_size())]
    here = [(number, pid) for number, (host, pid) in enumerate(places, 1) if host == socket.gethostname()]
    deadline = time.monotonic() + _ENDING_SECONDS  # its connections are closed before it is gone
    while not (found := [str(number) for number, pid in here if _has_ended(pid)]) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if found or not _BROKEN.search(str(error)):
        return ", ".join(found)
    others = [f"{number} on {host}" for number, (host, _) in enumerate(places, 1) if host != socket.gethostname()]
    silent = [name for name in others if not store.check([_key("failed", int(name.split()[0]))])]
    return " or ".join(silent[:_NAMED]) + f" or {len(silent) - _NAMED} more" * (len(silent) > _NAMED)


def _has_ended(pid: str) -> bool:
    with contextlib.suppress(OSError):
        # A process that nobody has waited for is still there, as a zombie; its name, in brackets, may hold any sign.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def _join(store: Any) -> None:
    try:
        spec = store.get(_WORD).decode()
        store.set(_key("heard", rank()), "")
    except RuntimeError as error:
        raise PipelineError(
            "rank 0 has ended before the work began", got=str(error).splitlines()[0], fix="see what rank 0 printed"
        ) from None
    if spec and (code := run_rank(Path(spec))):
        with contextlib.suppress(RuntimeError):  # rank 0's node may be gone with the store
            store.set(_key("failed", rank()), "")
        sys.exit(code)


def _meet() -> Any:
    """The key-value store that the process group uses later, when all ranks have come to it.

    Raises PipelineError naming those that have not come in time.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun starts all ranks, and ends all where one is lost
        print(f"{told_rank(os.environ)}: waits {_ARRIVAL_MINUTES:g} minutes for the other ranks", file=sys.stderr)
    # As torch's own env:// rendezvous decides: where torchrun's agent serves the store, its port is taken.
    serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not serves:
        # Not TCPStore's own wait: it prints a C++ traceback for every time it tries.
        _await(lambda: [] if _answers(address) else [0])
    try:
        # multi_tenant: the process group opens a store at this port in this process later, and shares the server.
        store = TCPStore(*address, is_master=serves, timeout=_PATIENCE, multi_tenant=True)
    except RuntimeError as error:
        raise PipelineError(
            "the ranks cannot meet", where=told_rank(os.environ), got=str(error).splitlines()[0],
            fix="set MASTER_PORT to a free port, the same for all ranks, and MASTER_ADDR to the node of rank 0",
        ) from None  # fmt: skip
    store.set(_key("here", rank()), f"{socket.gethostname()} {os.getpid()}")
    _await(lambda: [number for number in range(world_size()) if not store.check([_key("here", number)])])
    return store


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_POLL_SECONDS).close()
    except OSError:
        return False
    return True


def _await(missing: Callable[[], list[int]]) -> None:
    deadline = time.monotonic() + 60 * _ARRIVAL_MINUTES
    while left := missing():
        if time.monotonic() > deadline:
            raise PipelineError(
                "not all ranks have come", where=told_rank(os.environ), got=f"none of rank {', '.join(map(str, left))}",
                expected=f"{world_size()} ranks",
                fix=f"start all of them, with one address and port; where no launcher set these variables, {FORGET}",
            )  # fmt: skip
        time.sleep(_POLL_SECONDS)


def _key(what: str, number: int) -> str:
    return f"prefmill/{what}/{number}"
