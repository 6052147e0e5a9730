"""How far each change of a review moved a judge: shifts of scores and probabilities, and answers turned over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefmill.checklist.agreement import agreement, mean_shift
from prefmill.checklist.calibration import tempered
from prefmill.checklist.judge_probes import CONTROL, END, FRONT, INJECTIONS, PADDED, UNCHANGED
from prefmill.checklist.judge_scores import Judge
from prefmill.core.statistics import Array, Resampling

Found = dict[str, Any]
_DIGITS = 6


@dataclass(frozen=True)
class Probed:
    """A review's answers under one variant: yes and P(yes) of the checklist's items [K], and by id of all asked."""

    paper_id: str
    item_id: str | None
    yes: Array
    p_yes: Array
    all: Mapping[str, tuple[float, float]]


def measure_probes(
    rows: Iterable[Mapping[str, Any]], judge: Judge, restated: Mapping[str, Sequence[str]], resampling: Resampling
) -> Found:
    """What the probes found of `judge`: keys repeat, paraphrases, position, padding, control and injections.

    A measure without a review to be taken on is None. `restated` names each item's paraphrases.
    """
    rows = list(rows)
    by_variant: dict[str, dict[str, Probed]] = {}
    for row in rows:
        if row["answers"] is not None:
            by_variant.setdefault(row["variant"], {})[row["review_id"]] = _probed(row, judge)
    unchanged = by_variant.get(UNCHANGED, {})
    weights = np.array([item.weight for item in judge.checklist.items])

    def shift(variant: str) -> Found | None:
        changed = by_variant.get(variant, {})
        # Only where both were answered: else the means would be of different reviews.
        return _shift([(unchanged[key], changed[key]) for key in changed if key in unchanged], weights, resampling)

    return {
        "judge": judge.name,
        "engine": judge.engine,
        "num_reviews": len({row["review_id"] for row in rows}),
        "num_asked": len(rows),
        "num_failed": sum(row["answers"] is None for row in rows),
        # Against the stored answers: what moves where nothing was changed is the judge's own noise.
        "repeat": _shift([(_stored(judge, key), item) for key, item in unchanged.items()], weights, resampling),
        "paraphrases": _paraphrases(list(unchanged.values()), restated, judge, resampling),
        "position": _position(by_variant.get(FRONT, {}), by_variant.get(END, {}), judge, resampling),
        "padding": shift(PADDED),
        "control": shift(CONTROL),
        "injections": {name: shift(name) for name in INJECTIONS},
    }


def _probed(row: Mapping[str, Any], judge: Judge) -> Probed:
    names = list(row["answers"])
    yes, p_yes = np.array([row["answers"][name] for name in names], dtype=np.float64).T
    if judge.temperature is not None:  # as the stored answers are
        p_yes = tempered(p_yes, judge.temperature)
    answers = dict(zip(names, zip(yes.tolist(), p_yes.tolist(), strict=True), strict=True))
    own = np.array([answers[name] for name in judge.checklist.ids])
    return Probed(row["paper_id"], row["item_id"], own[:, 0], own[:, 1], answers)


def _stored(judge: Judge, review_id: str) -> Probed:
    scored = judge.by_id[review_id]
    return Probed(scored.paper_id, None, np.array(scored.yes), np.array(scored.p_yes), {})


def _shift(pairs: Sequence[tuple[Probed, Probed]], weights: Array, resampling: Resampling) -> Found | None:
    """What changed from the first of each pair to the second."""
    if not pairs:
        return None
    papers = [before.paper_id for before, _ in pairs]
    p_shifts = np.array([after.p_yes - before.p_yes for before, after in pairs])
    yes_shifts = np.array([after.yes - before.yes for before, after in pairs])
    scores = yes_shifts @ weights
    return {
        "num_reviews": len(pairs),
        "score": mean_shift(papers, scores, resampling),
        "p_yes": mean_shift(papers, p_shifts.mean(axis=1), resampling),
        "max_score": _largest(scores),
        "max_p_yes": _largest(p_shifts.mean(axis=1)),
        "max_answer": _largest(p_shifts),
        "flips": round(float(np.abs(yes_shifts).mean()), _DIGITS),
    }


def _position(
    first: Mapping[str, Probed], last: Mapping[str, Probed], judge: Judge, resampling: Resampling
) -> Found | None:
    """P(yes) of the moved sentence's item where it stands first, less where it stands last."""
    # First against last: two texts of the same words, so that the place alone differs.
    both = [(first[key], last[key]) for key in first if key in last]
    if not both:
        return None
    places = [judge.checklist.ids.index(str(item.item_id)) for item, _ in both]
    shifts = np.array([a.p_yes[k] - b.p_yes[k] for (a, b), k in zip(both, places, strict=True)])
    flips = np.array([a.yes[k] != b.yes[k] for (a, b), k in zip(both, places, strict=True)])
    return {
        "num_reviews": len(both),
        "p_yes": mean_shift([item.paper_id for item, _ in both], shifts, resampling),
        "mean_absolute": round(float(np.abs(shifts).mean()), _DIGITS),
        "max_answer": _largest(shifts),
        "flips": round(float(flips.mean()), _DIGITS),
    }


def _paraphrases(
    reviews: Sequence[Probed], restated: Mapping[str, Sequence[str]], judge: Judge, resampling: Resampling
) -> Found | None:
    """Each item against its other wordings, on the reviews as they are."""
    found = {
        name: [(review.paper_id, review.all[name], review.all[other]) for review in reviews for other in others]
        for name, others in restated.items()
        if others and reviews
    }
    if not found:
        return None
    questions = {item.id: item.question for item in judge.checklist.items}
    items = [{"id": name, "question": questions[name], **_wordings(pairs, resampling)} for name, pairs in found.items()]
    return {**_wordings([pair for pairs in found.values() for pair in pairs], resampling), "items": items}


def _wordings(pairs: Sequence[tuple[str, tuple[float, float], tuple[float, float]]], resampling: Resampling) -> Found:
    answers = np.array([(*one, *other) for _, one, other in pairs])
    papers = [paper for paper, _, _ in pairs]
    return {
        **agreement(papers, answers[:, 0], answers[:, 2], resampling),
        **probability_gaps(answers[:, 1], answers[:, 3]),
    }


def probability_gaps(first: Array, second: Array) -> Found:
    """The mean and the largest distance of two judges' P(yes), [N] each."""
    gaps = np.abs(first - second)
    return {"mean_gap": round(float(gaps.mean()), _DIGITS), "max_gap": round(float(gaps.max()), _DIGITS)}


def _largest(shifts: Array) -> float:
    """The shift that is farthest from 0, with its sign."""
    # Adding 0.0 turns minus zero, which would be printed as -0.0, into zero.
    return round(float(shifts.ravel()[np.abs(shifts).argmax()]), _DIGITS) + 0.0
