"""Scoring a shard of a review corpus: skip what earlier attempts did, journal the rest, write the payload in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from prefmill.checklist.debug_prompts import show_outcome, show_prompts
from prefmill.checklist.engine import Engine, Outcome
from prefmill.checklist.items import Checklist, load_checklist, save_checklist
from prefmill.checklist.judge_gate import AnswerCounts, JudgeGate, check, warnings
from prefmill.checklist.scored import BETWEEN_ENGINES, CHECKLIST, EVALUATIONS, FAILURES, SUMMARY, several_models
from prefmill.checklist.throughput import Pace
from prefmill.core.artifact import Artifact
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import write_json
from prefmill.core.records import Paper, Review, ReviewIds
from prefmill.core.stage import Metrics, Shard, Task
from prefmill.reviews.join import REVIEWS, papers_with_reviews
from prefmill.store.journal import Entry, Journal
from prefmill.store.jsonl import JsonlWriter

TRUNCATED = "truncated.jsonl"
OPTIMAL_CHECKLIST = "optimal_checklist.json"  # of the artifact that optimize_checklist writes
_JOURNAL = "outcomes.journal"
PaperReviews = tuple[Paper, list[Review]]
Place = tuple[str, str]
_parse_ids = msgspec.json.Decoder(ReviewIds).decode  # passes over the rest of a row


@dataclass(frozen=True)
class Scoring:
    """What to score with: `open_engine` is called only if a review is left to score.

    `limit` takes the first so many reviews of the shard. `debug` prints what the engine is shown and answers.
    `temperature` is the engine's, for the summary. `gate` says when a model's answers are not believed.
    """

    checklist: Checklist
    open_engine: Callable[[], Engine]
    limit: int | None
    max_failed_share: float
    debug: bool = False
    temperature: float | None = None
    gate: JudgeGate | None = None


@dataclass
class Counts:
    """How many reviews have an outcome so far."""

    num_scored: int = 0
    num_failed: int = 0

    @property
    def num_done(self) -> int:
        """Outcomes so far."""
        return self.num_scored + self.num_failed

    def count(self, failed: bool) -> None:
        """Count one outcome."""
        self.num_failed += failed
        self.num_scored += not failed


@dataclass
class Tally(Counts):
    """What the outcomes come to."""

    num_truncated: int = 0
    checkmark_sum: float = 0.0
    p_yes_sum: float = 0.0
    num_with_evidence: int = 0
    answers: AnswerCounts = field(default_factory=AnswerCounts)
    engines: set[str] = field(default_factory=set)

    def add(self, row: Any, num_cut_tokens: int, failed: bool) -> None:
        """Take in one outcome, given as its journal row."""
        self.count(failed)
        if failed:
            return
        self.num_truncated += num_cut_tokens > 0
        self.checkmark_sum += row["checkmark_score"]
        self.p_yes_sum += row["mean_p_yes"]
        self.engines.add(row["engine"])
        self.answers.add(row["answers"])
        self.num_with_evidence += sum("evidence" in answer for answer in row["answers"].values())


def choose_checklist(path: Path | None, artifact: Artifact | None) -> Checklist:
    """The user's file, the optimised checklist or the shipped one; raises ConfigError when both are given."""
    if path is not None and artifact is not None:
        raise ConfigError(
            "two checklists", got=f"checklist={path} and input checklist {artifact.path}", expected="one of them",
            fix="leave out one of the two",
        )  # fmt: skip
    return load_checklist(artifact.file(OPTIMAL_CHECKLIST) if artifact is not None else path)


def score_shard(corpus: Artifact, scoring: Scoring, task: Task) -> Metrics:
    """Score the shard's reviews and write the payload in the corpus's order; returns the counts.

    What an interrupted attempt journaled is not scored again. Raises InputError when the corpus has no reviews, or as
    soon as more than `max_failed_share` of the reviews cannot be scored.
    """
    num_rows = _num_reviews(corpus)
    with Journal(task.work / _JOURNAL) as journal:
        counts = Counts()
        for entry in journal.entries():
            # Failures of earlier attempts count as well: reruns do not get round max_failed_share bit by bit.
            counts.count(entry.failed)
        done = (_journaled_place(entry) for entry in journal.ordered(_journaled_place))
        papers = papers_with_reviews(corpus)
        reviews: Iterator[PaperReviews] = (item for item in papers if item[1] and task.shard.holds(item[0]["paper_id"]))
        if scoring.limit is not None:
            reviews = _first(reviews, scoring.limit)
        upper_bound = min(num_rows, scoring.limit or num_rows)
        pace = Pace()
        _score_rest(_left(reviews, done), scoring, journal, counts, upper_bound, task, pace)
        # Now the shard's own size is known; until here the whole corpus stood in for it.
        require_few_failures(counts.num_failed, scoring.max_failed_share, counts.num_done)
        tally = _write_rows(journal, task.output)
    if scoring.gate is not None:
        # Over all outcomes, those of earlier attempts included, which the first look did not see.
        check(tally.answers, scoring.gate)
    save_checklist(scoring.checklist, task.output / CHECKLIST)
    summary = _summary(tally, scoring, task.shard)
    write_json(task.output / SUMMARY, summary)
    metrics = {key: value for key, value in summary.items() if key.startswith(("num_", "mean_"))}
    found = warnings(summary["judge"], len(scoring.checklist.ids)) if scoring.gate is not None else []
    # The pace is no part of the payload: the same scores make the same files, however fast.
    return {**metrics, **pace.figures(), "warnings": found + several_models(tally.engines)}


def _score_rest(
    reviews: Iterator[PaperReviews],
    scoring: Scoring,
    journal: Journal,
    counts: Counts,
    upper_bound: int,
    task: Task,
    pace: Pace,
) -> None:
    """Score `reviews` and journal each outcome as soon as it is there, whichever comes first."""
    from tqdm import tqdm

    # Of one shard of several about as many, with a limit at most so many.
    expected = upper_bound if scoring.limit is not None else -(-upper_bound // task.shard.count)
    answers = AnswerCounts()
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=expected, initial=counts.num_done, desc="score", unit="review"))
        for outcome, row in _outcomes(reviews, scoring, pace):
            failed = outcome.failure is not None
            counts.count(failed)
            if failed:
                # Before the journal has it: a rerun asks again about the review that ended the task.
                require_few_failures(counts.num_failed, scoring.max_failed_share, upper_bound, outcome)
            journal.append(row, outcome.num_cut_tokens, failed)
            if not failed:
                answers.add(outcome.answers)
            if scoring.gate is not None and answers.num_reviews == scoring.gate.after_reviews:
                check(answers, scoring.gate)
            pace.add(len(outcome.answers))
            shown = str(pace)
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
            unit = f"reviews, {shown}" if shown else "reviews"
            # Papers are dealt out by hash: a shard may hold more than its share, and must not look done before it is.
            task.advance(counts.num_done, max(expected, counts.num_done + 1), unit)
        bar.total = counts.num_done
    task.progress(counts.num_done, counts.num_done, "reviews")


def _outcomes(reviews: Iterator[PaperReviews], scoring: Scoring, pace: Pace) -> Iterator[tuple[Outcome, Any]]:
    """Each outcome with its journal row; the engine, which may take minutes to load, only where one is due."""
    first = next(reviews, None)
    if first is None:
        return
    engine = scoring.open_engine()
    pace.start(engine)
    papers = chain([first], reviews)
    for outcome in engine.score_as_done(show_prompts(papers, engine) if scoring.debug else papers):
        if scoring.debug:
            show_outcome(outcome)
        if outcome.failure is None:
            yield outcome, engine.evaluation(outcome)
        else:
            yield outcome, {"review_id": outcome.review_id, "paper_id": outcome.paper_id, "reason": outcome.failure}


def _first(papers: Iterator[PaperReviews], count: int) -> Iterator[PaperReviews]:
    """The first `count` reviews."""
    for paper, reviews in papers:
        yield paper, reviews[:count]
        count -= len(reviews)
        if count <= 0:
            return


def _left(papers: Iterator[PaperReviews], done: Iterator[Place]) -> Iterator[PaperReviews]:
    """The reviews that no earlier attempt has done: both come in the corpus's order, so neither is held in memory."""
    next_done = next(done, None)
    for paper, reviews in papers:
        left = []
        for review in reviews:
            place = _place(review)
            while next_done is not None and next_done < place:
                next_done = next(done, None)
            if next_done != place:
                left.append(review)
        if left:
            yield paper, left


def _place(row: Any) -> Place:
    """Where a review stands: a corpus rises strictly by these."""
    return row["paper_id"], row["review_id"]


def _journaled_place(entry: Entry) -> Place:
    return _place(_parse_ids(entry.json))


def require_few_failures(num_failed: int, share: float, num_reviews: int, latest: Outcome | None = None) -> None:
    """Raise InputError where more than this share of the reviews could not be scored."""
    if num_failed <= share * num_reviews:
        return
    example = f", the latest {latest.review_id} of paper {latest.paper_id}: {latest.failure}" if latest else ""
    raise InputError(
        "too many reviews could not be scored", got=f"{num_failed} failed{example}",
        expected=f"at most {share:g} of the reviews (max_failed_share)",
        fix="over-long reviews: set engine.truncate_reviews=true, or serve a chat model with a longer context; "
        "to go on without such reviews: raise max_failed_share. What is scored is kept",
    )  # fmt: skip


def _write_rows(journal: Journal, output: Path) -> Tally:
    """The journal's entries as the payload's files, each all or nothing, and counted.

    In the corpus's order, whatever order they were done in: files and sums come out the same to the last bit.
    """
    tally = Tally()
    with ExitStack() as stack:
        evaluations, failures, truncated = (
            stack.enter_context(JsonlWriter(output / name)) for name in (EVALUATIONS, FAILURES, TRUNCATED)
        )
        for entry in journal.ordered(_journaled_place):
            row = entry.row()
            tally.add(row, entry.num_cut_tokens, entry.failed)
            # The journal's own bytes, not written anew from the parsed row.
            (failures if entry.failed else evaluations).write_line(entry.json)
            if entry.num_cut_tokens:
                truncated.write(
                    {**{key: row[key] for key in ("review_id", "paper_id")}, "num_cut_tokens": entry.num_cut_tokens}
                )
    return tally


def _summary(tally: Tally, scoring: Scoring, shard: Shard) -> dict[str, Any]:
    count, num_yes = max(1, tally.num_scored), {name: item.yes for name, item in tally.answers.items.items()}
    return {
        "engine": BETWEEN_ENGINES.join(sorted(tally.engines)) or None,
        "checklist": scoring.checklist.name,
        "shard": {"index": shard.index, "count": shard.count},
        **({} if scoring.temperature is None else {"temperature": scoring.temperature}),
        "num_reviews": tally.num_done, "num_scored": tally.num_scored, "num_failed": tally.num_failed,
        "num_truncated": tally.num_truncated,
        "num_yes": sum(num_yes.values()), "num_yes_with_evidence": tally.num_with_evidence,
        "mean_checkmark_score": round(tally.checkmark_sum / count, 6),
        "mean_p_yes": round(tally.p_yes_sum / count, 6),
        "yes_rates": {name: round(num_yes.get(name, 0) / count, 6) for name in scoring.checklist.ids},
        "judge": {**tally.answers.overall(), "items": tally.answers.by_item(scoring.checklist.ids)},
    }  # fmt: skip


def _num_reviews(corpus: Artifact) -> int:
    path = corpus.file(REVIEWS)
    # From the manifest, which spares a pass over the corpus.
    rows = next(entry.rows for entry in corpus.manifest.files if entry.path == REVIEWS)
    if not rows:
        raise InputError("the corpus has no reviews", where=path, fix="check the sources given to ingest_reviews")
    return rows
