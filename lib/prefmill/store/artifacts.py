"""Artifacts: a folder whose `manifest.json`, written last and by rename, makes it done."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefmill.core.artifact import Artifact, FileEntry, Manifest, Provenance
from prefmill.core.errors import ArtifactError, nearest
from prefmill.core.files import digest_json, open_as_umask_says, write_atomic
from prefmill.core.places import CHECKPOINT_PREFIX, MANIFEST, RUN_RECORD, WORK
from prefmill.store.stamps import stamp

# What any Trainer leaves beside a model: pickles that only resuming reads.
_TRAINER_STATE = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state\w*\.pth")
_OF_MODELS = ("config.json", "adapter_config.json", "model_index.json")  # transformers', PEFT's and diffusers'
SUPERSEDED, _REMAKING = ".superseded", ".remaking"
SCHEMA_VERSIONS: dict[str, int] = {}  # of the kinds whose files have changed form; every kind starts at 1


def publish(folder: Path, kind: str, provenance: Provenance, metrics: Mapping[str, Any]) -> Artifact:
    """Make `folder` an artifact of `kind`: hash its payload, then write the manifest by rename.

    Raises ArtifactError when there is no payload or a pickle in it: an empty output is never taken for done.
    """
    for path in (item for item in payload(folder) if item.suffix == ".safetensors"):
        open_as_umask_says(path)
    files = [_entry(path, folder) for path in payload(folder)]
    if not files:
        raise ArtifactError("the stage wrote nothing", where=folder, fix="this is a bug in the stage: report it")
    schema_version = SCHEMA_VERSIONS.get(kind, 1)
    # Stage, task and metrics are left out: what is made again and comes out the same makes nothing after it stale.
    content = {"kind": kind, "schema_version": schema_version, "files": sorted([e.path, e.sha256] for e in files)}
    manifest = Manifest(
        **vars(provenance),
        kind=kind,
        schema_version=schema_version,
        files=files,
        metrics=dict(metrics),
        content_digest=digest_json(content),
    )
    stamp(folder, files)
    # Last of all: a kill before this leaves a task that is not done, never half an artifact.
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return Artifact(folder, manifest)


def read(folder: Path, kind: str | None = None) -> Artifact:
    """The finished artifact in `folder`; raises ArtifactError if it is missing, torn or not of `kind`.

    Sizes of the payload files are checked here, their digests in `stamps`.
    """
    manifest = read_manifest(folder)
    if manifest is None and kind == "checkpoint" and any((folder / name).is_file() for name in _OF_MODELS):
        raise ArtifactError(
            "a model folder that no stage wrote is no input", where=folder, expected=f"a {MANIFEST}",
            fix=f"give it as model_name_or_path={folder}, and leave the input out",
        )  # fmt: skip
    if manifest is None:
        raise ArtifactError(
            "no finished artifact here", where=folder, expected=f"a {MANIFEST}",
            fix=_elsewhere(folder) or "run the stage that makes it; an interrupted one resumes where it stopped",
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


def _elsewhere(folder: Path) -> str:
    """Which folder may be meant: one inside it, where this is a stage's, or one that is spelled nearly so."""
    inside = sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}"))
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.is_file():
        return f"give a folder that a stage wrote; a file goes into a key of the stage that takes one: {there.name}"
    if there != folder and not inside:
        missing = folder.relative_to(there).parts[0]
        near = nearest(missing, [path.name for path in there.iterdir()])
        return f"check the path{near}, or run the stage that makes it: {there} has no {missing}"
    return f"name one of its tasks: {', '.join(map(str, inside[:3]))}" if inside else ""


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
    own = {folder / MANIFEST, folder / RUN_RECORD}
    return sorted(path for path in _walk(folder) if path not in own and not _TRAINER_STATE.fullmatch(path.name))


def remaking(folder: Path) -> Path:
    """Where another output is made while the finished one in `folder` stays in its place."""
    return folder.with_name(f".{folder.name}{_REMAKING}")


def superseded(folder: Path) -> Path:
    """Where the finished output that `folder` replaces is: still in its place, or set aside one generation deep."""
    if folder.name.endswith(_REMAKING):
        return folder.with_name(folder.name.removeprefix(".").removesuffix(_REMAKING))
    return folder.parents[1] / SUPERSEDED / folder.parent.name / folder.name


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name != WORK and not path.name.startswith(CHECKPOINT_PREFIX):
                yield from (item for item in path.rglob("*") if item.is_file())
        # Partial writes and our own notes have names that begin with a point.
        elif not path.name.startswith("."):
            yield path


_CHUNK_BYTES = 1 << 20


def _entry(path: Path, folder: Path) -> FileEntry:
    # Reading a pickle runs whatever code is in it.
    if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle"}:
        raise ArtifactError("a pickle cannot be published", where=path, fix="this is a bug in the stage: report it")
    digest, size, lines = hashlib.sha256(), 0, 0
    # Counted while hashing: a corpus of many gigabytes is read once.
    counts_rows = path.suffix in {".jsonl", ".csv"}
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            lines += chunk.count(b"\n") if counts_rows else 0
    name = path.relative_to(folder).as_posix()
    return FileEntry(path=name, bytes=size, rows=lines if counts_rows else None, sha256=digest.hexdigest())
