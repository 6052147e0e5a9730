"""JSON Lines: rows read one by one, written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from prefmill.core.errors import InputError
from prefmill.core.files import replacing

_KEY_END = re.compile(rb'"\s*:')
_decode = msgspec.json.Decoder().decode


def parse_json(text: bytes) -> Any:
    """What `json.loads` gives and raises, in a fifth of the time; ValueError also where a key stands twice."""
    return parse_json_strictly(text)[0]


def parse_json_strictly(text: bytes) -> tuple[Any, bool]:
    """As `parse_json`, and whether the text keeps to JSON, which has no NaN."""
    try:
        found = _decode(text)
    except ValueError:  # a byte order mark and halves of surrogate pairs are no error; what is one is said as ever
        return json.loads(text, object_pairs_hook=unique_keys), False
    check_unique_keys(text, found)
    return found, True


def check_unique_keys(text: bytes, found: Any) -> None:
    """Raises ValueError where an object of the JSON `text` has a key twice: `found`, decoded, has the last of them."""
    if may_repeat_keys(text, _num_keys(found)):
        json.loads(text, object_pairs_hook=unique_keys)


def may_repeat_keys(text: bytes, num_keys: int) -> bool:
    """Whether the JSON `text`, in which `num_keys` different keys were found, may have one of them twice."""
    # A key is followed by a colon: a text with no more colons than keys is read no second time.
    return text.count(b":") > num_keys and len(_KEY_END.findall(text)) > num_keys


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as json's `object_pairs_hook` makes it; ValueError names a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):  # json keeps the last of them and says nothing
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _num_keys(value: Any) -> int:
    if type(value) is not dict and type(value) is not list:
        return 0
    number, items = (len(value), value.values()) if type(value) is dict else (0, value)
    for item in items:
        kind = type(item)
        if kind is dict or kind is list:  # asked here too: most values are neither, and a call takes long
            number += _num_keys(item)
    return number


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
    """Writes rows to `path` under a partial name and renames it on a clean exit; on an error nothing appears.

    `writer` tells processes apart that may write the file at once.
    """

    def __init__(self, path: Path, writer: str = "") -> None:
        self.num_rows = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._replacing = replacing(path, writer)
        self._stream = self._replacing.__enter__()

    def write(self, row: Any) -> None:
        """Append one row."""
        self.write_line(to_json(row).encode())

    def write_line(self, line: bytes, num_rows: int = 1) -> None:
        """Append one row that is already JSON, or `num_rows` in as many lines, without the last newline."""
        self._stream.write(line + b"\n")
        self.num_rows += num_rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replacing.__exit__(kind, error, trace)


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write `rows` to `path`, all or nothing; returns how many."""
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return writer.num_rows


def to_json(row: Any) -> str:
    """A row as one line of JSON, much sooner than by `json.dumps`; ValueError for NaN and infinity."""
    try:
        line = msgspec.json.encode(row)
    except (TypeError, ValueError, OverflowError):  # paths, halves of surrogate pairs, numbers of over 64 bits
        return _to_json(row)
    # NaN is written as null here: where a null stands, another writer has to say which it was.
    return _to_json(row) if b"null" in line else line.decode()


def encode_checked(row: Any) -> bytes:
    """As `to_json`, in half its time and as UTF-8: for a row whose numbers were checked, as NaN would become null."""
    try:
        return msgspec.json.encode(row)
    except (TypeError, ValueError, OverflowError):
        return to_json(row).encode()


def _to_json(row: Any) -> str:
    import pydantic_core  # `prefmill status` reads rows and never comes here

    try:
        line = pydantic_core.to_json(row).decode()
    except ValueError:  # halves of surrogate pairs, and what json.dumps refuses in its own words
        return _encode(row)
    # Written as such they would be read back; a text may hold these words too.
    return _encode(row) if "NaN" in line or "Infinity" in line else line


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
