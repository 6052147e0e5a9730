"""Rows of data files in common formats and of hub datasets, each with where it stands."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from prefmill.core.errors import InputError
from prefmill.store.jsonl import unique_keys
from prefmill.store.opened import PACKED, reading

TABLES = (".parquet", ".arrow", ".feather")
SUFFIXES = (*(kind + packed for packed in PACKED for kind in (".jsonl", ".ndjson", ".json", ".csv", ".tsv")), *TABLES)
_KINDS = f"{', '.join(name for name in SUFFIXES if name.count('.') == 1)}; text may be packed ({', '.join(PACKED[1:])})"
# What Label Studio, crowds' platforms and sheets call who answered.
RATERS = (
    "annotator", "annotator_id", "worker", "worker_id", "workerid", "user", "user_id", "rater_id", "participant",
    "participant_id", "prolific_pid", "evaluator", "labeler",
)  # fmt: skip
_ROWS_AT_ONCE = 64  # of a table in memory: each may hold whole pictures
_LONGEST_CELL = 1 << 24  # characters: above any paper, below what an unclosed quote swallows of a large file
_Reader = Callable[[IO[str], Path], Iterator[tuple[str, Any]]]
_LISTS = ("data", "rows", "examples")  # what exports call the list of their rows
_ONE_LIST = re.compile(rf'\s*(\[|\{{[^\[{{]*"(?:{"|".join(_LISTS)})"\s*:\s*\[\s*\{{)')
_SEP_LINE = re.compile(r'"?sep=(.)"?\s*$')  # by which a sheet is told the separator


class SourceRow(NamedTuple):
    """A row and where it stands: file and line, or dataset and row number."""

    where: str
    number: int
    values: dict[str, Any]


def file_rows(path: Path, encoding: str = "utf-8", split: str = "train", quoted: bool = True) -> Iterator[SourceRow]:
    """The rows of a file that ends in one of SUFFIXES, or of a folder that datasets' `save_to_disk` wrote.

    Text is `encoding`, a byte order mark is no text; of a folder with several splits `split` is read. Quotes around a
    table's cell are no text where cells are `quoted`. Raises InputError where it is not readable.
    """
    for number, (place, values) in enumerate(_readable(path, encoding, split, quoted)):
        if not isinstance(values, dict):
            raise InputError(
                "a row is an object with keys", where=f"{path}:{place}", got=type(values).__name__,
                fix="correct or delete that row; a file that is one list is named .json",
            )  # fmt: skip
        yield SourceRow(f"{path}:{place}", number, values)


def _readable(path: Path, encoding: str, split: str, quoted: bool) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException

    try:
        yield from _rows_of(path, encoding, split, quoted)
    except (OSError, ArrowException) as error:
        raise InputError("cannot read the file", where=path, got=str(error), fix="download or write it again") from None


def is_saved_to_disk(path: Path) -> bool:
    """Whether `path` is a folder that datasets' `save_to_disk` wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _rows_of(path: Path, encoding: str, split: str, quoted: bool) -> Iterator[tuple[str, Any]]:
    if is_saved_to_disk(path):
        return _saved_rows(path, split)
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(
            "this kind of file is not known", where=path, expected=_KINDS,
            fix="convert or unpack it, or name it by its format",
        )  # fmt: skip
    if not path.is_file():
        raise InputError("no such file", where=path, fix="check the path; a hub dataset is given as name")
    suffix = path.suffix.lower()
    return (
        _text_rows(path, encoding, quoted)
        if suffix not in TABLES
        else (_parquet_rows(path) if suffix == ".parquet" else _arrow_rows(path))
    )


def _text_rows(path: Path, encoding: str, quoted: bool) -> Iterator[tuple[str, Any]]:
    """Rows of lines, one list or a table, unpacked and decoded on the way."""
    name = path.name.lower()
    kind = Path(name.removesuffix(next(packed for packed in reversed(PACKED) if name.endswith(packed)))).suffix
    table: _Reader = partial(_csv_rows, quoted=quoted)
    read = {".json": _json_rows, ".csv": table, ".tsv": table}.get(kind, _jsonl_rows)
    # A byte order mark is how Excel marks UTF-8; as text it would stand in the first column's name. UTF-16 is
    # recognised, and comes as UTF-8.
    is_utf = codecs.lookup(encoding).name.startswith(("utf-8", "utf-16"))
    with reading(path) as (stream, _):
        # csv wants line ends as they are: a quoted cell may hold some.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig" if is_utf else encoding, newline="")
        try:
            yield from read(text, path)
        except UnicodeDecodeError as error:
            raise InputError(
                f"not {encoding} text", where=path, got=str(error), expected=f"text in {encoding}",
                fix="save it as UTF-8; of preferences and chats name what it is in, such as encoding=latin-1",
            ) from None  # fmt: skip


def _jsonl_rows(text: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, 1):
        if line.strip():
            yield str(number), _loads(line, f"{path}:{number}")


def _json_rows(text: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of one list, which may be the `data` of an object, or one a line, as the hub's files mostly are."""
    whole = text.read()
    if _ONE_LIST.match(whole):
        found = _loads(whole, str(path))
        rows = found if isinstance(found, list) else found[next(key for key in _LISTS if key in found)]
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    yield from _jsonl_rows(io.StringIO(whole), path)


def _csv_rows(text: IO[str], path: Path, quoted: bool) -> Iterator[tuple[str, Any]]:
    for row in table_rows(iter(text), path, quoted):
        if row.misfit:
            raise InputError(
                f"a row has {row.misfit} cells than the table has columns", where=f"{path}:{row.line}",
                got=str(list(row.cells.values()))[:200], expected=f"{row.num_columns} cells",
                fix="put quotes around a cell with a comma or a line break, and fill the row up with commas",
            )  # fmt: skip
        yield str(row.line), row.cells


class TableRow(NamedTuple):
    """A row by the columns' names, the line that it begins in, and whether it has `more` or `fewer` cells."""

    line: int
    cells: dict[str, Any]
    misfit: str
    num_columns: int
    separator: str


def table_rows(lines: Iterator[str], path: Path, quoted: bool = True) -> Iterator[TableRow]:
    """The rows of a table, empty ones left out; raises InputError where it is none."""
    # The limit is that of the process, not of this reader, and is set back for whoever reads csv beside us.
    before, start = csv.field_size_limit(_LONGEST_CELL), 1
    try:
        reader, header = open_table(lines, path, quoted)
        num_columns, separator = len(reader.fieldnames or ()), reader.reader.dialect.delimiter
        start += header
        for row in reader:
            # The reader knows only where a row ends, and a quoted cell may go over many lines.
            line, start = start, reader.line_num + header
            cells: dict[str, Any] = dict(row)
            if not any(cells.get("", [True])):  # a sheet has empty cells behind its last, and rows below
                del cells[""]
            if any(cells.values()):
                misfit = "more" if "" in cells else "fewer" if None in cells.values() else ""
                yield TableRow(line, cells, misfit, num_columns, separator)
    except csv.Error as error:
        raise InputError(
            "unreadable CSV", where=f"{path}, in the row from line {start}", got=str(error),
            fix="look for a quote that is not closed there; quotes inside a cell are doubled, as in a sheet's CSV "
            "(Google's TSV has them as they are)",
        ) from None  # fmt: skip
    finally:
        csv.field_size_limit(before)


def open_table(lines: Iterator[str], path: Path, quoted: bool = True) -> tuple[csv.DictReader[str], int]:
    """The rows of a table by its header, and the header's line; cells beyond those of the header have the key "".

    Cells end at the mark that is most frequent in the header, or that a line `sep=;` before it names; a header in
    quotes says that cells are `quoted`. Raises InputError where a column stands there twice.
    """
    first = next(lines, "")
    if told := _SEP_LINE.match(first):
        separator, header = told[1], 2
    else:
        # Sheets of countries with a decimal comma have semicolons.
        separator, header = max("\t;," if ".tsv" in path.name.lower() else ",;\t", key=first.count), 1
        lines = chain([first], lines)
    # A space that the header has is the table's, any other may be an answer's first token.
    spaced = f"{separator} " in first
    reader = csv.DictReader(
        lines, restkey="", strict=True, delimiter=separator, skipinitialspace=spaced,
        quoting=csv.QUOTE_MINIMAL if quoted or '"' in first else csv.QUOTE_NONE,
    )  # fmt: skip
    # pandas writes its row numbers without a name, and reads them by this one.
    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(reader.fieldnames or [])]
    if len(set(names)) < len(names):
        raise InputError(
            "a column stands there twice", where=f"{path}:{header}", got=", ".join(names), fix="name every column once"
        )
    reader.fieldnames = names
    return reader, header


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    yield from _batched(parquet.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE))


def _arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of Arrow's file format, or of its stream, which is how datasets keeps its cache."""
    from pyarrow import ArrowInvalid, ipc

    try:
        opened = ipc.open_file(path)
        batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
    except ArrowInvalid:
        batches = iter(ipc.open_stream(path))
    yield from _batched(batches)


def _saved_rows(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        if split not in found:
            raise InputError(
                f"no split '{split}' in this folder", where=path, expected=", ".join(found), fix="correct split"
            )
        found = found[split]
    yield from ((f"row {number}", _given(dict(row))) for number, row in enumerate(_with_bytes(found), 1))


def _batched(batches: Any) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                number += 1
                yield f"row {number}", _given(row)


def _given(value: Any, depth: int = 0) -> Any:
    """`value` without the nulls in its inner mappings: a column gives every row the keys that any row has.

    The arguments of a call would otherwise be trained with those of other calls, each as null. A decimal, as databases
    export numbers, is a plain number.
    """
    if isinstance(value, Decimal):
        return int(value) if value == int(value) else float(value)
    if isinstance(value, dict):
        return {key: _given(item, depth + 1) for key, item in value.items() if item is not None or not depth}
    return [_given(item, depth + 1) for item in value] if isinstance(value, list) else value


def hub_rows(name: str, subset: str | None, split: str, revision: str | None) -> Iterator[SourceRow]:
    """The rows of a dataset on the hub, or of a folder laid out as there; images stay the bytes that they are."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot load the dataset", where=name, got=str(error).splitlines()[0],
            fix="check name, subset and split, your network or HF_HOME cache, and access (`prefmill doctor`)",
        ) from error  # fmt: skip
    for number, values in enumerate(_with_bytes(rows)):
        yield SourceRow(f"{name}[{number}]", number, _given(dict(values)))


def _with_bytes(rows: Any) -> Any:
    """A dataset whose images stay the bytes that they are."""
    from datasets import Image, List

    # Decoded pictures would have to be encoded again: other bytes, another digest, and a fault in the file hidden.
    for key, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(key, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(key, List(Image(decode=False)))
    return rows


def _loads(data: str, where: str) -> Any:
    try:
        return json.loads(data, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError("not JSON", where=where, got=str(error), fix="correct or delete that line") from None
