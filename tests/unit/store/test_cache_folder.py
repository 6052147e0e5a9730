"""Where trainings keep what they compute once: for all runs of a workspace, or for themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefmill.core.stage import Task
from prefmill.store.tensor_cache import cache_folder


def test_a_cache_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a scratch disk a second user's training ended in `no access`, below the folder that the first had made."""
    output, shared = tmp_path / "checkpoints" / "r" / "dpo" / "all", tmp_path / "data" / "cache"
    task = Task("r", "dpo", "all", {}, {}, {}, output, tmp_path / "logs" / "r" / "dpo" / "all")
    assert cache_folder(task, None) == shared  # not there yet
    shared.mkdir(parents=True)
    assert cache_folder(task, None) == shared
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    assert cache_folder(task, None) == task.work / "cache"
    assert cache_folder(task, tmp_path / "given") == tmp_path / "given"
