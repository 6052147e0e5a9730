"""Files written whole or not at all, rows appended to a log, and digests of content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from prefmill.core.errors import InputError, PipelineError
from prefmill.core.places import CHECKPOINT_PREFIX

T = TypeVar("T")
_BUFFER_BYTES = 1 << 20
_SURELY_ANOTHER_STEP_NS = 3_000_000_000
_known_digests: dict[tuple[object, ...], str] = {}


def digest_bytes(data: bytes) -> str:
    """sha256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of `value` as canonical JSON (sorted keys, no spaces)."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_path(path: Path, digest: Callable[[Path], str] = digest_file) -> str:
    """sha256 of a file's bytes, or of a folder's relative names and file digests; raises InputError if absent."""
    try:
        if path.is_dir():
            # Sorted, as file systems list names in any order.
            files = sorted(item for item in path.rglob("*") if item.is_file())
            return digest_json([[item.relative_to(path).as_posix(), digest(item)] for item in files])
        return digest(path)
    except FileNotFoundError as error:
        where = error.filename or path
        raise InputError("no such file or folder", where=where, fix="check the path in the configuration") from None


def known_digest(path: Path) -> str:
    """`digest_path`, where what this process has read and nobody has written to since is not read again.

    Every element of an array is judged by the same files, more than once, and they may be pictures of hundreds of GB.
    """
    return digest_path(path, _digest_unless_known)


def _digest_unless_known(path: Path) -> str:
    status = path.stat()
    # The time of change is among them, as no program can set it back.
    facts = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if (known := _known_digests.get(facts)) is not None:
        return known
    digest = digest_file(path)
    # Clocks of file systems go by steps of some ms, or 2 s: another write in the same step would not be seen.
    if time.time_ns() - status.st_ctime_ns > _SURELY_ANOTHER_STEP_NS:
        _known_digests[facts] = digest
    return digest


def sample_digest(folder: Path, suffixes: tuple[str, ...]) -> str:
    """sha256 of the files with these suffixes by name, size and 16 blocks of each: other weights differ in any of them.

    Times are left out: what a job copies to its node's own disk is the same model. So are checkpoints to resume from,
    which `prefmill gc` deletes.
    """
    found: list[Any] = []
    names = (item for item in folder.rglob("[!.]*") if item.suffix in suffixes and item.is_file())
    for path in sorted(item for item in names if CHECKPOINT_PREFIX not in str(item.parent.relative_to(folder))):
        size = path.stat().st_size
        with path.open("rb") as stream:
            blocks = [os.pread(stream.fileno(), 1 << 16, size * part // 16) for part in range(16)]
        found.append([path.relative_to(folder).as_posix(), size, digest_bytes(b"".join(blocks))])
    return digest_json(found)


def unique_suffix() -> str:
    """A part of file names that no other writer has: two nodes, or containers, have processes of the same number."""
    return f".{secrets.token_hex(4)}"


def write_atomic(path: Path, text: str, mode: int = 0o666) -> None:
    """Write `text` to `path` by `replacing`; other threads, processes and nodes may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, unique_suffix(), mode) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write JSON that people may read too; `options` are those of `json.dumps`."""
    write_atomic(path, json.dumps(content, indent=1, **options) + "\n")


def write_record(path: Path, record: Any) -> None:
    """Write what a program reads back, as by `read_record`."""
    write_atomic(path, json.dumps(record))


@contextlib.contextmanager
def replacing(path: Path, writer: str = "", mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A file to write, which takes `path`'s place when the block ends without an error.

    A reader, or a power cut, sees the old file or the new one, never a part. `writer` tells those apart that may write
    at once. `mode` is that of a new file, less the umask; nobody whom it leaves out can read it at any moment.
    """
    partial = path.with_name(f".{path.name}{writer}.partial")
    partial.unlink(missing_ok=True)  # a killed process may have left it, with another mode
    try:
        opened = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with _naming(path), os.fdopen(opened, "wb", _BUFFER_BYTES) as stream:
            yield stream
            # Synced before the rename: after a power cut the name could otherwise stand for an empty file.
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    # The new name is in the folder, which has to reach the disk as well.
    sync_folder(path.parent)


def open_as_umask_says(path: Path) -> None:
    """Give a file the mode of any new one; safetensors makes its files for their owner alone, whatever the umask."""
    umask = os.umask(0o077)  # asked by setting it: what another thread makes in between is closed, never open
    os.umask(umask)
    mode = path.stat().st_mode
    if wanted := 0o666 & ~umask & ~mode:
        with contextlib.suppress(PermissionError):  # a link to a file of another user's
            path.chmod(mode | wanted)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the disk refuses to a descriptor names no file: name this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        with _naming(folder):
            os.fsync(directory)
    finally:
        os.close(directory)


def copy_once(source: Path, target: Path, may_link: bool) -> None:
    """Have the content of `source` at `target`: by a hard link where that may be and the disk has them, else a copy."""
    # What is there is whole: it comes by link or by rename, never by writing in place.
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if may_link:
        with contextlib.suppress(OSError):  # another disk, or one without hard links
            os.link(source, target)
            return
    with source.open("rb") as given, replacing(target) as stream:
        shutil.copyfileobj(given, stream, _BUFFER_BYTES)


def read_record(path: Path, **keys: type) -> dict[str, Any]:
    """The JSON object in a file that is written whole; empty where there is none that can be read and has `keys`."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) and not lacking(record, keys) else {}


def append_row(path: Path, *rows: Mapping[str, Any]) -> None:
    """Append rows and have them on disk before going on, so that a kill loses none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), path.open("a+b") as stream:
        # After a line that a crash or a full disk cut off: these must not become a part of it.
        torn = stream.tell() > 0 and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n"
        stream.write(b"\n" * torn + b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        stream.flush()
        os.fsync(stream.fileno())


def read_appended(path: Path, **keys: type) -> list[dict[str, Any]]:
    """The rows of a file that `append_row` adds to, oldest first; a line torn by a crash is left out.

    Raises PipelineError naming a whole line in which one of the `keys` is missing or of another type.
    """
    rows = list(appended(path))
    for where, row in rows:
        if lacks := lacking(row, keys):
            raise PipelineError(
                "a line of a record is damaged, or of another version", where=where, got=str(row)[:200],
                expected=lacks, fix="delete that line",
            )  # fmt: skip
    return [row for _, row in rows]


def lacking(row: Any, keys: Mapping[str, type]) -> str:
    """The first of `keys` that is missing or of another type in an object that was read back; "" where none is."""
    held = row if isinstance(row, dict) else {}
    return next(
        (f"the key {key} ({kind.__name__})" for key, kind in keys.items() if not isinstance(held.get(key), kind)), ""
    )


def appended(path: Path) -> Iterator[tuple[str, Any]]:
    """Of each whole line of such a file its place and its content."""
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
        with contextlib.suppress(ValueError):
            yield f"{path}:{number}", json.loads(line)


def as_form(values: Any, form: type[T], where: object, fix: str) -> T:
    """What was read back, as a dataclass; raises PipelineError where a key is missing, foreign or of another type.

    A foreign one may be of a later version, and change what the others mean.
    """
    import msgspec  # not above: commands that answer at once read few records

    try:
        made = msgspec.convert(values, form, dec_hook=lambda kind, value: kind(value))
        if foreign := ", ".join(key for key in values if key not in vars(made)):
            raise ValueError(f"a foreign key: {foreign}")
    except (ValueError, TypeError) as error:
        raise PipelineError(
            "a record is damaged, or of another version", where=where, got=str(error), fix=fix
        ) from None
    return made
