"""Rows of data files in common formats and of hub datasets, each with where it stands."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prefmill.core.errors import InputError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv")


class SourceRow(NamedTuple):
    """A row and where it stands: file and line, or dataset and row number."""

    where: str
    number: int
    values: dict[str, Any]


def file_rows(path: Path) -> Iterator[SourceRow]:
    """The rows of a .jsonl, .json, .jsonl.gz, .parquet or .csv file; raises InputError where it is not readable."""
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            "this kind of file is not known", where=path, expected=", ".join(SUFFIXES),
            fix="convert it, or name it by what it holds",
        )  # fmt: skip
    if not path.is_file():
        raise InputError("no such file", where=path, fix="check the path; a hub dataset is given as name")
    read = {".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}.get(path.suffix, _jsonl_rows)
    for number, (place, values) in enumerate(read(path)):
        if not isinstance(values, dict):
            raise InputError(
                "a row is an object with keys", where=f"{path}:{place}", got=type(values).__name__,
                fix="correct or delete that row",
            )  # fmt: skip
        yield SourceRow(f"{path}:{place}", number, values)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield str(number), _loads(line, f"{path}:{number}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _loads(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise InputError("a .json file holds one list of rows", where=path, fix="name it .jsonl if it has one a line")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            yield str(reader.line_num), row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    number = 0
    for batch in parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


def hub_rows(name: str, subset: str | None, split: str, revision: str | None) -> Iterator[SourceRow]:
    """The rows of a dataset on the hub, or of a folder laid out as there; images stay the bytes that they are."""
    from datasets import Image, List, load_dataset

    try:
        rows = load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot load the dataset", where=name, got=str(error).splitlines()[0],
            fix="check name, subset and split, your network or HF_HOME cache, and access (`prefmill doctor`)",
        ) from error  # fmt: skip
    for key, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(key, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(key, List(Image(decode=False)))
    for number, values in enumerate(rows):
        yield SourceRow(f"{name}[{number}]", number, dict(values))


def _loads(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise InputError("not JSON", where=where, got=str(error), fix="correct or delete that line") from None
