"""What a disk refuses is explained, whichever library was writing."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from prefmill.core.errors import PrefmillError, explain_os_error

ROOM = 100_000


def as_bytes(path: Path) -> None:
    path.write_bytes(bytes(5 * ROOM))


def by_torch(path: Path) -> None:
    torch.save({"weight": torch.zeros(5 * ROOM)}, path)


def by_safetensors(path: Path) -> None:
    save_file({"weight": np.zeros(5 * ROOM)}, path)


@pytest.mark.parametrize("save", [as_bytes, by_torch, by_safetensors])
def test_a_file_that_finds_no_room_is_no_bug(save: Callable[[Path], None], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        with pytest.raises(Exception, match=r"File too large|unexpected pos") as caught:
            save(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    explained = explain_os_error(caught.value)
    assert explained is not None, caught.value
    assert explained.what.startswith("cannot write: ")
    assert "finished work is kept" in str(explained)


def test_who_may_not_read_is_not_told_that_he_cannot_write() -> None:
    told = explain_os_error(PermissionError(errno.EACCES, "Permission denied", "/runs/theirs/plan.json"))
    assert told is not None
    assert told.what == "no access: Permission denied"
    assert "have its owner give you access" in str(told)


def test_other_errors_stay_bugs() -> None:
    assert explain_os_error(ValueError("unexpected pos")) is None
    assert explain_os_error(RuntimeError("I/O error: No such file or directory (os error 2)")) is None
    assert explain_os_error(OSError("made by hand")) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("write(): fd 3 failed with No space left on device"),  # torch, where it writes the older format
        sqlite3.OperationalError("database or disk is full"),
        OSError(errno.ESTALE, os.strerror(errno.ESTALE), "x"),
        OSError(errno.EIO, os.strerror(errno.EIO), "x"),
    ],
)
def test_what_disks_and_their_servers_do_is_no_bug(error: Exception) -> None:
    explained = explain_os_error(error, Path("/w"))
    assert explained is not None
    assert "run again" in str(explained)
    server = isinstance(error, OSError)  # which may have failed to read as well
    assert explained.what.startswith("the disk fails: " if server else "cannot write: ")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError('Error while serializing: I/O error: Disk quota exceeded (os error 122) at path "/q/.tmpA"'),
        PermissionError(
            "Caught PermissionError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "  File \"x.py\", line 1, in f\nPermissionError: [Errno 13] Permission denied: '/q/.tmpA'\n"
        ),
    ],
)
def test_errors_that_hold_their_path_in_words_name_it(error: Exception) -> None:
    explained = explain_os_error(error, Path("/elsewhere"))
    assert explained is not None
    assert explained.details["where"] == "/q/.tmpA"


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EIO], ids=errno.errorcode.__getitem__
)
@pytest.mark.parametrize(
    "text", ["[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0", "disk I/O error"]
)
def test_a_library_that_says_not_why_is_told_what_the_disk_says(
    text: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch and SQLite have the same words for a full disk, a quota and a dead server: each has a fix of its own."""

    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    explained = explain_os_error(RuntimeError(text), tmp_path)
    assert explained is not None
    assert os.strerror(number) in explained.what
    assert list(tmp_path.iterdir()) == []


def test_what_was_explained_is_not_explained_again() -> None:
    """A cache on a full disk of its own was told as the task's output."""
    told = PrefmillError("cannot write: No space left on device", where="/cache/ab")
    assert explain_os_error(told, Path("/output")) is None


def test_a_full_disk_is_told_with_its_folder_and_room_also_for_libraries_that_name_none(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e6
    explained = explain_os_error(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path / "out")
    assert explained is not None
    assert explained.details["where"] == tmp_path / "out"
    told = str(explained.details["got"]).split(" MB free")[0].replace(",", "")
    assert float(told) == pytest.approx(free, rel=0.2)


def test_a_disk_without_inodes_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its room says nothing: it may hold no more files."""
    found = os.statvfs(tmp_path)
    real = {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**{**real, "f_files": 4096, "f_favail": 0}))
    explained = explain_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "a" / "b")))
    assert explained is not None
    assert "no inode" in str(explained.details["got"])
