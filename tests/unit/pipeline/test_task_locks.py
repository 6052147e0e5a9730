"""Locks on the disks that clusters have: NFS, whose locks ask for more than a local disk's, and Lustre without any."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest
from toys import toy_plan

from prefmill.core.errors import PipelineError
from prefmill.pipeline.local import run_plan
from prefmill.pipeline.task_status import at_work, is_at_work, is_running, refuse_beside_run
from prefmill.pipeline.worker import locked

_KINDS = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK}


def as_nfs_locks(stream: object, operation: int) -> None:
    """By flock(2), "NFS details": a lock of the whole file's bytes, which the kernel itself grants or refuses."""
    command = fcntl.F_OFD_SETLK if operation & fcntl.LOCK_NB else fcntl.F_OFD_SETLKW
    wanted = struct.pack("hhqqi4x", _KINDS[operation & ~fcntl.LOCK_NB], os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(stream, command, wanted)  # type: ignore[call-overload]


def test_a_run_on_nfs_is_seen_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", as_nfs_locks)
    plan = toy_plan(tmp_path, make={})
    assert run_plan(plan) == 0
    assert not is_at_work(tmp_path, "toy")
    with at_work(tmp_path, "toy"):
        assert is_at_work(tmp_path, "toy")
        with pytest.raises(PipelineError, match="end it with Ctrl-C"):
            refuse_beside_run(tmp_path, "toy")
    with locked(plan.tasks[0]):
        assert is_running(plan.tasks[0].logs)
    monkeypatch.setattr(os, "access", lambda *_: False)  # another's run
    assert not is_at_work(tmp_path, "toy")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(PipelineError, match=r"(?s)no file locks.*toy/run.lock.*-o flock"):
        run_plan(toy_plan(tmp_path, make={}))
