"""Opening a file of text: unpacked and in UTF-8, whatever it is packed by, and each fault named."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from prefmill.core.errors import InputError

PACKED = ("", ".gz", ".zst", ".xz", ".bz2")
_OTHER_MAGIC = {  # by their first bytes, as such a file would be called bad UTF-8, line by line
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
    b"PAR1": ("Parquet", "give the file a name that ends in .parquet"),
    b"ARROW1": ("Arrow", "give the file a name that ends in .arrow"),
    b"version https://git-lfs": ("a pointer of Git LFS", "download the file that it stands for: git lfs pull"),
    b"\xd0\xcf\x11\xe0": ("a sheet of Excel's old kind", "save the sheet as CSV"),
    b"<?xml": ("XML", "save a sheet as CSV, and write a journal's reports as JSON lines"),
    b"<!doctype": ("a web page", "download the file itself, logged in where it asks for that"),
    b"<html": ("a web page", "download the file itself, logged in where it asks for that"),
    **dict.fromkeys((b"7z\xbc\xaf", b"Rar!"), ("an archive", "unpack it")),
    b"%PDF-": ("PDF", "give a table or lines of JSON"),
    b"SQLite format": ("a database", "export its table as CSV"),
    **dict.fromkeys((b"\x80\x04\x95", b"\x80\x05\x95"), ("a pickle", "save it as Parquet or JSON lines")),
    bytes(16): ("zeros, as a crash or a full disk leaves them", "copy or download it again"),
}
_WIDE = {  # by a byte order mark, or by the zeros beside each of the first characters
    "utf-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    "utf-32-le": re.compile(rb"(?:[\t-~]\0\0\0){2}"),
    "utf-32-be": re.compile(rb"(?:\0\0\0[\t-~]){2}"),
    "utf-16": re.compile(rb"\xff\xfe|\xfe\xff"),
    "utf-16-le": re.compile(rb"(?:[\t-~]\0){2}"),
    "utf-16-be": re.compile(rb"(?:\0[\t-~]){2}"),
}


def _zstd(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_UNPACK: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open), b"\xfd7zXZ": ("xz", lzma.open), b"BZh": ("bzip2", bz2.open),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}  # fmt: skip


@contextlib.contextmanager
def reading(path: Path) -> Iterator[tuple[IO[bytes], list[int]]]:
    """The open file, and a count of the lines read so far, kept by the caller, for the errors raised here."""
    lines_read, packing = [0], "packed"
    try:
        packing, unpack = _packing(path)
        with _open(path, unpack) as stream:
            yield stream, lines_read
    except EOFError:
        raise InputError(
            f"truncated {packing} file", where=f"{path}, after line {lines_read[0]}",
            expected="the whole file", fix="copy or download the file again and compare its size",
        ) from None  # fmt: skip
    except UnicodeDecodeError as error:
        raise InputError(
            f"invalid {error.encoding.upper()[:6]}", where=f"{path}, after line {lines_read[0]}", got=error.reason,
            fix="save the file as UTF-8",
        ) from None  # fmt: skip
    except FileNotFoundError:
        raise InputError(
            "no such file", where=path,
            fix="check the source's path in the configuration; what is on the web or the hub is downloaded first "
            "(`hf download NAME --repo-type dataset --local-dir FOLDER`)",
        ) from None  # fmt: skip
    except IsADirectoryError:
        raise InputError("a folder where a file is expected", where=path, fix="give the file's path") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the disk, not of the content
        raise InputError(
            f"damaged {packing} file", where=f"{path}, after line {lines_read[0]}", got=str(error),
            fix=f"copy or download the file again (`{packing} -t` checks it)",
        ) from None  # fmt: skip


def _packing(path: Path) -> tuple[str, Callable[[Path], Any]]:
    with path.open("rb") as stream:
        beginning = stream.read(8)
    plain = ("plain", partial(Path.open, mode="rb"))
    return next((found for magic, found in _UNPACK.items() if beginning.startswith(magic)), plain)


def _open(path: Path, unpack: Callable[[Path], Any]) -> IO[bytes]:
    stream = unpack(path)
    beginning = stream.peek(512)
    if found := _other_kind(beginning):
        stream.close()
        kind, fix = found
        raise InputError("a file of another kind", where=path, got=kind, expected="text, plain or packed", fix=fix)
    encoding = next((name for name, pattern in _WIDE.items() if pattern.match(beginning)), None)
    return cast("IO[bytes]", io.BufferedReader(_Recoded(stream, encoding)) if encoding else stream)


def _other_kind(beginning: bytes) -> tuple[str, str] | None:
    """What is no text, by its first bytes, and what to do with it."""
    if beginning.startswith(b"ustar", 257):  # behind the first file's name and dates
        return "a tar archive", "unpack it"
    text = beginning.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((found for magic, found in _OTHER_MAGIC.items() if text.startswith(magic.lower())), None)


class _Recoded(io.RawIOBase):
    """A stream of text in another encoding as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._text, self._left = io.TextIOWrapper(stream, encoding, newline=""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._left or self._text.read(len(buffer)).encode()
        self._left = data[len(buffer) :]
        buffer[: len(data)] = data[: len(buffer)]
        return min(len(data), len(buffer))

    def close(self) -> None:
        self._text.close()
        super().close()
