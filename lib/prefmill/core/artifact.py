"""The form of an artifact: what its manifest says, and the names of the files that are not its content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from prefmill.core.errors import ArtifactError


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
    inputs: dict[str, list[str]]  # content digests: what is behind an artifact is found by content, wherever it lies
    files: list[FileEntry]
    metrics: dict[str, Any]
    content_digest: str

    @property
    def key(self) -> str:
        """The task that made it, STAGE:TASK."""
        return f"{self.stage}:{self.task}"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of payload file `name`; raises ArtifactError when the manifest does not list it."""
        if not any(entry.path == name for entry in self.manifest.files):
            raise ArtifactError(
                f"the artifact has no file '{name}'", where=self.path,
                got=", ".join(entry.path for entry in self.manifest.files[:10]),
                fix="make it again with this version of prefmill: rerun its stage with --force",
            )  # fmt: skip
        return self.path / name

    def json(self, name: str) -> Any:
        """What payload file `name`, one of JSON, holds."""
        return json.loads(self.file(name).read_text())


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
