"""Where trainings keep what they compute once: for all runs of a workspace, or for themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefmill.core.stage import Task
from prefmill.training.cache_place import cache_place


def test_a_cache_of_another_user_is_left_alone_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a scratch disk a second user's training ended in `no access`, below the folder that the first had made."""
    output, shared = tmp_path / "checkpoints" / "r" / "dpo" / "all", tmp_path / "data" / "cache"
    task = Task("r", "dpo", "all", {}, {}, {}, output, tmp_path / "logs" / "r" / "dpo" / "all")
    assert cache_place(task) == shared  # not there yet
    shared.mkdir(parents=True)
    assert cache_place(task, "reference/k") == shared / "reference" / "k"
    # The tests may run as root, who may write anywhere. Of a group's cache one folder may be closed, by its umask.
    closed = shared / "reference" / "k"
    closed.mkdir(parents=True)
    spread = shared / "a7"  # of pictures' latents
    spread.mkdir()
    shut = [closed]
    monkeypatch.setattr(os, "access", lambda path, mode: path not in shut)
    assert (cache_place(task), caplog.messages) == (shared, [])
    assert cache_place(task, "reference/k") == task.work / "cache" / "reference" / "k"
    (told,) = caplog.messages
    assert told.startswith(f"{closed} is another user's: ")
    assert told.endswith(f"`chmod -R g+rwX {closed}`")
    caplog.clear()
    shut.append(spread)
    assert cache_place(task) == task.work / "cache"
    (told,) = caplog.messages
    assert told.startswith(f"{spread} is another user's: ")
    assert told.endswith(f"`chmod -R g+rwX {shared}`")
