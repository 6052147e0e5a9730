"""Reading prompts and other tables: CSV with a header, TSV as PartiPrompts writes it, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import csv
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefmill.core.errors import InputError
from prefmill.core.image_rows import ImagePrompt
from prefmill.store.row_files import file_rows

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_SEP_LINE = re.compile(r'"?sep=(.)"?\s*')  # by which Excel is told the separator
_SLUG_LENGTH = 40
Names = Mapping[str, tuple[str, ...]]
"""Columns, and what other tools call them."""
Line = tuple[int, dict[str, str]]
# What web pages leave in copied text: spaces without width, soft hyphens, marks of a direction, byte order marks.
_UNSEEN = str.maketrans("", "", "\u200b\u2060\ufeff\u00ad\u200e\u200f")
_ROWS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
PROMPT_TOO = {"prompt": ("caption", "text")}  # as captioned pictures have it


def read_prompts(path: Path) -> list[ImagePrompt]:
    """The prompts of a table with a column `prompt` and, if it has one, `prompt_id`; sorted by id.

    Column names are read without case (PartiPrompts writes `Prompt`), other columns are left alone. Raises
    InputError naming the line of an empty prompt, an unsafe id, or an id or prompt that stands there twice.
    """
    seen: dict[str, int] = {}
    prompts = []
    if path.suffix.lower() not in (".csv", ".tsv", *_ROWS):
        raise InputError(
            "prompts are read from a table", where=path, got=path.suffix or "no suffix",
            expected=", ".join((".csv", ".tsv", *_ROWS)),
            fix="name it by its format; lines of prompts are a .tsv whose first line is `prompt`",
        )  # fmt: skip
    for number, row in read_table(path, ("prompt",), PROMPT_TOO):
        text = one_spelling(row.get("prompt") or "")
        if not text:
            raise _bad(path, number, "a prompt is empty", repr(row.get("prompt")), "write a prompt or delete the line")
        prompt_id = (row.get("prompt_id") or "").strip() or prompt_id_of(text)
        if not is_safe(prompt_id):
            raise _bad(path, number, "a prompt_id cannot be a file name", repr(prompt_id), "use letters, digits, - _ .")
        if prompt_id.lower() in seen:  # some file systems do not tell A from a
            got = f"{prompt_id}, first on line {seen[prompt_id.lower()]}"
            raise _bad(path, number, "a prompt stands here twice", got, "delete one, or give each a prompt_id")
        seen[prompt_id.lower()] = number
        prompts.append(ImagePrompt(prompt_id=prompt_id, prompt=text))
    if not prompts:
        raise InputError("no prompt in the file", where=path, fix="write a line with `prompt`, then a prompt a line")
    return sorted(prompts, key=lambda prompt: prompt["prompt_id"])


def prompt_id_of(text: str) -> str:
    """A readable id that follows from the prompt alone, so that adding prompts changes no other's images."""
    slug = _NOT_WORD.sub("-", text.lower()).strip("-")[:_SLUG_LENGTH].rstrip("-")
    # Of the whole text: two prompts may share their first 40 characters.
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{slug}-{digest}" if slug else f"prompt-{digest}"


def one_spelling(text: str) -> str:
    """A prompt with single spaces, accents as one sign (macOS writes them as two) and no signs that show nothing.

    Ids and splits follow from it. What joins emoji, and letters in Persian or Hindi, stays.
    """
    return unicodedata.normalize("NFC", " ".join(text.translate(_UNSEEN).split()))


def with_slashes(file: str) -> str:
    """A file's name as it is read here, of a table that was written on Windows too."""
    return file.replace("\\", "/")


def is_safe(name: str) -> bool:
    """Whether `name` can be one file's or folder's name on any disk and in any archive."""
    return _SAFE.fullmatch(name) is not None and not name.endswith(".") and ".." not in name


def safe_name(name: str) -> str:
    """`name`, or an id made of it where it is no safe one: files may have spaces and accents."""
    return name if is_safe(name) else prompt_id_of(name)


def read_table(path: Path, required: tuple[str, ...], also: Names = MappingProxyType({})) -> Iterator[Line]:
    """Line number and fields of every row of a table, names in lower case, lines without any text left out.

    It is a .csv or .tsv, or rows of JSON, Parquet or Arrow. A .csv whose first line has semicolons or tabs and no
    comma, as Excel writes it in many countries, is read by those, or by what a line `sep=;` before it says; a byte
    order mark tells UTF-16. Columns that a table lacks may be named as `also` says. Raises InputError when it cannot be
    read, lacks a `required` column, has one twice, or has a line with more or fewer cells than the first: an unquoted
    comma or line break would cut a prompt.
    """
    if path.suffix.lower() in _ROWS:
        yield from _cells(path, required, also)
        return
    try:
        with path.open(encoding=_encoding(path), newline="") as stream:
            first = stream.readline()
            told = _SEP_LINE.fullmatch(first)
            if not told:
                stream.seek(0)
            above = 1 if told else 0
            reader = csv.reader(stream, **_form(path, told[1] if told else first))
            header = _named(next(reader, []), required, also, f"{path}:{above + 1}")
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise InputError("a column stands there twice", where=f"{path}:{above + 1}", got=", ".join(header),
                                 fix="name every column once")  # fmt: skip
            for row in reader:
                if any(cell.strip() for cell in row):
                    line = above + reader.line_num
                    _require_columns(row, header, f"{path}:{line}")
                    yield line, dict(zip(header, row, strict=False))
    except FileNotFoundError:
        raise InputError("no such file", where=path, fix="check the path") from None
    except OSError as error:  # a folder, or a file of somebody else
        raise InputError(
            "cannot read the table", where=path, got=error.strerror, fix="give a .csv or .tsv file that you may read"
        ) from None
    except UnicodeError as error:
        fix = "save it as UTF-8; in Excel as `CSV UTF-8`"
        raise InputError("cannot read the table", where=path, got=str(error), fix=fix) from None
    except csv.Error as error:
        fix = "look for a quote that is not closed: quotes within a cell are doubled"
        raise InputError("cannot read the table", where=path, got=str(error), fix=fix) from None


def _cells(path: Path, required: tuple[str, ...], also: Names) -> Iterator[Line]:
    """Rows of JSON or Parquet as a table's: every cell as text, empty where it is a list, an object or null."""
    for row in file_rows(path):
        header = _named(row.values, required, also, row.where)
        cells = (str(cell) if isinstance(cell, str | int | float) else "" for cell in row.values.values())
        yield int(row.where.rpartition(":")[2].removeprefix("row ")), dict(zip(header, cells, strict=True))


def _named(names: Iterable[str], required: tuple[str, ...], also: Names, where: str) -> list[str]:
    """Column names in lower case, ours for another tool's where there is one; raises InputError for one missing."""
    header = [name.strip().lower().replace(" ", "_") for name in names]
    for ours, theirs in also.items():
        found = [place for place, name in enumerate(header) if name in theirs]
        if ours not in header and len(found) == 1:
            header[found[0]] = ours
    if missing := [name for name in required if name not in header]:
        raise InputError(
            f"no column {', '.join(missing)}", where=where, got=", ".join(header) or "an empty file",
            expected=", ".join(required), fix="name the columns on the first line, with commas between them",
        )  # fmt: skip
    return header


def _encoding(path: Path) -> str:
    with path.open("rb") as stream:
        marked = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # utf-8-sig: Excel puts a byte order mark in front, which would be part of the first column's name.
    return "utf-16" if marked else "utf-8-sig"


def _form(path: Path, first: str) -> dict[str, Any]:
    """csv's settings for a table with this first line."""
    # PartiPrompts does not quote: a prompt that begins with a quotation mark would swallow the lines after it.
    if path.suffix.lower() == ".tsv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    return {"delimiter": next((mark for mark in ",;\t" if mark in first), ","), "strict": True}


def _require_columns(row: list[str], header: list[str], where: str) -> None:
    surplus = any(cell.strip() for cell in row[len(header) :])
    if surplus or len(row) < len(header):
        raise InputError(
            f"a line has {'more' if surplus else 'fewer'} cells than the first line has columns", where=where,
            got=", ".join(row), expected=f"{len(header)}: {', '.join(header)}",
            fix='write a cell that holds a comma or a line break in double quotes, "like, this", or save the table as '
            ".tsv; fill a short line up",
        )  # fmt: skip


def _bad(path: Path, line: int, what: str, got: str, fix: str) -> InputError:
    return InputError(what, where=f"{path}:{line}", got=got, fix=fix)
