"""Files written whole: on disk before they have their names, and readable by nobody whom their mode leaves out."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefmill.core.files import (
    append_row,
    copy_once,
    digest_bytes,
    known_digest,
    replacing,
    sample_digest,
    write_atomic,
)


def test_what_is_named_is_on_disk_and_the_mode_holds_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "page.url", []

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
    assert [*tmp_path.iterdir()] == [path]


def test_a_killed_writers_rest_is_in_no_ones_way(tmp_path: Path) -> None:
    left = tmp_path / ".row.partial"
    left.write_text("much, in another mode")
    left.chmod(0o400)
    with replacing(tmp_path / "row", mode=0o600) as stream:
        stream.write(b"new")
    assert [(path.read_text(), stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()] == [("new", 0o600)]


def test_writers_of_one_process_number_do_not_meet(tmp_path: Path) -> None:
    """As threads do, so do containers on two nodes: a rename found nothing, or the other's half."""
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(write_atomic, tmp_path / "heartbeat", str(n) * 99) for n in range(400)]
    assert [error for each in done if (error := each.exception())] == []
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat"]


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


def test_the_sample_of_a_model_is_of_its_own_files(tmp_path: Path) -> None:
    """`prefmill gc` deletes checkpoints, and a cache of the hub may hold links to files that were never fetched."""
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(bytes(10**6))
    whole = sample_digest(tmp_path, (".safetensors",))
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert sample_digest(tmp_path, (".safetensors",)) == whole
    weights.write_bytes(bytes(10**6 - 1) + b"1")
    assert sample_digest(tmp_path, (".safetensors",)) != whole


def test_what_is_written_within_a_step_of_the_clock_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same inode, size and times: as on file systems whose clock goes by steps of two seconds."""
    path, ticks = tmp_path / "rows.jsonl", Path.stat

    def stepwise(self: Path, **options: Any) -> Any:
        real = ticks(self, **options)
        step = {name: getattr(real, name) // 2_000_000_000 * 2_000_000_000 for name in ("st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(st_mode=real.st_mode, st_ino=real.st_ino, st_size=real.st_size, **step)

    monkeypatch.setattr(Path, "stat", stepwise)
    for number in range(10, 60):
        path.write_text(str(number))
        assert known_digest(path) == digest_bytes(str(number).encode())
