"""Reading rows from files, plain or packed: every fault named by file and line."""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec.structs import replace

from prefmill.core.errors import InputError
from prefmill.reviews.rows import Item, Place, RawRow, RowProblem, excerpt
from prefmill.store.jsonl import check_unique_keys, parse_json_strictly
from prefmill.store.opened import PACKED, reading
from prefmill.store.row_files import TABLES, file_rows, table_rows

JSON_LINES, CSV = (".jsonl", ".ndjson"), (".csv", ".tsv")
JSON = (".json", *JSON_LINES)
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_DATA = tuple(ending + packed for ending in (*JSON, *CSV, ".xlsx", ".xls", ".xml", *_ARCHIVES) for packed in PACKED)
_log = logging.getLogger(__name__)
_BOM = b"\xef\xbb\xbf"
_ARRAY = re.compile(r'\s*(?:\[|\{[^\[]*"notes"\s*:\s*\[)')  # an array, or an API answer that holds one
_OBJECT = re.compile(r"\s*\{\s*[\r\n]")  # an object over several lines: a file that holds one note
_GAP = re.compile(r"[\s,]*")
_END = re.compile(r"\](?:[^\[\]{}]*\})?\s*")  # of an array, and of the API answer that holds it
_CHUNK_BYTES = 1 << 20
# Not LATIN1, in which the dashes and quotes of Windows are control characters, which are left out.
_UTF8_FIX = "save the file as UTF-8 (for example: iconv -f WINDOWS-1252 -t UTF-8), or correct the line"


class PlainRow(msgspec.Struct, frozen=True):
    """A line of JSON whose meaning was plain as soon as it was decoded."""

    place: Place
    line: bytes
    items: list[Item]

    @property
    def values(self) -> dict[str, Any]:
        """As those of a RawRow, for an excerpt."""
        values: dict[str, Any] = parse_json_strictly(self.line)[0]
        return values


def none_is_plain(line: bytes) -> None:
    """Of rows that all need a second look."""
    return


def files_at(path: Path, endings: tuple[str, ...], without: str = "", or_else: tuple[str, ...] = ()) -> list[Path]:
    """`path`, or the files of a folder, plain or packed, at any depth and in order of name; none in a folder `without`.

    Where there are none, those that end `or_else`. Raises InputError where a folder has none of these either.
    """
    if not path.is_dir():
        _check_ending(path, CSV if endings != CSV else JSON, endings)
        return [path]
    # Archives made on macOS hold a hidden `._name` beside every file, which is no text.
    inside = [file for file in sorted(path.rglob("*")) if not file.name.startswith(".") and without not in file.parts]
    found = _ending_in(inside, endings) or _ending_in(inside, or_else)
    taken = set(found)
    other = [file.name for file in inside if file.name.lower().endswith(_DATA) and file not in taken]
    if found and other:
        _log.warning("%s: %d files are of another kind and not read: %s", path, len(other), ", ".join(other[:5]))
    if not found:
        expected = ", ".join(f"*{ending}" for ending in endings + or_else)
        got = ", ".join(other[:5]) or None
        raise InputError(
            "a folder without review files", where=path, got=got, expected=expected,
            fix="check the source's path" + (", or convert its files" if got else ""),
        )  # fmt: skip
    return found


def _ending_in(files: list[Path], endings: tuple[str, ...]) -> list[Path]:
    names = (*_packed(endings), *TABLES)
    return [file for file in files if file.name.lower().endswith(names) and file.is_file()]


def _packed(endings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{ending}{packed}" for ending in endings for packed in PACKED)


def _check_ending(path: Path, others: tuple[str, ...], endings: tuple[str, ...]) -> None:
    if path.name.lower().endswith(_packed(others)):
        raise InputError(
            "a file of another format than its source says", where=path, expected=", ".join(endings),
            fix=f"set format: {'jsonl' if endings == CSV else 'csv'} of this source, or give another file",
        )  # fmt: skip


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line, in UTF-8; packed files and UTF-16 are recognised by content, not name.

    Lines end in CR alone where the first one does, as old Macs and Excel's "CSV (Macintosh)" write them. Raises
    InputError for a file that is missing, damaged or cut short: the rows after that point are lost.
    """
    with reading(path) as (stream, lines_read):
        for number, line in enumerate(_lines(stream), 1):
            lines_read[0] = number
            # Left in place, a byte order mark would become a part of a CSV file's first column name.
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    first = stream.readline()
    if b"\r" in first.rstrip(b"\r\n"):
        yield from chain.from_iterable(line.splitlines(keepends=True) for line in chain([first], stream))
    else:
        yield from chain([first] if first else [], stream)


def jsonl_rows(
    path: Path, source: int, plain: Callable[[bytes], list[Item] | None] = none_is_plain
) -> Iterator[RawRow | PlainRow | RowProblem]:
    """The objects of a file with one JSON object a line.

    `plain` gives the items of a line that needs no second look.
    """
    file = str(path)
    for number, line in read_lines(path):
        place = Place(source, file, number)
        if items := plain(line):
            yield PlainRow(place, line, items)
            continue
        if not line.isspace():
            yield _parsed(line, place, "correct or delete that line; each line is one JSON object")


def json_rows(
    path: Path, source: int, plain: Callable[[bytes], list[Item] | None] = none_is_plain
) -> Iterator[RawRow | PlainRow | RowProblem]:
    """The objects of a file that is a JSON array, an object with an array `notes`, one object, lines or Parquet.

    An array is read piece by piece, as a venue's dump need not fit into memory.
    """
    if path.suffix.lower() in TABLES:
        yield from _table_rows(path, source)
        return
    with reading(path) as (stream, _):
        # Damaged bytes are told, or set aside, as their row is read.
        beginning = stream.read(_CHUNK_BYTES).decode("utf-8-sig", "replace")
    if _ARRAY.match(beginning):
        yield from _array_rows(path, source)
    elif _OBJECT.match(beginning):
        yield json_file_row(path, source)
    else:
        yield from jsonl_rows(path, source, plain)


def csv_rows(path: Path, source: int) -> Iterator[RawRow | RowProblem]:
    """The rows of a CSV file with a header, as text by column, or those of Parquet or Arrow."""
    if path.suffix.lower() in TABLES:
        yield from _table_rows(path, source)
        return
    for row in table_rows(_text_lines(path), path):
        place = Place(source, str(path), row.line)
        if row.misfit:
            reason = f"the row has {row.misfit} cells than the header's {row.num_columns}"
            fix = f"quote cells that hold {row.separator!r} or line breaks, and fill the row up with {row.separator!r}"
            yield RowProblem(place, reason, fix, excerpt(row.cells))
        else:
            yield RawRow(place, row.cells)


def _table_rows(path: Path, source: int) -> Iterator[RawRow]:
    return (RawRow(Place(source, str(path), item=f"row {row.number + 1}"), row.values) for row in file_rows(path))


def as_row(values: Any, place: Place, may_hold_nan: bool = True) -> RawRow | RowProblem:
    """A decoded JSON value as a row; anything but an object is a problem."""
    if isinstance(values, dict):
        return RawRow(place, values, may_hold_nan)
    return RowProblem(place, f"not a JSON object but {type(values).__name__}", "write a JSON object", excerpt(values))


def json_file_row(path: Path, source: int) -> RawRow | RowProblem:
    """The one object in a JSON file."""
    content = b"".join(line for _, line in read_lines(path))
    return _parsed(content, Place(source, str(path)), "correct the file, or remove it")


def _parsed(content: bytes, place: Place, fix: str) -> RawRow | RowProblem:
    """The object that `content` spells, or its fault, with its line where `place` is a file."""
    try:
        values, strict = parse_json_strictly(content)
    except UnicodeDecodeError as error:
        line, reason, fix = content.count(b"\n", 0, error.start) + 1, f"invalid UTF-8 at byte {error.start}", _UTF8_FIX
    # Nesting that is too deep ends in a RecursionError, which is no ValueError.
    except (ValueError, RecursionError) as error:
        line, reason = getattr(error, "lineno", 0), f"not JSON: {getattr(error, 'msg', error)}"
    else:
        return as_row(values, place, not strict)
    return RowProblem(replace(place, line=place.line or line or None), reason, fix, excerpt(content.strip()))


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, error) from None


def _read_text(path: Path) -> Generator[str]:
    """The file's text in pieces of about a megabyte."""
    # A piece may end within a character: this decoder keeps its first bytes for the next piece.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with reading(path) as (stream, lines_read):
        while True:
            chunk = stream.read(_CHUNK_BYTES)
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line = lines_read[0] + 1 + error.object.count(b"\n", 0, error.start)
                raise _not_utf8(path, line, error) from None
            lines_read[0] += chunk.count(b"\n")
            if not chunk:
                return


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    return InputError("invalid UTF-8", where=f"{path}:{line}", got=error.reason, fix=_UTF8_FIX)


def _array_rows(path: Path, source: int) -> Iterator[RawRow | RowProblem]:
    """The objects of the file's arrays, decoded one at a time: a dump may be many answers, one after the other."""
    decoder, chunks = json.JSONDecoder(), _read_text(path)
    buffer = _grow("", chunks, path, 1)
    position, counted, line, index = buffer.index("[") + 1, 0, 1, 0
    while True:
        gap = _GAP.match(buffer, position)
        assert gap is not None
        position = gap.end()
        line, counted = line + buffer.count("\n", counted, position), position
        if end := _END.match(buffer, position):
            if following := _ARRAY.match(buffer, end.end()):
                position = following.end()
            elif more := next(chunks, ""):
                buffer, position, counted = buffer[position:] + more, 0, 0
            elif end.end() == len(buffer):
                return
            else:
                raise InputError(
                    "text behind an array", where=f"{path}:{line}", got=excerpt(buffer[end.end() :]),
                    expected="its end, or another array", fix="remove what stands there, or write one object a line",
                )  # fmt: skip
            continue
        try:
            values, behind = decoder.raw_decode(buffer, position)
            row = _unique_row(buffer[position:behind].encode(), values, Place(source, str(path), line, f"item {index}"))
        except RecursionError:  # of either: Python 3.13 decodes deeper than it goes through what it decoded
            raise InputError(
                "not JSON: nested too deeply", where=f"{path}:{line}", got=excerpt(buffer[position:]),
                expected="an array of objects", fix="correct the object that begins there",
            ) from None  # fmt: skip
        except ValueError as error:
            # Mostly the object only goes on in the next piece; it is a fault where the file ends.
            buffer, position, counted = _grow(buffer[position:], chunks, path, line, error), 0, 0
            continue
        position = behind
        yield row
        index += 1


def _unique_row(text: bytes, values: Any, place: Place) -> RawRow | RowProblem:
    try:
        check_unique_keys(text, values)
    except ValueError as error:
        return RowProblem(place, f"not JSON: {error}", "keep one of the two", excerpt(text))
    return as_row(values, place)


def _grow(buffer: str, chunks: Iterator[str], path: Path, line: int, error: ValueError | None = None) -> str:
    """`buffer`, which begins at `line`, with more of the file: at least doubled, so that long objects stay cheap."""
    pieces, size = [buffer], 0
    for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size >= max(1, len(buffer)):
            break
    if size:
        return "".join(pieces)
    raise InputError(
        "not JSON, or cut short", where=f"{path}:{line}", got=error, expected="an array of objects",
        fix="correct the object that begins there, or download the file again",
    )  # fmt: skip
