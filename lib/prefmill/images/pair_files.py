"""Rows of preference files (lines, tables, Parquet, folders of datasets), and the pictures they name or hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefmill.core.errors import InputError
from prefmill.images.prompts import read_table, with_slashes
from prefmill.store.jsonl import parse_json, read_jsonl
from prefmill.store.pictures import on_disk
from prefmill.store.row_files import file_rows, is_saved_to_disk


def data_files(path: Path) -> list[Path]:
    """`path` itself, or the .parquet and .jsonl files of a folder; what `save_to_disk` wrote is a file for every split.

    All splits are read, as all files of a folder are: pairs are split anew, by prompt.
    """
    if (splits := path / "dataset_dict.json").is_file():
        return [path / name for name in parse_json(splits.read_bytes())["splits"]]
    if not path.is_dir() or is_saved_to_disk(path):
        return [path]
    # Sorted: file systems list a folder in different orders, and the order decides which of two ratings is first.
    files = sorted(item for item in path.rglob("*") if item.suffix.lower() in (".parquet", ".jsonl"))
    if not files:
        others = sorted({item.suffix for item in path.rglob("*") if item.is_file()})
        raise InputError(
            "no .parquet or .jsonl file in the folder", where=path, got=", ".join(others) or "no file",
            fix="give the folder that holds them, or a file: a .json, .csv or .tsv; archives of webdataset become rows "
            "by datasets.load_dataset('webdataset', data_files='FOLDER/*.tar', split='train').to_parquet('FILE')",
        )  # fmt: skip
    return files


def rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each row of a file stands, and the row."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":  # a line that is no object is for the caller to set aside
        found = ((f"{number}", row) for number, row in enumerate(read_jsonl(file), 1))
    elif suffix in (".csv", ".tsv"):
        found = ((f"{number}", row) for number, row in read_table(file, ()))
    else:
        found = ((row.where.removeprefix(f"{file}:"), row.values) for row in file_rows(file))
    yield from ((f"{file.name}:{place}", row) for place, row in found)


def picture_bytes(content: Any) -> bytes | None:
    """The bytes that a row gives as a picture, or in `datasets`' {bytes, path}; None where it gives none."""
    found = content.get("bytes") if isinstance(content, dict) else content
    return found if isinstance(found, bytes) else None


def picture_path(content: Any) -> str | None:
    """The file that a row names as a picture, or in `datasets`' {bytes, path}; None where it names none."""
    found = content.get("path") if isinstance(content, dict) else content
    return with_slashes(found) if found and isinstance(found, str) else None


def stored(content: Any, base: Path, target: Path) -> Path:
    """Where the picture of a row lies: below `base` where it is named, written to `target` where it is given."""
    data = picture_bytes(content)
    if data is None:
        return on_disk(base, str(picture_path(content)))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def content_name(data: bytes) -> str:
    """A name for a picture that has none."""
    return hashlib.sha256(data).hexdigest()[:16]
