"""An evaluation's files: the reviews, their answers, and everything measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.checklist.items import Checklist
from prefmill.core.files import digest_json, write_json
from prefmill.core.records import ReviewEvaluation
from prefmill.evaluation.held_out import AcceptRule, HeldOut
from prefmill.evaluation.metrics import measure
from prefmill.evaluation.rows import HUMAN, EvaluatedReview, Generation
from prefmill.reviews.generated import quality_factors
from prefmill.store.jsonl import write_jsonl

GENERATIONS, EVALUATIONS, METRICS = "generations.jsonl", "evaluations.jsonl", "metrics.json"


def write_evaluation(
    output: Path,
    heading: Mapping[str, Any],
    generations: Sequence[Generation],
    evaluations: Sequence[ReviewEvaluation],
    held_out: HeldOut,
    checklist: Checklist,
    accept: AcceptRule,
) -> dict[str, Any]:
    """Measure the reviews and write all three files; returns the content of metrics.json.

    `heading` says whose reviews these are and goes first. The generator's quality factors are measured on its own
    corpus only: elsewhere they mean nothing.
    """
    is_human = heading["model"] == HUMAN
    scored = [
        EvaluatedReview(row, answers, quality_factors(row["text"]) if held_out.is_generated else None, is_human)
        for row, answers in zip(generations, evaluations, strict=True)
    ]
    questions = {item.id: item.question for item in checklist.items}
    metrics = {
        **heading,
        # By this, models scored with different checklists are refused when they are compared.
        "checklist": digest_json(checklist.model_dump(mode="json")),
        "max_score": sum(max(0.0, item.weight) for item in checklist.items),
        "accept_rating": accept.rating,
        **({} if accept.quantiles is None else {"rating_unit": "quantiles"}),
        "num_papers": len({row["paper_id"] for row in generations}),
        "num_reviews": len(generations),
        **measure(scored, held_out.facts(accept), questions),
    }
    write_jsonl(output / GENERATIONS, generations)
    write_jsonl(output / EVALUATIONS, evaluations)
    # NaN is no JSON: one would make the whole file unreadable to a page.
    write_json(output / METRICS, metrics, ensure_ascii=False, allow_nan=False)
    return metrics
