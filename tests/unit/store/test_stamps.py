"""Content is hashed when it may have changed, and only then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_artifacts import make

from prefmill.core.errors import ArtifactError
from prefmill.store import stamps
from prefmill.store.stamps import STAMPS, check_content


def test_a_file_is_hashed_again_only_when_it_is_not_the_one_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make(tmp_path)
    hashed: list[Path] = []
    digest = stamps.digest_path
    monkeypatch.setattr(stamps, "digest_path", lambda path: hashed.append(path) or digest(path))
    check_content(artifact)
    assert hashed == []  # it was hashed when it was published
    (tmp_path / STAMPS).unlink()  # as in an artifact of an earlier version
    check_content(artifact, only_touched=True)
    assert hashed == []
    check_content(artifact)
    check_content(artifact)
    assert hashed == [tmp_path / "rows.jsonl"]


def test_reversed_lines_and_a_flipped_bit_are_found_whatever_the_times_say(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    rows = tmp_path / "rows.jsonl"
    data, before = rows.read_bytes(), rows.stat()
    for wrong in (b"\n".join(data.split(b"\n")[:-1][::-1]) + b"\n", bytes([data[0] ^ 1]) + data[1:]):
        rows.write_bytes(wrong)
        with pytest.raises(ArtifactError, match="changed since it was made"):
            check_content(artifact, only_touched=True)
        os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert rows.stat().st_size == before.st_size
        with pytest.raises(ArtifactError, match="changed since it was made"):
            check_content(artifact)
    rows.write_bytes(data)
    check_content(artifact)
