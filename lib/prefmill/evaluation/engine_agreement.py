"""How far a second scoring engine agrees with the first on the very reviews that were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefmill.checklist.agreement import agreement, mean_shift, rank_correlation
from prefmill.checklist.engine import AnyEngineConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import Checklist
from prefmill.checklist.judge_gate import JudgeGate
from prefmill.core.records import Paper, ReviewEvaluation
from prefmill.core.statistics import Resampling
from prefmill.distributed.isolation import in_own_process
from prefmill.evaluation.held_out import score_generations
from prefmill.evaluation.rows import Generation
from prefmill.reviews.text_statistics import words
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.missing import Progress, silent

SECOND_EVALUATIONS = "second_evaluations.jsonl"


def score_again(
    generations: Sequence[Generation],
    papers: Mapping[str, Paper],
    engine: AnyEngineConfig,
    checklist: Checklist,
    folder: Path,
    progress: Progress = silent,
    gate: JudgeGate | None = None,
) -> list[ReviewEvaluation]:
    """The second engine's answers, in the order of `generations`.

    They are given in a process of its own, as two models may not fit a GPU together; `folder` keeps what is done.
    """
    path = folder / SECOND_EVALUATIONS
    # It appears whole: an attempt that finds it loads no model.
    if not path.is_file():
        in_own_process(folder, _score, generations, papers, engine, checklist, folder, progress, gate)
    return list(read_jsonl(path))


def engine_agreement(
    generations: Sequence[Generation],
    first: Sequence[ReviewEvaluation],
    second: Sequence[ReviewEvaluation],
    resampling: Resampling,
) -> dict[str, Any] | None:
    """Agreement over all answers, and the second's scores beside the first's; None where every review is empty.

    Kappa and accuracy as in `checklist.agreement`; `distance` is the mean of |second - first| in points of the
    score, `shift` that of second - first. Empty reviews are left out: no engine is asked about them.
    """
    rows = [
        (one, other)
        for generation, one, other in zip(generations, first, second, strict=True)
        if words(generation["text"])
    ]
    if not rows:
        return None
    ids = list(rows[0][0]["answers"])
    by_review = [one["paper_id"] for one, _ in rows]
    answers = [
        np.array([[float(row["answers"][item]["yes"]) for item in ids] for row in side])
        for side in zip(*rows, strict=True)
    ]
    # Answers about one paper are alike: the bootstrap draws papers, or intervals would be too short.
    by_answer = [paper for paper in by_review for _ in ids]
    scores = [np.array([row["checkmark_score"] for row in side]) for side in zip(*rows, strict=True)]
    found = agreement(by_answer, answers[0].ravel(), answers[1].ravel(), resampling)
    return {
        "engine": rows[0][1]["engine"], "num_reviews": len(rows), "confidence": resampling.confidence,
        **{name: found[name] for name in ("kappa", "accuracy")},
        "distance": mean_shift(by_review, np.abs(scores[1] - scores[0]), resampling),
        "shift": mean_shift(by_review, scores[1] - scores[0], resampling),
        "rank_correlation": rank_correlation(by_review, scores[0], scores[1], resampling),
        "mean_score": mean_shift(by_review, scores[1], resampling)["value"],  # every paper counts the same
        "items": [
            {"id": item, **agreement(by_review, answers[0][:, place], answers[1][:, place], resampling)}
            for place, item in enumerate(ids)
        ],
    }  # fmt: skip


def _score(
    generations: Sequence[Generation],
    papers: Mapping[str, Paper],
    engine: AnyEngineConfig,
    checklist: Checklist,
    folder: Path,
    progress: Progress,
    gate: JudgeGate | None,
) -> None:
    opened = open_engine(engine, checklist)
    # The first engine keeps blocks under the same names one level up.
    blocks = folder / "second"
    blocks.mkdir(exist_ok=True)
    rows = score_generations(generations, papers, opened, checklist.ids, blocks, progress, gate)
    write_jsonl(folder / SECOND_EVALUATIONS, rows)
