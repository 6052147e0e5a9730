"""The papers to evaluate on, what people wrote about them, and a model's reviews scored like theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from prefmill.checklist.engine import Engine
from prefmill.checklist.judge_gate import AnswerCounts, JudgeGate, check
from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.records import Modality, Paper, Review, ReviewEvaluation
from prefmill.evaluation.rows import Generation, PaperFacts
from prefmill.reviews.join import REVIEWS
from prefmill.reviews.prompt import review_images
from prefmill.reviews.scale import RatingUnit, VenueQuantiles, common_rating
from prefmill.reviews.text_statistics import words
from prefmill.store.jsonl import read_jsonl
from prefmill.store.missing import Progress, in_batches, kept_rows, silent

PAPERS_PER_BLOCK = 32  # what a kill costs at most, in papers


@dataclass(frozen=True)
class AcceptRule:
    """A `rating` from here on recommends acceptance: in points, or with `quantiles` its place among its venue's."""

    rating: float
    quantiles: VenueQuantiles | None = None

    @classmethod
    def of(cls, corpus: Artifact, rating: float, unit: RatingUnit) -> AcceptRule:
        """The rule in this unit; all of the corpus's reviews say how a venue rates."""
        return cls(rating, VenueQuantiles(read_jsonl(corpus.file(REVIEWS))) if unit == "quantiles" else None)

    def threshold(self, paper: Paper) -> float:
        """The rating, in points of 1 to 10."""
        return self.rating if self.quantiles is None else self.quantiles.rating_at(paper["venue"], self.rating)


@dataclass(frozen=True)
class HeldOut:
    """Papers of the test split, by id in sorted order, and the reviews people wrote of them.

    `is_generated` says that the corpus is the generator's, whose quality factors can be measured.
    """

    papers: Mapping[str, Paper]
    reviews: Mapping[str, tuple[Review, ...]]
    is_generated: bool

    def facts(self, accept: AcceptRule) -> dict[str, PaperFacts]:
        """Decision, human ratings and the rating that recommends acceptance, by paper."""
        ratings = {key: tuple(map(common_rating, self.reviews.get(key, ()))) for key in self.papers}
        return {
            key: PaperFacts(paper["decision"], ratings[key], accept.threshold(paper))
            for key, paper in self.papers.items()
        }


def read_held_out(corpus: Artifact, num_papers: int | None, seed: int, modality: Modality = "clean") -> HeldOut:
    """The corpus's test papers, or `num_papers` of them drawn by a hash of (seed, id): the same for every model.

    Of an image modality they are those with images for it. Raises InputError when there are none, or fewer than
    `num_papers`.
    """
    path = corpus.file("papers.jsonl")
    tested = (paper for paper in read_jsonl(path) if paper["split"] == "test")
    ids = [paper["paper_id"] for paper in tested if modality == "clean" or review_images(paper, modality)]
    if not ids or (num_papers is not None and len(ids) < num_papers):
        with_images = "" if modality == "clean" else f" with images for the modality {modality}"
        more = "give `test` a larger share in ingest_reviews, ingest more papers"
        if with_images:
            more += " and their PDFs or figures, set modality=clean"
        raise InputError(
            f"the corpus has too few test papers{with_images}", where=path, got=len(ids),
            expected=num_papers or "at least one", fix=f"{more}, or lower num_papers" if ids else more,
        )  # fmt: skip
    # By hash: a larger num_papers keeps all that a smaller one had.
    chosen = set(sorted(ids, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())[:num_papers])
    # Read a second time, so that the texts of papers not drawn never stand in memory.
    papers = {paper["paper_id"]: paper for paper in read_jsonl(path) if paper["paper_id"] in chosen}
    rows = (row for row in read_jsonl(corpus.file(REVIEWS)) if row["paper_id"] in chosen)
    reviews = {key: tuple(group) for key, group in groupby(rows, key=lambda row: str(row["paper_id"]))}
    sources = corpus.json("summary.json")["sources"]
    return HeldOut(papers, reviews, all(source["format"] == "generated" for source in sources))


def human_generations(held_out: HeldOut) -> list[Generation]:
    """The human reviews in the form of generated ones, as the reference point; papers nobody reviewed are left out."""
    return [
        {
            "paper_id": key, "sample": sample, "text": review["text"], "rating": common_rating(review),
            "decision": held_out.papers[key]["decision"], "truncated": False,
        }
        for key, reviews in held_out.reviews.items()
        for sample, review in enumerate(reviews)
    ]  # fmt: skip


def score_generations(
    generations: Sequence[Generation],
    papers: Mapping[str, Paper],
    engine: Engine,
    item_ids: Sequence[str],
    folder: Path,
    progress: Progress = silent,
    gate: JudgeGate | None = None,
) -> list[ReviewEvaluation]:
    """The checklist's answers for each of `generations`, in their order; finished blocks are kept in `folder`.

    A review without a word satisfies no item and is not shown to the engine: a model asked about nothing may say yes.
    Raises InputError where a model's answers do not pass the `gate`.
    """
    # Whole papers in a block: an engine reads a paper once for all of its reviews.
    by_paper = [list(group) for _, group in groupby(generations, key=lambda row: row["paper_id"])]
    blocks = [list(chain.from_iterable(rows)) for rows in in_batches(by_paper, PAPERS_PER_BLOCK)]

    engine.remember(folder)
    seen = AnswerCounts()

    def score(block: Sequence[Generation]) -> list[ReviewEvaluation]:
        # Of the blocks before: these are kept, for a rerun with another gate.
        if gate is not None and seen.num_reviews >= gate.after_reviews:
            check(seen, gate)
        rows = _score_block(block, papers, engine, item_ids)
        _count(seen, block, rows)
        return rows

    found = kept_rows(folder, "scored", blocks, score, progress, "reviews scored")
    engine.tell_costs()
    if gate is not None:
        counts = AnswerCounts()
        _count(counts, generations, found)
        check(counts, gate)
    return found


def _count(counts: AnswerCounts, generations: Sequence[Generation], rows: Sequence[ReviewEvaluation]) -> None:
    for generation, row in zip(generations, rows, strict=True):
        if words(generation["text"]):
            counts.add(row["answers"])


def _score_block(
    block: Sequence[Generation], papers: Mapping[str, Paper], engine: Engine, item_ids: Sequence[str]
) -> list[ReviewEvaluation]:
    written = groupby((row for row in block if words(row["text"])), key=lambda row: row["paper_id"])
    shown = ((papers[paper], [_as_review(row) for row in rows]) for paper, rows in written)
    scored = {evaluation["review_id"]: evaluation for evaluation in engine.evaluate(shown)}
    return [scored.get(_review_id(row)) or _empty_evaluation(row, item_ids) for row in block]


def _review_id(row: Generation) -> str:
    return f"{row['paper_id']}#{row['sample']}"


def _as_review(row: Generation) -> Review:
    """The generated text as a review; the engine reads text only, so a missing rating may stand as 0."""
    return {
        "review_id": _review_id(row), "paper_id": row["paper_id"], "text": row["text"], "rating": row["rating"] or 0.0,
        "confidence": None, "venue": "", "sub_scores": {},
    }  # fmt: skip


def _empty_evaluation(row: Generation, item_ids: Sequence[str]) -> ReviewEvaluation:
    assert not words(row["text"]), f"the engine left out review {_review_id(row)}"
    return {
        "review_id": _review_id(row),
        "paper_id": row["paper_id"],
        "answers": {item: {"yes": False, "p_yes": 0.0} for item in item_ids},
        "checkmark_score": 0.0,
        "mean_p_yes": 0.0,
        "engine": "none: the review is empty",
    }
