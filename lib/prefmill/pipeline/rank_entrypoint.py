"""One process of a task: `python -m prefmill.pipeline.rank_entrypoint SPEC.json` leaves its result beside SPEC.json.

Under torchrun there are several; the parent (prefmill.slurm.job) holds the lock, checks and publishes.
"""

from __future__ import annotations

import json
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.config import validate
from prefmill.core.errors import PrefmillError, explain_os_error
from prefmill.core.files import write_json, write_record
from prefmill.core.graceful_stop import Stopped
from prefmill.core.stage import Stage, Task, load_stage
from prefmill.distributed.devices import has_gpu, rank
from prefmill.distributed.isolation import end_with_parent
from prefmill.pipeline.worker import EXIT_BUG, EXIT_USER_ERROR, import_and_run
from prefmill.store.artifacts import read

SPEC, RESULT, FAILURE = "spec.json", "result.json", "failure.json"


def write_spec(folder: Path, stage: Stage[Any], config: Any, task: Task) -> Path:
    """Write what another process needs to run `task`."""
    inputs = {name: [str(item.path) for item in items] for name, items in task.inputs.items()}
    known = {"run": task.run, "stage": stage.name, "name": task.name, "values": task.values, "sizes": task.sizes}
    spec = {"config": config.model_dump(mode="json"), "inputs": inputs, "task": known}
    spec |= {"output": str(task.output), "logs": str(task.logs)}
    write_json(folder / SPEC, spec)
    return folder / SPEC


def read_spec(path: Path) -> tuple[Stage[Any], Any, Task]:
    """The stage, its configuration and the task written by `write_spec`."""
    spec = json.loads(path.read_text())
    stage = load_stage(spec["task"]["stage"])
    inputs = {
        name: tuple(read(Path(folder), stage.reads[name].kind) for folder in folders)
        for name, folders in spec["inputs"].items()
    }
    task = Task(**spec["task"], inputs=inputs, output=Path(spec["output"]), logs=Path(spec["logs"]))
    return stage, validate(stage.config, spec["config"], where=path), task


def run_rank(path: Path) -> int:
    """Run the stage described in `path`; returns the exit code, with the explanation in a file beside it."""
    try:
        stage, config, task = read_spec(path)
        metrics = import_and_run(stage, config, task)
    except Stopped as stopped:
        # Exit code 0: torchrun ends the other ranks when one fails, and they may still be saving.
        _leave(path.with_name(RESULT), {"stopped": str(stopped)})
        return 0
    except Exception as error:
        return _fail(error, path.with_name(FAILURE))
    _leave(path.with_name(RESULT), {"metrics": metrics, "peak_gpu_memory_gb": _peak_gpu_memory_gb()})
    return 0


def _fail(error: Exception, record: Path) -> int:
    print(f"rank {rank()} fails:", file=sys.stderr)
    traceback.print_exception(error)
    shown = explain_os_error(error, record.parent) or error
    mendable = isinstance(shown, PrefmillError)
    text = str(shown) if mendable else "".join(traceback.format_exception(error))
    if not record.exists():  # the others fail of the first
        said = {"kind": type(shown).__name__, "error": text, "failed_on": socket.gethostname()}
        write_record(record, said)
    return EXIT_USER_ERROR if mendable else EXIT_BUG


def _leave(path: Path, record: Mapping[str, Any]) -> None:
    if rank() == 0:
        write_record(path, record)


def _peak_gpu_memory_gb() -> float | None:
    # Not imported to ask: that takes seconds, in stages that never compute with it.
    torch = sys.modules.get("torch")
    if torch is None or not has_gpu():
        return None
    peak: float = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peak


if __name__ == "__main__":
    # An orphaned rank would go on writing where the next attempt works.
    end_with_parent()
    sys.exit(run_rank(Path(sys.argv[1])))
