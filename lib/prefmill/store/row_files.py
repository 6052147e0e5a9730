"""Rows of data files in common formats and of hub datasets, each with where it stands."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

from prefmill.core.errors import InputError
from prefmill.store.jsonl import unique_keys

_LINES, _PACKED = (".jsonl", ".ndjson", ".json", ".csv"), {".gz": "gzip", ".zst": "zstd"}
TABLES = (".parquet", ".arrow")
SUFFIXES = (*_LINES, *(suffix + packed for suffix in _LINES for packed in _PACKED), *TABLES)
_LONGEST_CELL = 1 << 27  # characters; csv refuses papers otherwise


class SourceRow(NamedTuple):
    """A row and where it stands: file and line, or dataset and row number."""

    where: str
    number: int
    values: dict[str, Any]


def file_rows(path: Path, encoding: str = "utf-8", split: str = "train") -> Iterator[SourceRow]:
    """The rows of a file that ends in one of SUFFIXES, or of a folder that datasets' `save_to_disk` wrote.

    Text is `encoding`, a byte order mark is no text; of a folder with several splits `split` is read. Raises InputError
    where it is not readable.
    """
    for number, (place, values) in enumerate(_readable(path, encoding, split)):
        if not isinstance(values, dict):
            raise InputError(
                "a row is an object with keys", where=f"{path}:{place}", got=type(values).__name__,
                fix="correct or delete that row; a file that is one list is named .json",
            )  # fmt: skip
        yield SourceRow(f"{path}:{place}", number, values)


def _readable(path: Path, encoding: str, split: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException

    try:
        yield from _rows_of(path, encoding, split)
    except (OSError, ArrowException, csv.Error) as error:
        raise InputError(
            "cannot read the file", where=path, got=str(error), fix="download or write it again; in a table, look for "
            "a quote that is not closed: quotes within a cell are doubled",
        ) from None  # fmt: skip


def is_saved_to_disk(path: Path) -> bool:
    """Whether `path` is a folder that datasets' `save_to_disk` wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _rows_of(path: Path, encoding: str, split: str) -> Iterator[tuple[str, Any]]:
    if is_saved_to_disk(path):
        return _saved_rows(path, split)
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            "this kind of file is not known", where=path, expected=", ".join(SUFFIXES),
            fix="convert it, or name it by its format",
        )  # fmt: skip
    if not path.is_file():
        raise InputError("no such file", where=path, fix="check the path; a hub dataset is given as name")
    read = {".parquet": _parquet_rows, ".arrow": _arrow_rows}.get(path.suffix)
    return read(path) if read else _text_rows(path, encoding)


def _text_rows(path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    """Rows of lines, one list or a table, unpacked and decoded on the way."""
    import pyarrow

    kind = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    read = {".json": _json_rows, ".csv": _csv_rows}.get(kind, _jsonl_rows)
    # A byte order mark is how Excel marks UTF-8; as text it would stand in the first column's name.
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    with pyarrow.input_stream(str(path), compression=_PACKED.get(path.suffix)) as stream:
        # csv wants line ends as they are: a quoted cell may hold some.
        text = io.TextIOWrapper(io.BufferedReader(stream), encoding=name, newline="")
        try:
            yield from read(text, path)
        except UnicodeDecodeError as error:
            raise InputError(
                f"not {encoding} text", where=path, got=str(error), expected=f"text in {encoding}",
                fix="name the encoding it is in, such as encoding=latin-1",
            ) from None  # fmt: skip


def _jsonl_rows(text: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, 1):
        if line.strip():
            yield str(number), _loads(line, f"{path}:{number}")


def _json_rows(text: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of one list, or one a line, as the hub's files of this name mostly are."""
    whole = text.read()
    if not whole.lstrip().startswith("["):
        yield from _jsonl_rows(io.StringIO(whole), path)
        return
    yield from ((f"row {number}", row) for number, row in enumerate(_loads(whole, str(path)), 1))


def _csv_rows(text: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    # The limit is that of the process, not of this reader, and is set back for whoever reads csv beside us.
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.DictReader(text, strict=True)
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise InputError(
                "a column stands there twice", where=f"{path}:1", got=", ".join(header), fix="name every column once"
            )
        for row in reader:
            cells = [cell for cell in row.values() if cell is not None]
            if None in row or len(cells) < len(header):
                raise InputError(
                    f"a row has {'more' if None in row else 'fewer'} cells than the table has columns",
                    where=f"{path}:{reader.line_num}", got=str(cells)[:200], expected=f"{len(header)} cells",
                    fix="put quotes around a cell with a comma or a line break, and fill the row up with commas",
                )  # fmt: skip
            yield str(reader.line_num), row
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    yield from _batched(parquet.ParquetFile(path).iter_batches())


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
        # One batch at a time: all rows at once would hold every picture of the file in memory.
        for row in batch.to_pylist():
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
