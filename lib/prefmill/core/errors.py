"""Errors a user can act on: what happened, what was got, what was expected, how to fix it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefmill.core.disk import refusal_untold


class PrefmillError(Exception):
    """A failure explained to the user; anything else that escapes is a bug in prefmill.

    `what` names the thing and the fault, `where` the file and line, `got` and `expected` the values,
    `fix` the next thing to do. The command line prints it without a traceback and exits with 2.
    """

    def __init__(
        self, what: str, *, where: object = None, got: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.details = {"where": where, "got": got, "expected": expected, "fix": fix}
        lines = [what]
        lines += [f"  {name + ':':<10}{value}" for name, value in self.details.items() if value is not None]
        super().__init__("\n".join(lines))


class ConfigError(PrefmillError):
    """A configuration that cannot be used."""


class InputError(PrefmillError):
    """Data from outside the pipeline that cannot be read or trusted."""


class ArtifactError(PrefmillError):
    """An artifact that is missing, incomplete, damaged or of another kind."""


class PipelineError(PrefmillError):
    """A pipeline that cannot be planned, or a task that cannot go on."""


# A class of its own: a sweep goes on after such trials, and ends after others that fail from the start.
class DivergedError(PipelineError):
    """A training whose loss, gradient or weights are no longer numbers: its settings are at fault."""


class AttemptError(PrefmillError):
    """An attempt that ended without a result in another process; `state` and `record` go into the status file."""

    def __init__(self, what: str, state: str = "failed", record: dict[str, Any] | None = None, **details: Any) -> None:
        self.state, self.record = state, record or {}
        super().__init__(what, **details)


_SERVER = (errno.EIO, errno.ESTALE)
# Refusals that a user can end; any other OSError may be a bug, and keeps its traceback.
_DISK_FIXES = {
    errno.ENOSPC: "free space on that disk, or set `workspace` to a larger one, and run again: finished work is kept",
    errno.EDQUOT: "raise the quota or set `workspace` to another disk, and run again: finished work is kept",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), and run again: finished work is kept",
    errno.EROFS: "make the disk writable, or set `workspace` to a folder on another one",
    errno.EACCES: "have its owner give you access, or set `workspace` to a folder of yours",
    errno.EPERM: "have its owner give you access, or set `workspace` to a folder of yours",
} | dict.fromkeys(
    _SERVER,
    "the disk or its server fails: run again when it answers, or set `workspace` to another; finished work is kept",
)  # fmt: skip
_LIMIT_FIXES = {
    errno.ENAMETOOLONG: "give a shorter name",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit (`ulimit -n 65536`), and run again"),
}
_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)  # which libraries tell in the system's words


def explain_os_error(error: BaseException, folder: Path | None = None) -> PrefmillError | None:
    """A disk's refusal (full, quota, read-only, no access, a file in the way) with its fix; None for any other.

    `folder` is where the work is: for errors that name no file.
    """
    if isinstance(error, PrefmillError):  # it has said what and where
        return None
    if not isinstance(error, OSError) or error.errno is None:
        return _explain_a_librarys(str(error), folder)
    if error.errno == errno.ENOTDIR or (error.errno == errno.EEXIST and os.path.isfile(error.filename)):
        return PrefmillError(
            "a file is where a folder should be", where=error.filename, fix="name another folder, or move that file"
        )
    if error.errno == errno.EEXIST and os.path.islink(error.filename) and not os.path.exists(error.filename):
        return PrefmillError(
            "a link that leads nowhere is where a folder should be", where=error.filename,
            fix=f"make the folder that it names, {os.path.realpath(error.filename)}, or name another",
        )  # fmt: skip
    if (limit := _LIMIT_FIXES.get(error.errno or 0)) is not None:
        return PrefmillError(str(error.strerror), where=str(error.filename)[:300], fix=limit)
    fix = _DISK_FIXES.get(error.errno or 0)
    if fix is None:
        return None
    where = error.filename or folder
    if error.errno in (errno.EACCES, errno.EPERM):  # to read as to write
        return PrefmillError(f"no access: {error.strerror}", where=where, fix=fix)
    if error.errno in _SERVER:  # too
        return PrefmillError(f"the disk fails: {error.strerror}", where=where, fix=fix)
    room = _room(Path(where)) if where and error.errno == errno.ENOSPC else None
    return PrefmillError(f"cannot write: {error.strerror}", where=where or "(file not named)", got=room, fix=fix)


@contextlib.contextmanager
def explained(folder: Path | None = None) -> Iterator[None]:
    """Raise a disk's refusal, as told by Python or by a library, as the error that says what to do; others pass."""
    try:
        yield
    except Exception as error:
        if (told := explain_os_error(error, folder)) is None:
            raise
        raise told from error


def _explain_a_librarys(text: str, folder: Path | None) -> PrefmillError | None:
    """The same of the libraries that save weights: they raise errors of their own, no OSError."""
    # safetensors, as Rust words it, and a process of a DataLoader: its error has the words of Python's alone.
    match = re.search(r"\(os error (?P<number>\d+)\)(?: at path \"(?P<path>[^\"]+)\")?", text) or re.search(
        r"^\w+Error: \[Errno (?P<number>\d+)\] [^:\n]+(?:: '(?P<path>[^'\n]+)')?$", text, re.MULTILINE
    )
    cut = "inline_container" in text and "unexpected pos" in text  # torch.save, in the middle of a file
    said = next((known for known in _IN_WORDS if os.strerror(known) in text), 0)
    number = errno.ENOSPC if text == "database or disk is full" else int(match["number"]) if match else said
    if cut or text == "disk I/O error":  # SQLite, of all but a full disk
        number = refusal_untold(folder, errno.ENOSPC if cut else errno.EIO).errno or 0 if folder else errno.ENOSPC
    if number not in _DISK_FIXES:
        return None
    return explain_os_error(OSError(number, os.strerror(number), match["path"] if match else None), folder)


def _room(path: Path) -> str:
    disk = next(folder for folder in path.absolute().parents if folder.is_dir())
    room = f"{shutil.disk_usage(disk).free / 1e6:,.1f} MB free, with what was begun"
    # Many small files may use up a disk's inodes first; some file systems count none.
    inodes = os.statvfs(disk)
    return f"{room}, but no inode: that disk may hold no more files" if inodes.f_files and not inodes.f_favail else room


def nearest(word: str, candidates: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the closest candidate, or nothing."""
    match = difflib.get_close_matches(word, candidates, n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def select(selector: str, keys: Collection[str], there: str) -> list[str]:
    """Those of `keys`, STAGE:TASK, that STAGE or STAGE:TASK names; raises PipelineError with the nearest for none."""
    found = [key for key in keys if selector.removesuffix(":") in (key, key.partition(":")[0])]
    if not found:
        near = nearest(selector, [*dict.fromkeys(key.partition(":")[0] for key in keys), *keys])
        raise PipelineError(
            f"no task '{selector}' {there}{near}", expected=", ".join(keys), fix="name a stage, or a task as STAGE:TASK"
        )
    return found
