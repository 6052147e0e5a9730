"""Scoring one shard of a review corpus: stream, skip what an earlier attempt did, journal, then write the payload."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from prefmill.artifacts import Artifact, write_atomic
from prefmill.checklist.engines import Engine, Outcome
from prefmill.checklist.items import Checklist, load_checklist, save_checklist
from prefmill.checklist.journal import Journal
from prefmill.errors import ConfigError, InputError
from prefmill.records import JsonlWriter, Paper, Review
from prefmill.reviews.join import REVIEWS, papers_with_reviews
from prefmill.stage import Metrics, Shard, Task

EVALUATIONS, CHECKLIST, SUMMARY = "review_evaluations.jsonl", "checklist.json", "summary.json"
FAILURES, TRUNCATED = "failures.jsonl", "truncated.jsonl"
OPTIMAL_CHECKLIST = "optimal_checklist.json"  # of the artifact that optimize_checklist writes
_JOURNAL = "outcomes.journal"
PaperReviews = tuple[Paper, list[Review]]


@dataclass(frozen=True)
class Scoring:
    """What to score with: `open_engine` is called only if a review is left to score."""

    checklist: Checklist
    open_engine: Callable[[], Engine]
    debug: int | None
    max_failed_share: float


@dataclass
class Tally:
    """Counts over the outcomes so far."""

    num_scored: int = 0
    num_failed: int = 0
    num_truncated: int = 0
    checkmark_sum: float = 0.0
    p_yes_sum: float = 0.0
    yes: Counter[str] = field(default_factory=Counter)
    engine: str | None = None
    last: tuple[str, str] | None = None

    @property
    def num_done(self) -> int:
        """Outcomes so far."""
        return self.num_scored + self.num_failed

    def add(self, row: Any, num_cut_tokens: int, failed: bool) -> None:
        """Count one outcome, given as its journal row."""
        self.last = (row["paper_id"], row["review_id"])
        if failed:
            self.num_failed += 1
            return
        self.num_scored += 1
        self.num_truncated += num_cut_tokens > 0
        self.checkmark_sum += row["checkmark_score"]
        self.p_yes_sum += row["mean_p_yes"]
        self.engine = row["engine"]
        self.yes.update([name for name, answer in row["answers"].items() if answer["yes"]])


def choose_checklist(path: Path | None, artifact: Artifact | None) -> Checklist:
    """The user's file, the optimised checklist or the shipped one; raises ConfigError when both are given."""
    if path is not None and artifact is not None:
        raise ConfigError(
            "two checklists", got=f"checklist={path} and input checklist {artifact.path}", expected="one of them",
            fix="leave out one of the two",
        )  # fmt: skip
    return load_checklist(artifact.file(OPTIMAL_CHECKLIST) if artifact is not None else path)


def score_shard(corpus: Artifact, scoring: Scoring, task: Task) -> Metrics:
    """Score the shard's reviews in the corpus's order and write the payload; returns the counts.

    Resumes behind the last review an interrupted attempt journaled. Raises InputError when the corpus has no
    reviews, or as soon as more than `max_failed_share` of the reviews cannot be scored.
    """
    num_rows = _num_reviews(corpus)
    with Journal(task.work / _JOURNAL) as journal:
        tally = Tally()
        for entry in journal.entries():
            tally.add(entry.row(), entry.num_cut_tokens, entry.failed)
        reviews = _in_shard(papers_with_reviews(corpus), task.shard)
        if scoring.debug is not None:
            reviews = _first(reviews, scoring.debug)
        upper_bound = min(num_rows, scoring.debug or num_rows)
        _score_rest(_behind(reviews, tally), scoring, journal, tally, upper_bound, task)
        _require_few_failures(tally, scoring.max_failed_share, tally.num_done)
        _write_rows(journal, task.output)
    save_checklist(scoring.checklist, task.output / CHECKLIST)
    summary = _summary(tally, scoring, task.shard)
    write_atomic(task.output / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return {key: value for key, value in summary.items() if key.startswith(("num_", "mean_"))}


def _score_rest(
    reviews: Iterator[PaperReviews], scoring: Scoring, journal: Journal, tally: Tally, upper_bound: int, task: Task
) -> None:
    """Score `reviews` and journal each outcome before the next is asked for."""
    from tqdm import tqdm

    expected = _expected(upper_bound, task.shard, scoring.debug)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=expected, initial=tally.num_done, desc="score", unit="review"))
        for outcome, row in _outcomes(reviews, scoring):
            failed = outcome.failure is not None
            tally.add(row, outcome.num_cut_tokens, failed)
            if failed:
                _require_few_failures(tally, scoring.max_failed_share, upper_bound, outcome)
            journal.append(row, outcome.num_cut_tokens, failed)
            bar.update()
            task.progress(tally.num_done, max(expected, tally.num_done + 1), "reviews")
        bar.total = tally.num_done
    task.progress(tally.num_done, tally.num_done, "reviews")


def _outcomes(reviews: Iterator[PaperReviews], scoring: Scoring) -> Iterator[tuple[Outcome, Any]]:
    """Each outcome with its journal row; the engine, which may take minutes to load, only where one is due."""
    first = next(reviews, None)
    if first is None:
        return
    engine = scoring.open_engine()
    for outcome in engine.score(_chain(first, reviews)):
        if outcome.failure is None:
            yield outcome, engine.evaluation(outcome)
        else:
            yield outcome, {"review_id": outcome.review_id, "paper_id": outcome.paper_id, "reason": outcome.failure}


def _chain(first: PaperReviews, rest: Iterator[PaperReviews]) -> Iterator[PaperReviews]:
    yield first
    yield from rest


def _in_shard(papers: Iterable[PaperReviews], shard: Shard) -> Iterator[PaperReviews]:
    return ((paper, reviews) for paper, reviews in papers if reviews and shard.holds(paper["paper_id"]))


def _first(papers: Iterator[PaperReviews], count: int) -> Iterator[PaperReviews]:
    """The first `count` reviews."""
    for paper, reviews in papers:
        yield paper, reviews[:count]
        count -= len(reviews)
        if count <= 0:
            return


def _behind(papers: Iterator[PaperReviews], tally: Tally) -> Iterator[PaperReviews]:
    """What comes behind the reviews that were already scored; order is the same in every attempt."""
    left = tally.num_done
    for paper, reviews in papers:
        if 0 < left <= len(reviews):
            assert tally.last == (paper["paper_id"], reviews[left - 1]["review_id"]), "the journal is of other reviews"
        if left < len(reviews):
            yield paper, list(islice(reviews, left, None))
        left = max(0, left - len(reviews))


def _require_few_failures(tally: Tally, share: float, num_reviews: int, latest: Outcome | None = None) -> None:
    if tally.num_failed <= share * num_reviews:
        return
    example = f", the latest {latest.review_id} of paper {latest.paper_id}: {latest.failure}" if latest else ""
    raise InputError(
        "too many reviews could not be scored", got=f"{tally.num_failed} failed{example}",
        expected=f"at most {share:g} of the reviews (max_failed_share)",
        fix="over-long reviews: set engine.truncate_reviews=true; to go on without such reviews: raise "
        "max_failed_share. What is scored is kept",
    )  # fmt: skip


def _write_rows(journal: Journal, output: Path) -> None:
    """The journal's entries as the payload's files, each all or nothing."""
    with ExitStack() as stack:
        evaluations, failures, truncated = (
            stack.enter_context(JsonlWriter(output / name)) for name in (EVALUATIONS, FAILURES, TRUNCATED)
        )
        for entry in journal.entries():
            (failures if entry.failed else evaluations).write_line(entry.json.decode())
            if entry.num_cut_tokens:
                row = entry.row()
                truncated.write(
                    {**{key: row[key] for key in ("review_id", "paper_id")}, "num_cut_tokens": entry.num_cut_tokens}
                )


def _summary(tally: Tally, scoring: Scoring, shard: Shard) -> dict[str, Any]:
    count = max(1, tally.num_scored)
    return {
        "engine": tally.engine,
        "checklist": scoring.checklist.name,
        "shard": {"index": shard.index, "count": shard.count},
        "num_reviews": tally.num_done,
        "num_scored": tally.num_scored,
        "num_failed": tally.num_failed,
        "num_truncated": tally.num_truncated,
        "mean_checkmark_score": round(tally.checkmark_sum / count, 6),
        "mean_p_yes": round(tally.p_yes_sum / count, 6),
        "yes_rates": {name: round(tally.yes[name] / count, 6) for name in scoring.checklist.ids},
    }


def _num_reviews(corpus: Artifact) -> int:
    path = corpus.file(REVIEWS)
    rows = next(entry.rows for entry in corpus.manifest.files if entry.path == REVIEWS)
    if not rows:
        raise InputError("the corpus holds no reviews", where=path, fix="check the sources given to ingest_reviews")
    return rows


def _expected(upper_bound: int, shard: Shard, debug: int | None) -> int:
    """About how many reviews the shard has: exact for one shard, or in debugging."""
    return upper_bound if debug is not None else -(-upper_bound // shard.count)
