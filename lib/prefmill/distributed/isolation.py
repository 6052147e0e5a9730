"""Work in a process of its own, whose memory, a GPU's included, is free again when it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

from prefmill.core import errors
from prefmill.core.errors import AttemptError, PrefmillError, explain_os_error
from prefmill.core.files import write_record
from prefmill.distributed.devices import machine_has_gpu

_LONGEST_TMPDIR = 70  # bytes: a socket's path has at most 107, and `/pymp-XXXXXXXX/listener-XXXXXXXX` follows


def keep_socket_paths_short() -> None:
    """Have multiprocessing put this process's sockets below /tmp where TMPDIR, as of many clusters' jobs, is too long.

    For the server that starts tasks and for processes that load rows; other temporary files stay in TMPDIR.
    """
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        given, tempfile.tempdir = tempfile.tempdir, "/tmp"  # noqa: S108 - the folder made there is the user's own
        try:
            get_temp_dir()  # made once, and removed when the process ends
        finally:
            tempfile.tempdir = given


def in_own_process(folder: Path, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(*arguments)` in a child of this process; what it makes, it leaves on disk.

    The child is forked, so that imports are not paid again, or started anew on a machine with GPUs (`arguments` must
    be picklable). It ends with this process. A PrefmillError is raised here as it was there;
    raises AttemptError, with the child's traceback or signal, when it fails otherwise: what is then done about it
    depends on these. `folder` takes the error on its way.
    """
    failure = folder / "failure.json"
    # What an earlier attempt left would be taken for this one's error.
    failure.unlink(missing_ok=True)
    context: Any = multiprocessing.get_context(_start_method())
    child = context.Process(target=_run, args=(failure, work, *arguments))
    child.start()
    try:
        child.join()
    finally:  # an interrupt here must not leave it behind
        child.kill()
        child.join()
    if child.exitcode:
        raise _explain(failure, child.exitcode)


def _start_method() -> str:
    """CUDA cannot be used in a fork of a process that has as much as counted the GPUs."""
    return "spawn" if machine_has_gpu() else "fork"


def _run(failure: Path, work: Callable[..., None], *arguments: object) -> None:
    end_with_parent()
    try:
        work(*arguments)
    except Exception as error:
        shown = explain_os_error(error) or error
        if isinstance(shown, PrefmillError):
            details = {name: str(value) for name, value in shown.details.items() if value is not None}
            record = {"mendable": True, "kind": type(shown).__name__, "what": shown.what, "details": details}
        else:
            record = {"mendable": False, "kind": type(shown).__name__, "what": traceback.format_exc(), "details": {}}
        # As text: exceptions of many libraries cannot be pickled, or not be made again from their pickle.
        write_record(failure, record)
        sys.exit(1)


def _explain(failure: Path, exit_code: int) -> PrefmillError:
    if failure.is_file():
        record = json.loads(failure.read_text())
        failure.unlink()
        if record["mendable"]:
            known: PrefmillError = getattr(errors, record["kind"], PrefmillError)(record["what"], **record["details"])
            return known
        return AttemptError(record["what"], record={"kind": record["kind"]})
    name = signal.Signals(-exit_code).name if exit_code < 0 else None
    return AttemptError(
        f"a process of this task ended by {name}" if name else f"a process of this task ended with code {exit_code}",
        record={"exit_code": exit_code, "signal": name, "kind": "ProcessEnded"},
        fix="see the end of its log; SIGKILL is often memory running out",
    )  # fmt: skip


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that no orphan holds a task's lock."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
