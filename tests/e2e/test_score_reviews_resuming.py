"""score_reviews: kills, torn files, failures and a full disk lose nothing that is scored; none of it is asked again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from counting_engine import CountingEngine, Papers
from review_artifacts import Rows, contents, make_corpus, make_rows
from score_runs import FILES, NUM_PAPERS, evaluations, score, task_of

import stages.score_reviews as stage
from prefmill.checklist.engine import Outcome
from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl


class UnorderedEngine(CountingEngine):
    """The counting engine, done with five reviews at a time, the last first."""

    def score_as_done(self, papers: Papers) -> Iterator[Outcome]:
        outcomes = self.score(papers)
        while window := list(islice(outcomes, 5)):
            yield from reversed(window)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingEngine]:
    """Put the counting engine in the place of the one the configuration names."""
    kind = type("Counting", (CountingEngine,), {"asked": [], "opened": 0, "fails": frozenset(), "kill_before": None})
    monkeypatch.setattr(stage, "open_engine", kind)
    return kind


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    return make_rows(NUM_PAPERS)


@pytest.fixture
def corpus(tmp_path: Path, rows: tuple[Rows, Rows]) -> Artifact:
    return make_corpus(tmp_path / "corpus", *rows)


@pytest.mark.slow
def test_resuming_repeats_nothing_but_the_torn_row(
    tmp_path: Path, corpus: Artifact, counting: type[CountingEngine]
) -> None:
    counting.fails = frozenset(review["review_id"] for review in list(read_jsonl(corpus.file("reviews.jsonl")))[5:7])
    task = task_of(tmp_path / "t", corpus)
    score(task, max_failed_share=0.5)
    expected, asked = contents(task), list(counting.asked)
    journal = next(path for path in task.work.iterdir() if path.name.endswith("journal"))
    whole = journal.read_bytes()
    ends = [0, *(index + 1 for index, byte in enumerate(whole) if byte == ord("\n"))]
    rng = random.Random(0)
    offsets = {0, 1, len(whole) - 1, len(whole), *ends[3:8], *(end - 1 for end in ends[3:8])}
    for offset in sorted(offsets | {rng.randrange(len(whole)) for _ in range(25)}):
        again = task_of(tmp_path / f"t{offset}", corpus)
        (again.work / journal.name).write_bytes(whole[:offset])
        counting.asked.clear()
        counting.opened = 0
        score(again, max_failed_share=0.5)
        num_kept = sum(end <= offset for end in ends) - 1
        assert counting.asked == asked[num_kept:]
        assert counting.opened == (num_kept < len(asked))  # no model is loaded when nothing is left
        assert contents(again) == expected
        shutil.rmtree(again.output)


def test_whatever_is_done_first_is_kept_and_files_are_the_same(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = task_of(tmp_path / "ordered", corpus)
    score(ordered)
    kind = type("Unordered", (UnorderedEngine,), {"asked": []})
    monkeypatch.setattr(stage, "open_engine", kind)
    ids = [review["review_id"] for review in rows[1]]
    task = task_of(tmp_path / "t", corpus)
    score(task)
    journal = task.work / "outcomes.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert contents(task) == contents(ordered)
    for num_kept in (1, 3, 7, len(ids) - 1):
        again = task_of(tmp_path / f"t{num_kept}", corpus)
        (again.work / journal.name).write_bytes(b"".join(lines[:num_kept]))
        kind.asked.clear()
        score(again)
        kept = [json.loads(line.split(b"\t")[1])["review_id"] for line in lines[:num_kept]]
        assert kept != ids[:num_kept]
        assert kind.asked == [name for name in ids if name not in kept]
        assert contents(again) == contents(ordered)


@pytest.mark.slow
def test_garbage_behind_the_journal_is_discarded(
    tmp_path: Path, corpus: Artifact, counting: type[CountingEngine]
) -> None:
    task = task_of(tmp_path / "t", corpus)
    score(task)
    expected = contents(task)
    journal = next(path for path in task.work.iterdir() if path.name.endswith("journal"))
    kept = journal.read_bytes().splitlines(keepends=True)[:9]
    for garbage in (
        b"\0" * 4096,
        b"\0" * 100 + b"\n",
        b"0\t{\n",
        b"x\t{}\n",
        b'0\t"text"\n',
        b"\n",
        kept[0][:-2] + b"\n",
    ):
        journal.write_bytes(b"".join(kept) + garbage)
        counting.asked.clear()
        score(task)
        assert len(counting.asked) == len(expected["review_evaluations.jsonl"].splitlines()) - 9
        assert contents(task) == expected


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path: Path, corpus: Artifact, counting: type[CountingEngine]) -> None:
    reviews = [row["review_id"] for row in read_jsonl(corpus.file("reviews.jsonl"))]
    undisturbed = task_of(tmp_path / "whole", corpus)
    score(undisturbed)
    task = task_of(tmp_path / "t", corpus)
    for stop in (10, 11, 40):
        counting.kill_before = reviews[stop]
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            score(task)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert payload(task.output) == []
    counting.kill_before = None
    counting.asked.clear()
    score(task)
    assert counting.asked == reviews[40:]
    assert contents(task) == contents(undisturbed)


def test_failures_stop_the_stage_unless_allowed(
    tmp_path: Path, corpus: Artifact, counting: type[CountingEngine], rows: tuple[Rows, Rows]
) -> None:
    ids = [review["review_id"] for review in rows[1]]
    counting.fails = frozenset(ids[4:8])
    task = task_of(tmp_path / "t", corpus)
    with pytest.raises(InputError, match=rf"1 failed, the latest {ids[4]} of paper .*: no answer"):
        score(task)
    assert counting.asked == ids[:5]
    assert payload(task.output) == []
    with pytest.raises(InputError, match=f"3 failed, the latest {ids[6]}"):
        score(task, max_failed_share=2.5 / len(ids))
    assert counting.asked[5:] == ids[4:7]  # what was scored is kept, what failed is asked again
    counting.name = "lexical (fallback)"  # as of a server that fell back between two attempts
    metrics = score(task, max_failed_share=4 / len(ids))
    assert (metrics["num_failed"], metrics["num_scored"]) == (4, len(ids) - 4)
    assert metrics["warnings"][-1].startswith("more than one model has answered: lexical and lexical (fallback);")
    failures = list(read_jsonl(task.output / "failures.jsonl"))
    assert [(row["review_id"], row["reason"]) for row in failures] == [(name, "no answer") for name in ids[4:8]]
    assert [row["review_id"] for row in evaluations(task)] == ids[:4] + ids[8:]


def test_few_failures_of_a_large_corpus_are_too_many_for_a_small_shard(
    tmp_path: Path, corpus: Artifact, counting: type[CountingEngine], rows: tuple[Rows, Rows]
) -> None:
    counting.fails = frozenset(review["review_id"] for review in rows[1])
    shard = task_of(tmp_path / "t", corpus, 0, 8)
    with pytest.raises(InputError, match="too many reviews could not be scored"):
        score(shard, max_failed_share=0.9)


def test_a_full_disk_keeps_what_is_scored(tmp_path: Path, corpus: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    task = task_of(tmp_path / "t", corpus)
    with monkeypatch.context() as patch:
        patch.setattr("prefmill.core.files.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            score(task)
    assert payload(task.output) == []
    score(task)
    assert sorted(contents(task)) == FILES
