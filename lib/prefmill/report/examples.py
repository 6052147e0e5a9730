"""Reviews of the same paper by every model, side by side, chosen so that failures are shown as well."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.evaluation.comparison import model_order
from prefmill.store.jsonl import read_jsonl


@dataclass(frozen=True)
class AnsweredItem:
    """A checklist item's answer in one review, with what the engine pointed at."""

    question: str
    yes: bool
    p_yes: float
    evidence: str | None


@dataclass(frozen=True)
class ShownReview:
    """The first review of a paper by one model."""

    model: str
    text: str
    rating: float | None
    score: float
    answers: tuple[AnsweredItem, ...]

    @property
    def num_yes(self) -> int:
        """How many items are answered yes."""
        return sum(answer.yes for answer in self.answers)


@dataclass(frozen=True)
class PaperExample:
    """A paper, why it is shown, and the reviews of it."""

    paper_id: str
    reason: str
    title: str
    decision: str | None
    human_rating: float | None
    reviews: tuple[ShownReview, ...]


def choose_papers(
    baseline: Mapping[str, float], candidate: Mapping[str, float], count: int, seed: int
) -> dict[str, str]:
    """Up to `count` papers and the reason for each, from both models' scores by paper.

    The paper with the largest gain, the one with the smallest (a loss, where there is one), the one in the middle,
    then others by a hash of (seed, id).
    """
    # Ids break ties, so that the same scores show the same papers.
    shared = sorted(baseline.keys() & candidate.keys(), key=lambda key: (candidate[key] - baseline[key], key))
    if not shared:
        return {}
    chosen = {shared[-1]: "largest gain"}
    chosen.setdefault(shared[0], "smallest gain, or largest loss")
    chosen.setdefault(shared[len(shared) // 2], "middle")
    # By a hash and not a generator: a paper more or less does not change which others are drawn.
    for key in sorted(shared, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest()):
        chosen.setdefault(key, "drawn at random")
    return dict(list(chosen.items())[:count])


def read_examples(
    evaluations: Sequence[tuple[Mapping[str, Any], Artifact]], chosen: Mapping[str, str], corpus: Artifact | None
) -> list[PaperExample]:
    """The chosen papers with each model's first review; `evaluations` pairs metrics.json with its artifact."""
    titles = _titles(corpus, chosen)
    ordered = sorted(evaluations, key=lambda item: model_order(item[0]["model"]))
    reviews = {metrics["model"]: dict(_first_reviews(metrics, artifact, chosen)) for metrics, artifact in ordered}
    papers = {row["paper_id"]: row for metrics, _ in evaluations for row in metrics["papers"]}
    return [
        PaperExample(
            paper_id=key,
            reason=reason,
            title=titles.get(key, key),
            decision=papers[key]["decision"],
            human_rating=papers[key]["human_rating"],
            reviews=tuple(found[key] for found in reviews.values() if key in found),
        )
        for key, reason in chosen.items()
    ]


def _first_reviews(
    metrics: Mapping[str, Any], artifact: Artifact, chosen: Mapping[str, str]
) -> Iterator[tuple[str, ShownReview]]:
    questions = {item["id"]: item["question"] for item in metrics["items"]}
    generations = read_jsonl(artifact.file("generations.jsonl"))
    evaluations = read_jsonl(artifact.file("evaluations.jsonl"))
    for generation, evaluation in zip(generations, evaluations, strict=True):  # the same rows in the same order
        if generation["sample"] == 0 and generation["paper_id"] in chosen:
            yield generation["paper_id"], _shown(metrics["model"], generation, evaluation, questions)


def _shown(
    model: str, generation: Mapping[str, Any], evaluation: Mapping[str, Any], questions: Mapping[str, str]
) -> ShownReview:
    answers = (
        AnsweredItem(questions.get(key, key), answer["yes"], answer["p_yes"], answer.get("evidence"))
        for key, answer in evaluation["answers"].items()
    )
    return ShownReview(model, generation["text"], generation["rating"], evaluation["checkmark_score"], tuple(answers))


def _titles(corpus: Artifact | None, chosen: Mapping[str, str]) -> dict[str, str]:
    if corpus is None:
        return {}
    papers = read_jsonl(corpus.file("papers.jsonl"))
    return {paper["paper_id"]: paper["title"] for paper in papers if paper["paper_id"] in chosen}
