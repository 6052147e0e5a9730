"""The answers to every candidate for the reviews of the dev split, and the facts that targets are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from prefmill.checklist.engine import Engine, Outcome
from prefmill.checklist.judge_gate import AnswerCounts, JudgeGate, check
from prefmill.checklist.score import require_few_failures
from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.records import Answer, Paper, Review
from prefmill.reviews.join import PAPERS, papers_with_reviews
from prefmill.reviews.scale import common_rating
from prefmill.store.journal import Journal
from prefmill.store.jsonl import JsonlWriter
from prefmill.store.missing import Progress

SPLIT = "dev"
_GATE = "score.judge"
PaperReviews = tuple[Paper, list[Review]]


def dev_papers(corpus: Artifact, max_reviews: int | None) -> list[PaperReviews]:
    """The papers of the dev split that have reviews, in the corpus's order; at most `max_reviews` reviews.

    Whole papers are left out by a hash of their ids, so that the rest is a fair sample. Raises InputError when the
    corpus has no such papers: other splits are never used.
    """
    found = [(paper, reviews) for paper, reviews in papers_with_reviews(corpus) if paper["split"] == SPLIT and reviews]
    if not found:
        raise InputError(
            "no paper with reviews is in split dev", where=corpus.path / PAPERS, expected="papers of split dev",
            fix="give dev a share in ingest_reviews (splits.dev); train, val and test are never used here",
        )  # fmt: skip
    return found if max_reviews is None else _sample(found, max_reviews)


def score_dev(
    papers: Sequence[PaperReviews],
    open_engine: Callable[[], Engine],
    max_failed_share: float,
    journal_path: Path,
    output: Path,
    progress: Progress,
    gate: JudgeGate | None = None,
) -> None:
    """Write `reviews.jsonl` (facts and answers of each review) and `failures.jsonl`; resumes behind the journal.

    Raises InputError as soon as more than `max_failed_share` of the reviews could not be scored, or where a model's
    answers do not pass the `gate`.
    """
    from tqdm import tqdm

    facts = {review["review_id"]: _facts(paper, review) for paper, reviews in papers for review in reviews}
    with Journal(journal_path) as journal, tqdm(total=len(facts), desc="score", unit="review") as bar:
        entries = list(journal.entries())
        num_failed = sum(entry.failed for entry in entries)
        counts = AnswerCounts()
        for entry in entries:
            _count(counts, entry.row())
        bar.update(len(entries))
        # score() keeps the order given, so the number of entries tells where to go on.
        for outcome in _outcomes(_behind(papers, len(entries)), open_engine, journal_path.parent):
            num_failed += outcome.failure is not None
            require_few_failures(num_failed, max_failed_share, len(facts), outcome)
            journal.append(row := _row(outcome), failed=outcome.failure is not None)
            _count(counts, row)
            if gate is not None and counts.num_reviews == gate.after_reviews:
                check(counts, gate, _GATE)
            bar.update()
            progress(int(bar.n), len(facts), "reviews scored")
        if gate is not None:
            check(counts, gate, _GATE)
        with JsonlWriter(output / "reviews.jsonl") as done, JsonlWriter(output / "failures.jsonl") as failed:
            # From the journal alone: an interrupted attempt and an undisturbed one write the same bytes.
            for entry in journal.entries():
                row = entry.row()
                (failed if entry.failed else done).write(row if entry.failed else facts[row["review_id"]] | row)


def _sample(papers: list[PaperReviews], max_reviews: int) -> list[PaperReviews]:
    kept, count = set(), 0
    for paper, reviews in sorted(papers, key=lambda item: hashlib.sha256(item[0]["paper_id"].encode()).digest()):
        count += len(reviews)
        # Ends at the first paper that does not fit: passing over it would prefer papers with few reviews.
        if count > max_reviews:
            break
        kept.add(paper["paper_id"])
    return [item for item in papers if item[0]["paper_id"] in kept]


def _behind(papers: Sequence[PaperReviews], num_done: int) -> Iterator[PaperReviews]:
    for paper, reviews in papers:
        rest = reviews[num_done:]
        num_done = max(0, num_done - len(reviews))
        if rest:
            yield paper, rest


def _outcomes(papers: Iterator[PaperReviews], open_engine: Callable[[], Engine], work: Path) -> Iterator[Outcome]:
    """The engine, which may take minutes to load, is opened only where something is left to score."""
    first = next(papers, None)
    if first is not None:
        engine = open_engine()
        engine.remember(work)
        yield from engine.score(chain([first], papers))
        engine.tell_costs()


def _row(outcome: Outcome) -> dict[str, Any]:
    ids = {"review_id": outcome.review_id, "paper_id": outcome.paper_id}
    if outcome.failure is not None:
        return {**ids, "reason": outcome.failure}
    mass = {name: [answer["mass"]] if "mass" in answer else [] for name, answer in outcome.answers.items()}
    answers = {name: [int(answer["yes"]), answer["p_yes"], *mass[name]] for name, answer in outcome.answers.items()}
    return {**ids, "answers": answers}


def _count(counts: AnswerCounts, row: Mapping[str, Any]) -> None:
    """Take in a row that has answers, those of earlier attempts too: a rerun does not get round the gate."""
    if "answers" in row:
        found: dict[str, Answer] = {}
        for name, (yes, p_yes, *mass) in row["answers"].items():
            found[name] = {"yes": bool(yes), "p_yes": p_yes}
            if mass:
                found[name]["mass"] = mass[0]
        counts.add(found)


def _facts(paper: Paper, review: Review) -> dict[str, Any]:
    return {
        "review_id": review["review_id"], "paper_id": paper["paper_id"], "rating": common_rating(review),
        "confidence": review["confidence"], "decision": paper["decision"], "num_words": len(review["text"].split()),
    }  # fmt: skip
