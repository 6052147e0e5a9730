"""Models against each other on the same papers: differences with intervals, corrected for their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, groupby
from typing import Any

import numpy as np

from prefmill.core.errors import InputError
from prefmill.core.statistics import Array, Estimate, Resampling, f1, holm, means, statistic, within
from prefmill.evaluation.metrics import CHECKMARK_SCORE, DIGITS, MEASURES, rank_correlation, rating_rank_correlation
from prefmill.evaluation.rows import HUMAN

ORDER = (HUMAN, "base", "sft", "dpo")
Evaluated = Mapping[str, Any]  # the content of a metrics.json


def compare(evaluations: Sequence[Evaluated], resampling: Resampling) -> dict[str, Any]:
    """The content of comparison.json: every model with intervals, and every two models of a modality compared.

    Models are compared on the papers that all of them reviewed. Holm's correction runs over all pairs of the
    checklist score (the question asked), over all pairs and other measures, and over all pairs and items. Human
    reviews are a reference point and no side of a pair. Raises InputError where scores cannot be compared.
    """
    groups = _by_modality(evaluations)
    comparisons = [_compare_modality(modality, group, resampling) for modality, group in groups.items()]
    pairs = [pair for comparison in comparisons for pair in comparison["pairs"]]
    _correct(pair["measures"][CHECKMARK_SCORE.name] for pair in pairs)
    _correct(value for pair in pairs for name, value in pair["measures"].items() if name != CHECKMARK_SCORE.name)
    _correct(item for pair in pairs for item in pair["items"])
    return {
        "num_resamples": resampling.num_resamples,
        "confidence": resampling.confidence,
        "seed": resampling.seed,
        "modalities": comparisons,
    }


def win_rates(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Array:
    """How often the candidate's review scores above the baseline's on the same paper, ties counting half, [P].

    Each argument holds every paper's scores; all pairs of reviews of a paper are looked at.
    """
    shares = []
    for before, after in zip(baseline, candidate, strict=True):
        gaps = np.subtract.outer(np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64))
        shares.append(((gaps > 0) + (gaps == 0) / 2).mean())
    return np.array(shares, dtype=np.float64)


def difference_at_equal_length(
    baseline: tuple[Array, Array], candidate: tuple[Array, Array], resampling: Resampling
) -> Estimate | None:
    """The difference in score beyond what length alone explains; each side is (words [P], score [P]) by paper.

    Analysis of covariance: the slope of score on words within the models, pooled over both, times the difference in
    words is taken off. None when no model's reviews differ in length. A model that gains by writing more useful text
    loses that part too, so this is a lower reading, not the truth.
    """
    words, scores = [np.stack([before, after], axis=1) for before, after in zip(baseline, candidate, strict=True)]
    if not np.ptp(words, axis=0).any():
        return None
    # Squares and products are averaged as well, so that every resample has a slope of its own.
    columns = np.concatenate([words, scores, words * words, words * scores], axis=1)

    def adjusted(drawn: Array) -> Array:
        mean_words, mean_scores, squares, products = (drawn[:, start : start + 2] for start in (0, 2, 4, 6))
        spread = (squares - mean_words**2).sum(axis=1)
        # A resample of papers alike in length has no slope, and nothing is taken off.
        slope = np.divide(
            (products - mean_words * mean_scores).sum(axis=1), spread, out=np.zeros_like(spread), where=spread > 1e-9
        )
        gaps: Array = (mean_scores[:, 1] - mean_scores[:, 0]) - slope * (mean_words[:, 1] - mean_words[:, 0])
        return gaps

    return statistic(columns, resampling, adjusted)


def model_order(label: str) -> tuple[int, str]:
    """The order in which models are shown: human, base, sft, dpo, then others by name."""
    return (ORDER.index(label) if label in ORDER else len(ORDER), label)


def _by_modality(evaluations: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    ordered = sorted(evaluations, key=lambda item: (item["modality"], model_order(item["model"])))
    groups = {modality: list(group) for modality, group in groupby(ordered, key=lambda item: item["modality"])}
    for modality, group in groups.items():
        labels = [item["model"] for item in group]
        if len(set(labels)) < len(labels):
            raise InputError(
                f"two evaluations of modality {modality} have the same model label", got=", ".join(labels),
                fix="give each model its own label in the evaluate stage's `model`",
            )  # fmt: skip
        for key in ("checklist", "engine", "accept_rating", "rating_unit"):
            _require_same(group, key, modality)
    return groups


def _require_same(group: Sequence[Evaluated], key: str, modality: str) -> None:
    values = {item["model"]: item.get(key) for item in group}
    if len(set(map(str, values.values()))) > 1:
        raise InputError(
            f"the evaluations of modality {modality} differ in {key}: their scores cannot be compared",
            got=", ".join(f"{model}: {value}" for model, value in values.items()),
            fix="evaluate every model with the same engine, checklist and accept_rating",
        )  # fmt: skip


def _compare_modality(modality: str, group: Sequence[Evaluated], resampling: Resampling) -> dict[str, Any]:
    papers = _shared_papers(modality, group)
    rows = {item["model"]: _rows(item, papers) for item in group}
    models = [model for model in rows if model != HUMAN]
    return {
        "modality": modality,
        "engine": group[0]["engine"],
        "max_score": group[0]["max_score"],
        "num_papers": len(papers),
        "models": [_describe(item, rows[item["model"]], resampling) for item in group],
        "pairs": [_compare_pair(before, after, rows, resampling) for before, after in combinations(models, 2)],
    }


def _shared_papers(modality: str, group: Sequence[Evaluated]) -> list[str]:
    shared = set.intersection(*({row["paper_id"] for row in item["papers"]} for item in group))
    if not shared:
        raise InputError(
            f"the evaluations of modality {modality} have no paper in common",
            got=", ".join(item["model"] for item in group),
            fix="evaluate every model on the same corpus with the same num_papers and seed",
        )  # fmt: skip
    # In one order for all models: their rows are paired by place.
    return sorted(shared)


def _rows(evaluated: Evaluated, papers: Sequence[str]) -> list[Mapping[str, Any]]:
    by_paper = {row["paper_id"]: row for row in evaluated["papers"]}
    return [by_paper[paper] for paper in papers]


def _describe(evaluated: Evaluated, rows: Sequence[Mapping[str, Any]], resampling: Resampling) -> dict[str, Any]:
    pairs = [(words, score) for row in rows for words, score in zip(row["words"], row["scores"], strict=True)]
    return {
        "model": evaluated["model"],
        "num_reviews": len(pairs),
        "num_papers_evaluated": evaluated["num_papers"],
        "measures": {
            measure.name: _mean(values, resampling, measure.is_share)
            for measure, values in ((item, _present(rows, item.name)) for item in MEASURES)
            # A measure that a single paper has is left out, as it has no interval.
            if len(values) > 1
        },
        "recommendation_f1": _f1(rows, resampling),
        "rating_rank_correlation": None if evaluated["model"] == HUMAN else rating_rank_correlation(rows),
        "words_score_correlation": rank_correlation([pair[0] for pair in pairs], [pair[1] for pair in pairs]),
        "repeated_reviews": evaluated["overall"]["repeated_reviews"],
        "num_empty": evaluated["overall"]["num_empty"],
        "items": _column_means(rows, "items", resampling),
        "factors": _column_means(rows, "factors", resampling),
    }


def _present(rows: Sequence[Mapping[str, Any]], name: str) -> Array:
    """[P, 1] of the papers that have the measure."""
    return np.array([[row["measures"][name]] for row in rows if name in row["measures"]], dtype=np.float64)


def _f1(rows: Sequence[Mapping[str, Any]], resampling: Resampling) -> dict[str, Any] | None:
    """F1 of "accepted" over reviews; a resample without any accepted or recommended paper counts as 0."""
    counts = np.array([row["confusion"] for row in rows if row["confusion"] is not None], dtype=np.float64)
    if len(counts) < 2 or not counts.any():
        return None
    return _interval(within(statistic(counts, resampling, partial(f1, otherwise=0.0)), resampling))


def _column_means(rows: Sequence[Mapping[str, Any]], column: str, resampling: Resampling) -> list[dict[str, Any]]:
    """The mean over papers of every entry of `column` (items, factors), all papers having the same ones."""
    keys = list(rows[0][column])
    if not keys:
        return []
    values = np.array([[row[column][key] for key in keys] for row in rows])
    return [
        {"id": key, **_interval(within(found, resampling))}
        for key, found in zip(keys, means(values, resampling), strict=True)
    ]


def _compare_pair(
    before: str, after: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], resampling: Resampling
) -> dict[str, Any]:
    first, second = rows[before], rows[after]
    measures = {item.name: _difference(first, second, item.name, resampling, item.is_share) for item in MEASURES}
    wins = win_rates([row["scores"] for row in first], [row["scores"] for row in second])
    equal_length = difference_at_equal_length(_length_and_score(first), _length_and_score(second), resampling)
    return {
        "baseline": before,
        "candidate": after,
        "measures": {name: value for name, value in measures.items() if value is not None},
        "win_rate": _mean(wins[:, None], resampling, True),
        "at_equal_length": _interval(equal_length) if equal_length else None,
        "items": _item_differences(first, second, resampling),
    }


def _difference(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    name: str,
    resampling: Resampling,
    is_share: bool,
) -> dict[str, Any] | None:
    both = [
        (before["measures"][name], after["measures"][name])
        for before, after in zip(first, second, strict=True)
        if name in before["measures"] and name in after["measures"]
    ]
    # One paper has no interval, and would be refused with the whole comparison.
    if len(both) < 2:
        return None
    pairs = np.array(both, dtype=np.float64)
    (found,) = means(pairs[:, 1:] - pairs[:, :1], resampling)
    # A difference of two shares lies between -1 and 1.
    return _tested(within(found, resampling, -1.0) if is_share else found)


def _item_differences(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], resampling: Resampling
) -> list[dict[str, Any]]:
    keys = list(first[0]["items"])
    gaps = [
        [after["items"][key] - before["items"][key] for key in keys]
        for before, after in zip(first, second, strict=True)
    ]
    found = means(np.array(gaps, dtype=np.float64), resampling)
    return [{"id": key, **_tested(within(item, resampling, -1.0))} for key, item in zip(keys, found, strict=True)]


def _length_and_score(rows: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
    return (
        np.array([row["measures"]["num_words"] for row in rows], dtype=np.float64),
        np.array([row["measures"]["checkmark_score"] for row in rows], dtype=np.float64),
    )


def _mean(values: Array, resampling: Resampling, is_share: bool) -> dict[str, Any]:
    """The mean of `values` [P, 1] with its interval; a share's ends where shares do."""
    (found,) = means(values, resampling)
    return _interval(within(found, resampling) if is_share else found)


def _interval(estimate: Estimate) -> dict[str, Any]:
    rounded = {name: round(getattr(estimate, name), DIGITS) for name in ("value", "low", "high")}
    return {**rounded, "num_papers": estimate.num_papers}


def _tested(estimate: Estimate) -> dict[str, Any]:
    return {**_interval(estimate), "p_value": round(estimate.p_value, DIGITS)}


def _correct(tested: Iterable[dict[str, Any]]) -> None:
    family = list(tested)
    for entry, adjusted in zip(family, holm([entry["p_value"] for entry in family]), strict=True):
        entry["p_holm"] = round(adjusted, DIGITS)
        entry["family_size"] = len(family)
