"""Long phases: only what is missing is made, it is kept at once, and a stop loses nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.graceful_stop import STOP, Stopped, clear_request, request_stop
from prefmill.core.stage import Task
from prefmill.store.kept_tensors import KeptTensors
from prefmill.store.missing import kept_rows, missing, silent
from prefmill.store.tensor_cache import TensorCache


def test_what_is_held_is_passed_over_and_counts_as_done() -> None:
    heard: list[tuple[int, int | None, str]] = []
    found = list(missing("abcde", "b".__contains__, lambda *said: heard.append(said), "letters", at_once=2))
    assert ["".join(keys) for keys in found] == ["ac", "de"]
    assert heard == [(1, 5, "letters"), (3, 5, "letters"), (5, 5, "letters")]


def test_rows_come_from_their_files(tmp_path: Path) -> None:
    def make(block: Sequence[str]) -> list[Any]:
        return [{"letter": letter, "pair": (1, 2)} for letter in block]

    first = kept_rows(tmp_path, "b", ["ab", "c"], make, silent, "letters")
    assert first == [{"letter": letter, "pair": [1, 2]} for letter in "abc"]  # as JSON has them

    def never(block: Sequence[str]) -> list[Any]:
        raise AssertionError(block)

    assert kept_rows(tmp_path, "b", ["ab", "c"], never, silent, "letters") == first


def test_a_stop_comes_between_two_items_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    task = Task("r", "s", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    made: list[str] = []

    def make(block: Sequence[str]) -> list[Any]:
        made.append("".join(block))
        if made == ["ab", "cd"]:
            request_stop(task.logs, 10.0)
        return [*block]

    with pytest.raises(Stopped, match="kept 4 of 5 letters"):
        kept_rows(tmp_path, "b", ["ab", "cd", "e"], make, task.advance, "letters")
    assert (task.logs / STOP).is_file()
    clear_request(task.logs)
    assert kept_rows(tmp_path, "b", ["ab", "cd", "e"], make, task.advance, "letters") == [*"abcde"]
    assert made == ["ab", "cd", "e"]


def test_tensors_are_kept_bit_for_bit_and_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    values = {"a": torch.tensor([math.pi, -math.inf, math.nan]), "b": torch.randn(2, 3, 4, dtype=torch.float64)}
    kept = KeptTensors(tmp_path / "kept")
    assert kept.read() == {}
    kept.keep(values)
    other = KeptTensors(tmp_path / "kept")  # another process
    other.keep({"c": torch.zeros(0), "d": torch.ones(2)})
    (path,) = [path for path in (tmp_path / "kept").iterdir() if '"d"' in path.read_text()]
    path.write_bytes(path.read_bytes()[:-7])
    found = kept.read()
    assert sorted(found) == ["a", "b", "c"]
    for name, value in values.items():
        assert torch.equal(found[name].nan_to_num(7.0), value.double().nan_to_num(7.0))
        assert found[name].shape == value.shape
    kept.forget()
    assert kept.read() == {}


def test_a_tensor_that_does_not_fit_keeps_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt on a full disk left what it had written, under a name of its own."""

    def write(_tensors: Any, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError("no room")

    cache = TensorCache(tmp_path)
    monkeypatch.setattr("prefmill.store.tensor_cache.save_file", write)
    with pytest.raises(OSError, match="no room"):
        cache.save("key", {"a": torch.zeros(1)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    cache.save("key", {"a": torch.ones(1)})
    assert cache.load("key")["a"] == 1
