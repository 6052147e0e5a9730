"""The journal's order, and what it costs."""

from __future__ import annotations

import random
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import PipelineError
from prefmill.store.journal import Entry, Journal, _entry

NAMES = ["a", "b" * 3, "é", "\uffff", "\U0001f600", "Z", "", "a\x00b", "10", "9"]


def key(entry: Entry) -> tuple[str, str]:
    return place(entry.row())


def place(row: Any) -> tuple[str, str]:
    return row["paper_id"], row["review_id"]


def rows(count: int) -> list[dict[str, Any]]:
    made = [{"paper_id": f"{NAMES[n % len(NAMES)]}{n // 40}", "review_id": NAMES[n // 10 % 4]} for n in range(count)]
    random.Random(0).shuffle(made)
    return made


def test_entries_come_in_the_order_of_their_keys_as_python_has_it(tmp_path: Path) -> None:
    given = rows(400)
    with Journal(tmp_path / "journal") as journal:
        for number, row in enumerate(given):
            journal.append(row, num_cut_tokens=number)
        found = [(entry.row(), entry.num_cut_tokens) for entry in journal.ordered(key)]
    assert found == sorted(((row, number) for number, row in enumerate(given)), key=lambda pair: place(pair[0]))


def test_failures_are_kept_from_the_first_success_on(tmp_path: Path) -> None:
    """Of a server that refuses all, a rerun asks again about all: the share that may fail was kept as failed."""
    path = tmp_path / "journal"
    first, second, third, fourth = rows(4)
    with Journal(path) as journal:
        journal.append(first, failed=True)
    assert not path.read_bytes()
    with Journal(path) as journal:
        journal.append(first, failed=True)
        journal.append(second)
        assert [entry.failed for entry in map(_entry, path.read_bytes().splitlines())] == [True, False]
    with Journal(path) as journal:
        journal.append(third, failed=True)
        assert [entry.row() for entry in map(_entry, path.read_bytes().splitlines())] == [first, second, third]
    with Journal(tmp_path / "all failed") as journal:
        journal.append(fourth, failed=True)
        assert [entry.row() for entry in journal.ordered(key)] == [fourth]


@pytest.mark.slow
def test_memory_does_not_grow_with_their_number(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 40_000):
        with Journal(tmp_path / str(count)) as journal:
            for row in rows(count):
                journal.append(row)
            tracemalloc.start()
            assert sum(1 for _ in journal.ordered(key)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000, peaks


def test_a_full_disk_of_temporary_files_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite sorts in /var/tmp or TMPDIR: the full disk was told as the one that the task writes on."""
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path / "journal") as journal:
        for number in range(12000):
            journal.append({"key": f"{number}" + "x" * 400})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            with pytest.raises(PipelineError, match=rf"(?s)cannot write.*{tmp_path}.*SQLITE_TMPDIR"):
                list(journal.ordered(lambda entry: (entry.row()["key"], "")))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
