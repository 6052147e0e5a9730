"""A journal of finished work: one line an outcome, appended as it comes, so that a kill costs at most one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from prefmill.core.errors import PipelineError
from prefmill.store.jsonl import parse_json, to_json

_FAILED = b"failed"  # in the place of the number of tokens that were cut


class Entry(NamedTuple):
    """A line: the row's JSON, the tokens cut from the review, and whether the row tells of a failure."""

    json: bytes
    num_cut_tokens: int
    failed: bool

    def row(self) -> Any:
        """The row itself."""
        return parse_json(self.json)


class Journal(AbstractContextManager["Journal"]):
    """Appends entries to `path`; what an interrupted attempt left there is kept, but for a torn end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        # Before the first append, which would otherwise become part of a torn line.
        _cut_torn_end(path)
        self._stream: IO[bytes] = path.open("ab")
        self._held: list[bytes] = []
        self._has_success = any(not entry.failed for entry in self.entries())

    def append(self, row: Any, num_cut_tokens: int = 0, failed: bool = False) -> None:
        """Add one entry; when this returns, it survives the end of this process.

        Failures do so from the first success on. Where all fails, as with a server that refuses every request, all is
        to be tried again once the cause is gone.
        """
        head = _FAILED if failed else str(num_cut_tokens).encode()
        self._held.append(head + b"\t" + to_json(row).encode() + b"\n")
        self._has_success |= not failed
        if self._has_success:
            self._write_held()

    def entries(self) -> Iterator[Entry]:
        """Every entry, from the first."""
        self._write_held()
        with self._path.open("rb") as stream:
            yield from map(_entry, stream)

    def ordered(self, key: Callable[[Entry], tuple[str, str]]) -> Iterator[Entry]:
        """Every entry, by its key; sorted on disk, so that memory does not grow with their number."""
        self._write_held()
        try:
            yield from self._sorted(key)
        except sqlite3.OperationalError as error:
            given = (os.environ.get(name) for name in ("SQLITE_TMPDIR", "TMPDIR"))  # where SQLite makes it
            folder = next(filter(None, given), "/var/tmp")  # noqa: S108 - told, not used
            raise PipelineError(
                "cannot write: no room for a temporary file", where=folder, got=str(error),
                fix="make room there, or set SQLITE_TMPDIR to a folder on another disk, and run again: work is kept",
            ) from error  # fmt: skip

    def _sorted(self, key: Callable[[Entry], tuple[str, str]]) -> Iterator[Entry]:
        # An empty name is a database of SQLite's own, in memory up to its cache and in a temporary file beyond.
        with contextlib.closing(sqlite3.connect("")) as places, self._path.open("rb") as stream:
            places.execute("CREATE TABLE places (first BLOB, second BLOB, start INTEGER)")
            places.executemany("INSERT INTO places VALUES (?, ?, ?)", _places(stream, key))
            for (start,) in places.execute("SELECT start FROM places ORDER BY first, second"):
                stream.seek(start)
                yield _entry(stream.readline())

    def _write_held(self) -> None:
        self._stream.write(b"".join(self._held))
        # Not synced: a kill costs nothing that the kernel has, and what a power cut takes is scored again.
        self._stream.flush()
        self._held.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _places(lines: Iterable[bytes], key: Callable[[Entry], tuple[str, str]]) -> Iterator[tuple[bytes, bytes, int]]:
    """A line's key, in bytes that sort as the text does whatever it holds, and where it starts."""
    start = 0
    for line in lines:
        first, second = (part.encode("utf-8", "surrogatepass") for part in key(_entry(line)))
        yield first, second, start
        start += len(line)


def _entry(line: bytes) -> Entry:
    head, _, row = line.rstrip(b"\n").partition(b"\t")
    failed = head == _FAILED
    return Entry(row, 0 if failed else int(head), failed)


def _cut_torn_end(path: Path) -> None:
    """Shorten the file to its lines that are whole: a killed process leaves part of one, a power cut more."""
    good = 0
    with path.open("r+b") as stream:
        for line in stream:
            if not _is_whole(line):
                break
            good += len(line)
        stream.truncate(good)


def _is_whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(_entry(line).row(), dict)
    except ValueError:
        return False
