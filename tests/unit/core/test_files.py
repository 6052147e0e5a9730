"""Files written whole: on disk before they have their names, and readable by nobody whom their mode leaves out."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from prefmill.core.files import append_row, copy_once, replacing, write_atomic


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


def test_a_refusal_names_the_file_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda path: write_atomic(path, "x"), lambda path: append_row(path, {})):
        with pytest.raises(OSError, match=str(tmp_path / "record")):
            write(tmp_path / "record")


def test_a_copy_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = tmp_path / "a.png", []
    source.write_bytes(b"picture")
    replace, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append("sync"), sync(number)))
    monkeypatch.setattr(
        os, "replace", lambda old, new: (seen.append(f"{new.name} of {old.stat().st_size}"), replace(old, new))
    )
    copy_once(source, tmp_path / "out" / "b.png", may_link=False)
    assert seen == ["sync", "b.png of 7", "sync"]
    copy_once(source, tmp_path / "out" / "c.png", may_link=True)
    assert (tmp_path / "out" / "c.png").samefile(source)
    assert len(seen) == 3
    with pytest.raises(FileNotFoundError):
        copy_once(tmp_path / "gone.png", tmp_path / "out" / "d.png", may_link=True)
    with pytest.raises(ZeroDivisionError), replacing(source) as stream:
        stream.write(b"half" + bytes(1 // 0))
    assert source.read_bytes() == b"picture"
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.png", "b.png", "c.png"]
