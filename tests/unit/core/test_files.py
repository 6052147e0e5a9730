"""write_atomic: on disk before it has its name, and readable by nobody whom its mode leaves out."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from prefmill.core.files import write_atomic


def test_what_is_named_is_on_disk_and_the_mode_holds_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "page.url", []
    left = tmp_path / f".page.url.{os.getpid()}.partial"  # by a killed process of this number
    left.write_text("old")

    def synced(descriptor: int) -> None:
        seen.append(("sync", stat.S_IMODE(os.fstat(descriptor).st_mode)))

    def renamed(source: Path, target: Path) -> None:
        seen.append(("rename", stat.S_IMODE(source.stat().st_mode)))
        source.rename(target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomic(path, "secret", 0o600)
    assert seen[:2] == [("sync", 0o600), ("rename", 0o600)]
    assert seen[2][0] == "sync", "the folder"
    assert path.read_text() == "secret"
    assert not left.exists()
