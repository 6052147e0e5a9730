"""A cache of which another user has closed a folder or a file: told by its path, whichever library meets it."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
import torch

from prefmill.core.errors import PrefmillError
from prefmill.store.tensor_cache import TensorCache

NOBODY = 65534


def told(cache: TensorCache, action: str) -> str:
    """What another user is told of `ab12`, in a process of its own: root may do anything."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_told, (cache, action))


def _told(cache: TensorCache, action: str) -> str:
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    actions: dict[str, Any] = {
        "holds": lambda: cache.holds("ab12"), "load": lambda: cache.load("ab12"),
        "row": lambda: cache.row("ab12", "a", 0), "save": lambda: cache.save("ab13", {"a": torch.ones(1)}),
    }  # fmt: skip
    try:
        return str(actions[action]())
    except PrefmillError as error:
        return str(error)


@pytest.mark.parametrize("action", ["holds", "load", "row", "save"])
def test_a_closed_folder_is_told(tmp_path_factory: pytest.TempPathFactory, action: str) -> None:
    cache = _made(tmp_path_factory)
    (cache.folder / "ab").chmod(0)
    said = told(cache, action)
    assert said.startswith("no access: Permission denied")
    assert f"{cache.folder}/ab" in said
    assert "have its owner give you access" in said
    (cache.folder / "ab").chmod(0o700)


@pytest.mark.parametrize("action", ["load", "row"])
def test_a_closed_file_is_no_damaged_one(tmp_path_factory: pytest.TempPathFactory, action: str) -> None:
    cache = _made(tmp_path_factory)
    cache.path("ab12").chmod(0)
    assert told(cache, "holds") == "True"
    said = told(cache, action)
    assert said.startswith("no access: Permission denied")
    assert str(cache.path("ab12")) in said


def _made(factory: pytest.TempPathFactory) -> TensorCache:
    folder = factory.mktemp("cache")
    for parent in (folder, *folder.parents[:3]):  # pytest's own are closed to others
        parent.chmod(parent.stat().st_mode | 0o055)
    cache = TensorCache(folder)
    cache.save("ab12", {"a": torch.ones(2)})
    return cache
