"""JSON Lines: rows read one by one, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec

from prefmill.core.errors import InputError

_BUFFER_BYTES = 1 << 20
_decode = msgspec.json.Decoder().decode


def parse_json(text: bytes) -> Any:
    """What `json.loads` gives and raises, in a fifth of the time where there is nothing to object to."""
    try:
        return _decode(text)
    except ValueError:  # a byte order mark and halves of surrogate pairs are no error; what is one is said as ever
        return json.loads(text)


def read_jsonl(path: Path, parse: Callable[[bytes], Any] = parse_json) -> Iterator[Any]:
    """The rows of a .jsonl file as `parse` gives them; raises InputError naming the line where it raises ValueError."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield parse(line)
            except ValueError as error:
                raise InputError(
                    "not a JSON row", where=f"{path}:{number}", got=str(error), expected="one JSON object a line",
                    fix="correct or delete that line",
                ) from None  # fmt: skip


class JsonlWriter(AbstractContextManager["JsonlWriter"]):
    """Writes rows to `path` under a partial name and renames it on a clean exit; on an error nothing appears."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[bytes] = self._partial.open("wb", buffering=_BUFFER_BYTES)

    def write(self, row: Any) -> None:
        """Append one row."""
        self.write_line(to_json(row))

    def write_line(self, line: str) -> None:
        """Append one row that is already JSON, without its newline."""
        self._stream.write(line.encode() + b"\n")
        self.num_rows += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._stream as stream:
                # Synced before the rename: after a power cut the name could otherwise stand for an empty file.
                if kind is None:
                    stream.flush()
                    os.fsync(stream.fileno())
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write `rows` to `path`, all or nothing; returns how many."""
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return writer.num_rows


def to_json(row: Any) -> str:
    """A row as one line of JSON, much sooner than by `json.dumps`; ValueError for NaN and infinity."""
    line = finite_to_json(row)
    # NaN is written as null there: where a null stands, another writer has to say which it was.
    return _to_json(row) if "null" in line else line


def finite_to_json(row: Any) -> str:
    """As `to_json`, in half its time: for a row whose numbers were checked, as NaN would become null."""
    try:
        return msgspec.json.encode(row).decode()
    except (TypeError, ValueError, OverflowError):  # paths, halves of surrogate pairs, numbers of over 64 bits
        return _to_json(row)


def _to_json(row: Any) -> str:
    import pydantic_core  # `prefmill status` reads rows and never comes here

    try:
        line = pydantic_core.to_json(row).decode()
    except ValueError:  # halves of surrogate pairs, and what json.dumps refuses in its own words
        return _encode(row)
    # Written as such they would be read back; a text may hold these words too.
    return _encode(row) if "NaN" in line or "Infinity" in line else line


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
