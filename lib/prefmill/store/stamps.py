"""Which payload files were seen with which content: a file is hashed again only when it is not the one it was.

`.verified.json` in an artifact's folder holds each file's inode, size, times and digest. It is no part of the payload.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact, FileEntry
from prefmill.core.errors import ArtifactError
from prefmill.core.files import digest_path, read_record, write_record

STAMPS = ".verified.json"
_MODIFIED = 2  # the place of a file's time of modification in its stamp
Stamp = list[Any]  # inode, bytes, modified, changed (both in nanoseconds), sha256


def stamp(folder: Path, files: Iterable[FileEntry]) -> None:
    """Note that these files have the content their entries say; a folder that takes no note is left without."""
    stamps = _read(folder) | {entry.path: [*_facts(folder / entry.path), entry.sha256] for entry in files}
    with suppress(OSError):  # another's artifact, a full disk: it is hashed again next time
        write_record(folder / STAMPS, stamps)


def check_content(artifact: Artifact, only_touched: bool = False) -> None:
    """Hash what is not stamped as it is now; raises ArtifactError where a file is not what its manifest says.

    With `only_touched` only files written to since they were stamped are hashed: looking at a plan costs no reading.
    """
    stamps = _read(artifact.path)
    doubtful = [entry for entry in artifact.manifest.files if _is_doubtful(artifact, entry, stamps, only_touched)]
    _hash(artifact, doubtful)
    if doubtful:
        stamp(artifact.path, doubtful)


def verify(artifact: Artifact) -> None:
    """Hash every payload file again; raises ArtifactError on the first that differs from the manifest."""
    # Stamps are not asked: a disk that changes bits by itself leaves inode and times as they were.
    _hash(artifact, artifact.manifest.files)


def _hash(artifact: Artifact, entries: Iterable[FileEntry]) -> None:
    for entry, found in ((entry, digest_path(artifact.path / entry.path)) for entry in entries):
        if found != entry.sha256:
            made = artifact.manifest.key
            raise ArtifactError(
                "artifact's content has changed since it was made", where=artifact.path / entry.path,
                got=f"sha256 {found}", expected=entry.sha256,
                fix=f"make it again: `prefmill run PIPELINE --only {made} --force`, or `prefmill rerun {made}`",
            )  # fmt: skip


def _is_doubtful(artifact: Artifact, entry: FileEntry, stamps: dict[str, Stamp], only_touched: bool) -> bool:
    """Whether a file may not be what its entry says, by its stamp."""
    known = stamps.get(entry.path)
    if known is None or known[-1] != entry.sha256:
        # Not hashed yet: a plan lets it pass, the task that reads it does not.
        return not only_touched
    now = _facts(artifact.path / entry.path)
    return now[_MODIFIED] != known[_MODIFIED] if only_touched else now != known[:-1]


def _facts(path: Path) -> list[int]:
    """The time of change is among them, as no program can set it back."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(folder: Path) -> dict[str, Stamp]:
    try:
        return read_record(folder / STAMPS)
    except OSError:
        return {}
