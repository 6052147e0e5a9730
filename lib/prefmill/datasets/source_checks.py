"""Checks of the rows against the corpus and the scores they were made from, in one streaming pass over all of them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from prefmill.checklist.scored import evaluations_by_paper
from prefmill.core.artifact import Artifact
from prefmill.core.records import EvaluationScores, Paper, Review
from prefmill.datasets.cross_checks import Leaks
from prefmill.datasets.examples import CheckedRow, read_examples
from prefmill.datasets.findings import Findings
from prefmill.datasets.occurrences import fingerprint
from prefmill.datasets.registry import DatasetKey
from prefmill.datasets.survey import Rank, rank
from prefmill.reviews.join import PAPERS, REVIEWS, papers_with_reviews
from prefmill.reviews.prompt import neutralise, review_completion
from prefmill.reviews.scale import common_rating, scale_of


@dataclass(frozen=True)
class Claims:
    """What the datasets' summary says they were selected by."""

    cut: Rank
    decisions: frozenset[str]


class Source(NamedTuple):
    """A paper of the corpus with its reviews, and where there are scores their evaluations, by review id."""

    paper: Paper
    reviews: Mapping[str, Review]
    evaluations: Mapping[str, EvaluationScores] | None


def check_against_source(
    folder: Path,
    keys: Sequence[DatasetKey],
    corpus: Artifact,
    scores: Sequence[Artifact],
    claims: Claims,
    findings: Findings,
    leaks: Leaks,
) -> None:
    """Compare the rows of well-formed, sorted datasets with their source; note held-out papers in `leaks`."""
    lines = _Lines()
    num_papers = next(entry.rows for entry in corpus.manifest.files if entry.path == PAPERS)
    sources = tqdm(_sources(corpus, scores), "checking source", num_papers, unit="paper", mininterval=1.0)
    rows = groupby(_merged(folder, keys), attrgetter("paper_id"))
    # Of one paper the source comes first. A group is used up before the next is asked for: groupby then empties it.
    merged: Iterator[tuple[str, Source | Iterator[CheckedRow]]] = heapq.merge(
        ((one.paper["paper_id"], one) for one in sources), rows, key=itemgetter(0)
    )
    paper: Source | None = None
    for paper_id, found in merged:
        if isinstance(found, Source):
            paper = found
            lines.advance(paper)
            # Train and val are noted where the datasets' rows are read; these papers are in no dataset.
            if paper.paper["split"] in ("dev", "test"):
                _note_held_out(paper, leaks, lines)
        elif paper is None or paper.paper["paper_id"] != paper_id:
            _report_unknown(found, findings)
        else:
            for example in found:
                for problem in source_problems(example, paper, claims):
                    findings.error("source", example.where, problem)


def source_problems(example: CheckedRow, source: Source, claims: Claims) -> Iterator[str]:
    """How a row differs from its paper, its reviews and their evaluations."""
    paper = source.paper
    if paper["split"] != example.key.split:
        yield f"its paper {paper['paper_id']} is of split {paper['split']}"
    if example.key.kind == "dpo" and (paper["decision"] or "unknown") not in claims.decisions:
        yield f"its paper {paper['paper_id']} is {paper['decision']}, not {' or '.join(sorted(claims.decisions))}"
    missing = [review_id for review_id in example.review_ids if review_id not in source.reviews]
    if missing:
        yield f"review {missing[0]} is not one of paper {paper['paper_id']}"
        return
    for review_id, answer in zip(example.review_ids, example.answers, strict=True):
        if answer.completion != review_completion(source.reviews[review_id], scale_of(paper)):
            yield f"the completion is not what review {review_id} says in the corpus"
    yield from _difference_problems(example, source)
    if example.key.kind == "sft" and source.evaluations is not None:
        yield from _cut_problems(source.evaluations.get(example.row_id), claims.cut)


def _difference_problems(example: CheckedRow, source: Source) -> Iterator[str]:
    if example.key.kind != "dpo":
        return
    chosen, rejected = example.review_ids
    rating_diff = common_rating(source.reviews[chosen]) - common_rating(source.reviews[rejected])
    yield from _unequal("rating_diff", example.rating_diff, rating_diff)
    if source.evaluations is None:
        return
    if chosen not in source.evaluations or rejected not in source.evaluations:
        yield "a review of the pair has no evaluation"
        return
    found = (source.evaluations[item]["checkmark_score"] for item in (chosen, rejected))
    yield from _unequal("checkmark_diff", example.checkmark_diff, next(found) - next(found))


def _unequal(name: str, recorded: float | None, derived: float) -> Iterator[str]:
    if recorded is None or not math.isclose(recorded, derived, abs_tol=1e-5):  # rows are rounded to six digits
        yield f"{name} is {recorded}, but the source gives {derived:g}"


def _cut_problems(evaluation: EvaluationScores | None, cut: Rank) -> Iterator[str]:
    if evaluation is None:
        yield "the review has no evaluation"
    elif rank(evaluation) > cut:
        score = evaluation["checkmark_score"]
        yield f"the review's checkmark score {score:g} is below the SFT cut at {-cut.minus_checkmark_score:g}"


def _sources(corpus: Artifact, scores: Sequence[Artifact]) -> Iterator[Source]:
    evaluations = evaluations_by_paper(scores) if scores else None
    for paper, reviews in papers_with_reviews(corpus):
        found = None if evaluations is None else evaluations.take(paper["paper_id"])
        by_id = None if found is None else {evaluation["review_id"]: evaluation for evaluation in found}
        yield Source(paper, {review["review_id"]: review for review in reviews}, by_id)


def _merged(folder: Path, keys: Iterable[DatasetKey]) -> Iterator[CheckedRow]:
    """The rows of all datasets, by paper."""
    # Needs every dataset sorted by paper: validate.py comes here only where no error of order was found.
    return heapq.merge(*(_examples(folder, key) for key in keys), key=attrgetter("paper_id"))


def _examples(folder: Path, key: DatasetKey) -> Iterator[CheckedRow]:
    for _, example in read_examples(folder, key):
        assert isinstance(example, CheckedRow), "format errors are found before"
        yield example


def _report_unknown(rows: Iterable[CheckedRow], findings: Findings) -> None:
    for example in rows:
        findings.error("source", example.where, f"paper {example.paper_id} is not in the corpus")


class _Lines:
    """The line of the paper and of its first review in the corpus, for the reports."""

    def __init__(self) -> None:
        self.paper, self.review, self._next_review = 0, 1, 1

    def advance(self, source: Source) -> None:
        self.paper += 1
        self.review = self._next_review
        self._next_review += len(source.reviews)


def _note_held_out(source: Source, leaks: Leaks, lines: _Lines) -> None:
    paper = source.paper
    said = neutralise(paper["title"]), neutralise(paper["abstract"])  # as prompts have them
    leaks.add_paper(paper["split"], paper["paper_id"], said, f"corpus {PAPERS}", lines.paper)
    for number, review in enumerate(source.reviews.values(), lines.review):
        key = fingerprint(review["text"])
        leaks.add_review(paper["split"], review["text"], key, f"corpus {REVIEWS}", number)
