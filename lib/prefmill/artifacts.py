"""Artifacts: a folder whose `manifest.json`, written last and by rename, makes it done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from prefmill.errors import ArtifactError, InputError

MANIFEST = "manifest.json"
RUN_RECORD = "run.json"
WORK = "work"  # a task's own scratch: partial output to resume from, never published
CHECKPOINT_PREFIX = "checkpoint-"  # the trainer's own, for resuming

SCHEMA_VERSIONS: dict[str, int] = {}  # of the kinds whose files have changed form; every kind starts at 1
_CHUNK_BYTES = 1 << 20


class FileEntry(BaseModel):
    """One payload file: path below the artifact, size, rows (text lines of .jsonl and .csv), sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    bytes: int
    rows: int | None
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, what made it and from what."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    schema_version: int
    stage: str
    task: str
    fingerprint: str
    identity: dict[str, Any]
    config: dict[str, Any]
    code_version: str
    inputs: dict[str, list[str]]
    files: list[FileEntry]
    metrics: dict[str, Any]
    content_digest: str


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of payload file `name`; raises ArtifactError when the manifest does not list it."""
        if not any(entry.path == name for entry in self.manifest.files):
            raise ArtifactError(
                f"the artifact holds no file '{name}'", where=self.path,
                got=", ".join(entry.path for entry in self.manifest.files[:10]),
                fix="make it again with this version of prefmill: rerun its stage with --force",
            )  # fmt: skip
        return self.path / name


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from; `identity` is what its fingerprint was computed over."""

    stage: str
    task: str
    fingerprint: str
    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    code_version: str
    inputs: Mapping[str, list[str]]


def digest_bytes(data: bytes) -> str:
    """sha256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of `value` as canonical JSON (sorted keys, no spaces)."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def digest_path(path: Path) -> str:
    """sha256 of a file's bytes, or of a folder's relative names and file digests; raises InputError if absent."""
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return digest_json([[item.relative_to(path).as_posix(), digest_path(item)] for item in files])
    try:
        return _entry(path, path.parent).sha256
    except FileNotFoundError:
        raise InputError("no such file or folder", where=path, fix="check the path in the configuration") from None


def publish(folder: Path, kind: str, provenance: Provenance, metrics: Mapping[str, Any]) -> Artifact:
    """Make `folder` an artifact of `kind`: hash its payload, then write the manifest by rename.

    Raises ArtifactError when there is no payload or a pickle in it: an empty output is never taken for done.
    """
    files = [_entry(path, folder) for path in payload(folder)]
    if not files:
        raise ArtifactError("the stage wrote nothing", where=folder, fix="this is a bug in the stage: report it")
    schema_version = SCHEMA_VERSIONS.get(kind, 1)
    content = {"kind": kind, "schema_version": schema_version, "files": sorted([e.path, e.sha256] for e in files)}
    manifest = Manifest(
        kind=kind,
        schema_version=schema_version,
        stage=provenance.stage,
        task=provenance.task,
        fingerprint=provenance.fingerprint,
        identity=dict(provenance.identity),
        config=dict(provenance.config),
        code_version=provenance.code_version,
        inputs=dict(provenance.inputs),
        files=files,
        metrics=dict(metrics),
        content_digest=digest_json(content),
    )
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return Artifact(folder, manifest)


def read(folder: Path, kind: str | None = None) -> Artifact:
    """The finished artifact in `folder`; raises ArtifactError if it is missing, torn or not of `kind`.

    Sizes of the payload files are checked here, their digests by `verify`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(
            "no finished artifact here", where=folder, expected=f"a {MANIFEST}",
            fix="run the stage that makes it; an interrupted one resumes where it stopped",
        )  # fmt: skip
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            "wrong kind of artifact", where=folder, got=manifest.kind, expected=kind,
            fix="point this input at the output of a stage that writes that kind",
        )  # fmt: skip
    if manifest.schema_version != SCHEMA_VERSIONS.get(manifest.kind, 1):
        raise ArtifactError(
            "artifact written by another version of prefmill", where=folder,
            got=f"{manifest.kind} schema {manifest.schema_version}",
            expected=f"schema {SCHEMA_VERSIONS.get(manifest.kind, 1)}", fix="rerun its stage with --force",
        )  # fmt: skip
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise ArtifactError(
                "artifact is damaged", where=path, got=f"{path.stat().st_size} bytes" if path.is_file() else "no file",
                expected=f"{entry.bytes} bytes", fix=f"rerun stage {manifest.stage} with --force",
            )  # fmt: skip
    return Artifact(folder, manifest)


def verify(artifact: Artifact) -> None:
    """Hash every payload file again; raises ArtifactError on the first that differs from the manifest."""
    for entry in artifact.manifest.files:
        found = _entry(artifact.path / entry.path, artifact.path)
        if found.sha256 != entry.sha256:
            raise ArtifactError(
                "artifact's content has changed since it was made", where=artifact.path / entry.path,
                got=found.sha256, expected=entry.sha256, fix=f"rerun stage {artifact.manifest.stage} with --force",
            )  # fmt: skip


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, None where there is none; raises ArtifactError if it is not one."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise ArtifactError(
            "unreadable manifest", where=path, got=str(error).splitlines()[0],
            fix="delete the folder and rerun its stage",
        ) from None  # fmt: skip


def payload(folder: Path) -> list[Path]:
    """The files that are an artifact's content: all but the manifest, the run record and resume state."""
    return sorted(path for path in _walk(folder) if path.name not in {MANIFEST, RUN_RECORD} or path.parent != folder)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a power cut, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def superseded(folder: Path) -> Path:
    """Where the finished output that `folder` replaces is kept, one generation deep."""
    return folder.parents[1] / ".superseded" / folder.parent.name / folder.name


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name != WORK and not path.name.startswith(CHECKPOINT_PREFIX):
                yield from (item for item in path.rglob("*") if item.is_file())
        elif not path.name.startswith("."):
            yield path


def _entry(path: Path, folder: Path) -> FileEntry:
    if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle"}:
        raise ArtifactError("a pickle cannot be published", where=path, fix="this is a bug in the stage: report it")
    digest, size, lines = hashlib.sha256(), 0, 0
    counts_rows = path.suffix in {".jsonl", ".csv"}
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            lines += chunk.count(b"\n") if counts_rows else 0
    name = path.relative_to(folder).as_posix()
    return FileEntry(path=name, bytes=size, rows=lines if counts_rows else None, sha256=digest.hexdigest())
