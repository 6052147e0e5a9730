"""score_reviews: payload, shards, resuming, failures and bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from review_artifacts import Rows, make_artifact, make_corpus, make_rows, make_task

import stages.score_reviews as stage
from prefmill.artifacts import Artifact, payload
from prefmill.checklist.engines import LexicalConfig, Outcome
from prefmill.checklist.items import load_checklist, save_checklist
from prefmill.checklist.lexical import LexicalEngine
from prefmill.config import validate
from prefmill.errors import ConfigError, InputError
from prefmill.records import Paper, Review, read_jsonl
from prefmill.reviews.generated import quality_factors
from prefmill.stage import Task

FILES = ["checklist.json", "failures.jsonl", "review_evaluations.jsonl", "summary.json", "truncated.jsonl"]
NUM_PAPERS = 24
Papers = Iterable[tuple[Paper, Sequence[Review]]]


class CountingEngine(LexicalEngine):
    """The lexical engine, with a list of what it was asked and a review before which something happens."""

    asked: list[str] = []
    opened = 0
    fails: frozenset[str] = frozenset()
    kill_before: str | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        type(self).opened += 1

    def score(self, papers: Papers) -> Iterator[Outcome]:
        for paper, reviews in papers:
            for review in reviews:
                if review["review_id"] == self.kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.asked.append(review["review_id"])
                (outcome,) = super().score([(paper, [review])])
                failed = review["review_id"] in self.fails
                yield dataclasses.replace(outcome, answers={}, failure="no answer") if failed else outcome


class UnorderedEngine(CountingEngine):
    """The same, done with five reviews at a time, the last first."""

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


def score(task: Task, **settings: Any) -> dict[str, Any]:
    return stage.run(validate(stage.ScoreReviewsConfig, settings), task)


def task_of(folder: Path, corpus: Artifact, shard: int = 0, num_shards: int = 1, **inputs: Artifact) -> Task:
    task = make_task(folder, "score_reviews", {"corpus": [corpus], **{key: [item] for key, item in inputs.items()}})
    return dataclasses.replace(task, values={"shard": shard}, sizes={"shard": num_shards})


def contents(task: Task) -> dict[str, bytes]:
    """The payload's files."""
    return {path.relative_to(task.output).as_posix(): path.read_bytes() for path in payload(task.output)}


def evaluations(task: Task) -> Rows:
    return list(read_jsonl(task.output / "review_evaluations.jsonl"))


def test_every_review_is_scored_in_order(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    task = task_of(tmp_path / "t", corpus)
    metrics = score(task)
    found, reviews = evaluations(task), rows[1]
    assert sorted(contents(task)) == FILES
    assert [row["review_id"] for row in found] == [review["review_id"] for review in reviews]
    ids = load_checklist(task.output / "checklist.json").ids
    assert ids == load_checklist().ids
    for row, review in zip(found, reviews, strict=True):
        assert tuple(row["answers"]) == ids
        assert row["checkmark_score"] == sum(answer["yes"] for answer in row["answers"].values())
        assert row["answers"]["statistics"]["yes"] == quality_factors(review["text"])["statistics"]
        for answer in row["answers"].values():
            assert answer.get("evidence", "") in review["text"]
            assert answer["yes"] == (answer["p_yes"] == 1.0) == ("evidence" in answer)
    summary = json.loads((task.output / "summary.json").read_text())
    assert summary["num_reviews"] == summary["num_scored"] == metrics["num_scored"] == len(reviews)
    assert summary["yes_rates"]["statistics"] == pytest.approx(
        sum(row["answers"]["statistics"]["yes"] for row in found) / len(found), abs=1e-6
    )
    assert summary["mean_checkmark_score"] == pytest.approx(
        sum(row["checkmark_score"] for row in found) / len(found), abs=1e-6
    )


def test_shards_partition_the_reviews_and_stay_when_papers_are_added(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    whole = make_corpus(tmp_path / "whole", *rows)
    fewer = [row for row in rows[0] if row["paper_id"] != rows[0][3]["paper_id"]]
    part = make_corpus(tmp_path / "part", fewer, [r for r in rows[1] if r["paper_id"] != rows[0][3]["paper_id"]])
    held: dict[str, list[set[str]]] = {"whole": [], "part": []}
    for shard in range(3):
        for name, corpus in (("whole", whole), ("part", part)):
            task = task_of(tmp_path / f"{name}{shard}", corpus, shard, 3)
            score(task)
            held[name].append({row["review_id"] for row in evaluations(task)})
    everything = [row["review_id"] for row in rows[1]]
    assert sum(map(len, held["whole"])) == len(everything)
    assert set().union(*held["whole"]) == set(everything)
    assert all(held["whole"])
    for before, after in zip(held["part"], held["whole"], strict=True):
        assert before <= after


def test_a_shard_without_papers_is_empty_but_done(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    paper = rows[0][0]
    corpus = make_corpus(tmp_path / "c", [paper], [r for r in rows[1] if r["paper_id"] == paper["paper_id"]])
    counts = []
    for shard in range(4):
        task = task_of(tmp_path / f"t{shard}", corpus, shard, 4)
        counts.append(score(task)["num_scored"])
        assert sorted(contents(task)) == FILES
    assert sorted(counts)[:3] == [0, 0, 0]
    assert max(counts) >= 3


def test_a_limit_takes_the_first_reviews(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    for count in (1, 5, 10_000):
        task = task_of(tmp_path / f"t{count}", corpus)
        score(task, limit=count)
        expected = [review["review_id"] for review in rows[1][:count]]
        assert [row["review_id"] for row in evaluations(task)] == expected


def test_debugging_shows_the_first_answers_and_steers_no_terminal(
    tmp_path: Path, rows: tuple[Rows, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [{**row, "text": "\x1b[2J Table 3 shows p-values."} for row in rows[1]]
    task = task_of(tmp_path / "t", make_corpus(tmp_path / "c", rows[0], changed))
    assert score(task, debug=True)["num_scored"] == 3
    shown = capsys.readouterr().out
    assert shown.count("--- answers: review") == 3
    assert '1.000000 yes statistics  "\\x1b[2J Table 3 shows p-values."' in shown
    assert "\x1b" not in shown
    assert score(task_of(tmp_path / "five", make_corpus(tmp_path / "d", *rows)), debug=True, limit=5)["num_scored"] == 5


def test_the_pace_is_told_and_not_part_of_the_payload(
    tmp_path: Path, corpus: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(tmp_path / "t", corpus)
    metrics = score(task)
    assert metrics["items_per_second"] > 24
    assert "cache_hit_rate" not in metrics  # rules have no prompts
    assert b"per_second" not in b"".join(contents(task).values())
    assert "items/s" in capsys.readouterr().err
    assert json.loads((task.logs / "progress.json").read_text())["unit"] == "reviews"
    assert "items_per_second" not in score(task)  # nothing was left


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
    metrics = score(task, max_failed_share=4 / len(ids))
    assert (metrics["num_failed"], metrics["num_scored"]) == (4, len(ids) - 4)
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


def test_hostile_text_breaks_no_row(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    hostile = ["a\x00b\x1b[31m\u2028c\u0085d\u202e.", "no stop " * 20_000, '"}\n{"review_id": "x"}', "\t0\t{}\r\n", "…"]
    before = make_corpus(tmp_path / "before", *rows)
    changed = [dict(row) for row in rows[1]]
    for row, text in zip(changed[::9], hostile, strict=False):
        row["text"] = text
    after = make_corpus(tmp_path / "after", rows[0], changed)
    tasks = [task_of(tmp_path / name, corpus) for name, corpus in (("t0", before), ("t1", after))]
    for task in tasks:
        score(task)
    first, second = map(evaluations, tasks)
    assert len(second) == len(first)
    touched = {row["review_id"] for row in changed[::9][: len(hostile)]}
    assert [row for row in first if row["review_id"] not in touched] == [
        row for row in second if row["review_id"] not in touched
    ]


def test_an_optimised_checklist_or_a_file_of_the_users_is_used(tmp_path: Path, corpus: Artifact) -> None:
    shipped = load_checklist()
    chosen = shipped.model_copy(
        update={"name": "best", "items": tuple(i.model_copy(update={"weight": 2.0}) for i in shipped.items[:3])}
    )
    save_checklist(chosen, tmp_path / "best" / "optimal_checklist.json")
    artifact = make_artifact(tmp_path / "best", "checklist")
    task = task_of(tmp_path / "t", corpus, checklist=artifact)
    score(task)
    row = evaluations(task)[0]
    assert len(row["answers"]) == 3
    assert row["checkmark_score"] == 2 * sum(answer["yes"] for answer in row["answers"].values())
    assert load_checklist(task.output / "checklist.json") == chosen
    path = str(tmp_path / "best" / "optimal_checklist.json")
    file_task = task_of(tmp_path / "f", corpus)
    score(file_task, checklist=path)
    assert contents(file_task) == contents(task)
    with pytest.raises(ConfigError, match="two checklists"):
        score(task, checklist=path)


def test_items_without_rules_are_named_before_anything_is_written(tmp_path: Path, corpus: Artifact) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nitems:\n- {id: kind, question: 'Is it kind?', source: me}\n")
    task = task_of(tmp_path / "t", corpus)
    with pytest.raises(ConfigError, match=r"have no rule[\s\S]*kind"):
        score(task, checklist=str(path))
    assert payload(task.output) == []


def test_an_empty_corpus_is_refused(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    corpus = make_corpus(tmp_path / "corpus", rows[0], [])
    with pytest.raises(InputError, match="the corpus holds no reviews"):
        score(task_of(tmp_path / "t", corpus))


def test_a_full_disk_keeps_what_is_scored(tmp_path: Path, corpus: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    task = task_of(tmp_path / "t", corpus)
    with monkeypatch.context() as patch:
        patch.setattr("prefmill.records.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            score(task)
    assert payload(task.output) == []
    score(task)
    assert sorted(contents(task)) == FILES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": {"engine": "lexicla"}}, "lexical"),
        ({"engine": {"engine": "lexical", "model_name_or_path": "x"}}, "model_name_or_path: unknown key"),
        ({"engine": {"engine": "transformers"}}, "model_name_or_path: required"),
        ({"limit": 0}, "limit = 0"),
        ({"debug": 5}, "debug = 5"),
        ({"max_failed_share": 1.5}, "max_failed_share = 1.5"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.ScoreReviewsConfig, settings)


def test_lexical_is_the_default_engine() -> None:
    assert validate(stage.ScoreReviewsConfig, {}).engine == LexicalConfig()
