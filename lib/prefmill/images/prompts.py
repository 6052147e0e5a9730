"""Reading prompts and other tables: CSV with a header, TSV as PartiPrompts writes it, JSON lines, Parquet."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from prefmill.core.errors import InputError
from prefmill.core.image_rows import ImagePrompt
from prefmill.images.annotation_rows import single_answers
from prefmill.store.opened import reading
from prefmill.store.row_files import SUFFIXES, file_rows

_log = logging.getLogger(__name__)
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_SLUG_LENGTH = 40
Names = Mapping[str, tuple[str, ...]]
"""Columns, and what other tools call them."""
Line = tuple[int, dict[str, str]]
# What web pages leave in copied text: spaces without width, soft hyphens, marks of a direction, byte order marks; and
# signs of control, as databases fill text up with and DOS ends it. Those that part words are spaces.
_CONTROL = "".join(chr(code) for code in range(128) if not (chr(code).isprintable() or chr(code).isspace()))
_UNSEEN = str.maketrans("", "", _CONTROL + "\u200b\u2060\ufeff\u00ad\u200e\u200f")
# Of A1111, ComfyUI, sd-scripts' lists of samples, where `#` begins a remark, Midjourney and lists of random words.
_MARKS = re.compile(
    r"\([^()]+:\s*\d*\.?\d+\s*\)|\bBREAK\b|<(?:lora|lyco|hypernet):|\bembedding:|^#|(?:^|\s)--[a-z]+\b"
    r"|\{[^{}]*\|[^{}]*\}|\b__\w+__\b"
)
_QUOTED = re.compile(r'"((?:[^"]|"")*""(?:[^"]|"")*)"')  # a cell whose quotes are doubled, as pandas writes it
CAPTIONS = (".txt", ".caption")
PROMPT_TOO = {"prompt": ("caption", "text")}  # as captioned pictures have it


def read_prompts(path: Path) -> list[ImagePrompt]:
    """The prompts of a table with a column `prompt` and, if it has one, `prompt_id`; sorted by id.

    A .txt has one on each line, a folder one in each file of captions.

    Column names are read without case (PartiPrompts writes `Prompt`), other columns are left alone. Raises
    InputError naming the line of an empty prompt, an unsafe id, or an id or prompt that stands there twice.
    """
    seen: dict[str, int] = {}
    prompts = []
    for number, row in _prompt_rows(path):
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
    for warning in foreign_marks(row["prompt"] for row in prompts):
        _log.warning("%s: %s", path, warning)
    if not prompts:
        raise InputError("no prompt in the file", where=path, fix="write a line with `prompt`, then a prompt a line")
    return sorted(prompts, key=lambda prompt: prompt["prompt_id"])


def foreign_marks(prompts: Iterable[str]) -> list[str]:
    """The line that says so where prompts have marks by which other programs weigh words or load adapters."""
    found = sorted(prompt for prompt in prompts if _MARKS.search(prompt))
    told = "marks of another program, as (word:1.3), --w 768, {a|b} or <lora:name:1>, which are read as words here"
    return [f"{len(found)} prompts have {told}, such as: {found[0]}"] if found else []


def _prompt_rows(path: Path) -> Iterator[Line]:
    if path.is_dir():
        # Pictures may share a caption: it is one prompt.
        texts = sorted({one_spelling(text) for text in read_captions(path).values()})
        yield from ((number, {"prompt": text}) for number, text in enumerate(texts, 1))
    elif path.suffix.lower() == ".txt":
        lines = enumerate(_read_text(path).split("\n"), 1)
        yield from ((number, {"prompt": line}) for number, line in lines if line.strip())
    elif path.name.lower().endswith(SUFFIXES):
        yield from read_table(path, ("prompt",), PROMPT_TOO)
    else:
        raise InputError(
            "prompts are read from a table", where=path, got=path.suffix or "no suffix",
            expected=", ".join((".txt", *SUFFIXES)),
            fix="name it by its format; one prompt a line is a .txt",
        )  # fmt: skip


def read_captions(folder: Path, pictures: Iterable[Path] | None = None) -> dict[Path, str]:
    """The first line of each file of captions below `folder`, by its path without suffix; what is passed over is told.

    Of a .txt and a .caption of one name it is the .txt's. With `pictures` only theirs are read.
    """
    wanted = None if pictures is None else {path.with_suffix("") for path in pictures}
    # Hidden files are none: macOS leaves a `._a.txt` beside an a.txt.
    files = [path for path in folder.rglob("[!.]*") if path.suffix.lower() in CAPTIONS]
    found, passed = dict[Path, str](), list[Path]()
    for file in sorted(files, key=lambda path: (path.suffix.lower() == ".caption", path)):
        if wanted is None or file.with_suffix("") in wanted:
            first, _, more = _read_text(file).strip().partition("\n")
            if not first:
                raise InputError("an empty caption", where=file, fix="write it, or move the picture out of the folder")
            if found.setdefault(file.with_suffix(""), first) != first or more:
                passed.append(file)
    if passed:
        told = "%s: of %d captions not all is read, such as %s: the first line counts, and a .txt before a .caption"
        _log.warning(told, folder, len(passed), passed[0].name)
    return found


def _read_text(file: Path) -> str:
    with reading(file) as (stream, _):
        data = stream.read()
    try:
        return "\n".join(data.decode("utf-8-sig").replace("\r\n", "\n").split("\r"))
    except UnicodeDecodeError as error:
        raise InputError("cannot read the text", where=file, got=str(error), fix="save it as UTF-8") from None


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
    """Line number and fields of every row of a table, names in lower case, every cell as text.

    It is a .csv or .tsv, or rows of JSON, Parquet or Arrow; lists, objects and nulls are empty cells. Columns that a
    table lacks may be named as `also` says. Raises InputError when it cannot be read, lacks a `required` column or has
    one twice.
    """
    # PartiPrompts does not quote: a prompt that begins with a quotation mark would swallow the lines after it.
    is_tsv = ".tsv" in path.name.lower()
    for row in file_rows(path, quoted=not is_tsv):
        for values in single_answers(row.values):
            cells = (str(cell) if isinstance(cell, str | int | float) else "" for cell in values.values())
            plain = map(_unquoted, cells) if is_tsv else cells
            header = _named(values, required, also, row.where)
            yield int(row.where.rpartition(":")[2].removeprefix("row ")), dict(zip(header, plain, strict=True))


def _unquoted(cell: str) -> str:
    return found[1].replace('""', '"') if (found := _QUOTED.fullmatch(cell)) else cell


def _named(names: Iterable[str], required: tuple[str, ...], also: Names, where: str) -> list[str]:
    """Column names in lower case, ours for another tool's where there is one; raises InputError for one missing."""
    header = [name.strip().lower().replace(" ", "_") for name in names]
    for ours, theirs in also.items():
        found = [place for place, name in enumerate(header) if name in theirs]
        if ours not in header and len(found) == 1:
            header[found[0]] = ours
    if missing := [name for name in required if name not in header]:
        raise InputError(
            f"no column {', '.join(missing)}", where=where, got=", ".join(header), expected=", ".join(required),
            fix="name the columns on the first line, with commas between them",
        )  # fmt: skip
    if len(set(header)) < len(header):
        raise InputError(
            "a column stands there twice", where=where, got=", ".join(header), fix="name every column once"
        )
    return header


def _bad(path: Path, line: int, what: str, got: str, fix: str) -> InputError:
    return InputError(what, where=f"{path}:{line}", got=got, fix=fix)
