"""A stage whose ranks a launcher has started: `torchrun -m stages.X`, `accelerate launch -m stages.X`.

Rank 0 holds the task's lock, prepares and publishes, as a command does; the others wait for its word and join the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from prefmill.core.errors import PipelineError
from prefmill.core.graceful_stop import clear_request
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import rank
from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.rank_entrypoint import read_spec, write_spec
from prefmill.pipeline.worker import execute, import_and_run

_WORD, _PATIENCE = "prefmill/task", timedelta(hours=1)  # rank 0 may have large inputs to check


def run_launched(tasks: list[PlannedTask], force: bool = False) -> None:
    """This rank's part of the one task; raises PipelineError for several tasks, or for one that does not train."""
    if len(tasks) != 1 or not tasks[0].stage.trains:
        raise PipelineError(
            "ranks work on one task that trains", got=", ".join(task.key for task in tasks),
            fix="name one with task=NAME, or start the command without torchrun",
        )  # fmt: skip
    store = _store()
    if rank():
        return _join(store.get(_WORD).decode())
    # A stop that was asked of an earlier attempt would end this one too.
    clear_request(tasks[0].logs)
    try:
        execute(tasks[0], force, run=partial(_lead, tasks[0], partial(store.set, _WORD)))
    finally:
        if not store.check([_WORD]):  # up to date, or refused: there is nothing to join
            store.set(_WORD, "")


def _lead(task: PlannedTask, say: Callable[[str], None], context: Task) -> Metrics:
    # The others begin at this word; without them rank 0 would wait in its first collective call.
    say(str(write_spec(context.work / "attempt", task.stage, task.config, context)))
    return import_and_run(task.stage, task.config, context)


def _join(spec: str) -> None:
    if spec:
        import_and_run(*read_spec(Path(spec)))


def _store() -> Any:
    """The launcher's key-value store, which the process group uses later."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # As torch's own env:// rendezvous decides: where torchrun's agent serves the store, its port is taken.
    serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # multi_tenant: the process group opens a store at this port in this process later, and shares the server.
    return TCPStore(address, port, is_master=serves, timeout=_PATIENCE, multi_tenant=True)
