"""Comparing models: pairing, correction, win rates, length, and refusals."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from prefmill.core.errors import InputError
from prefmill.core.statistics import Resampling
from prefmill.evaluation.comparison import compare, difference_at_equal_length, win_rates

QUICK = Resampling(2000)


def evaluated(model: str, scores: dict[str, list[float]], modality: str = "clean", **changes: Any) -> dict[str, Any]:
    """A metrics.json as far as comparing reads it."""
    papers = [
        {
            "paper_id": key,
            "rating": 5.0,
            "human_rating": 6.0,
            "measures": {"checkmark_score": float(np.mean(values)), "num_words": 10.0 * float(np.mean(values))},
            "items": {"q": min(1.0, float(np.mean(values)) / 10)},
            "factors": {},
            "confusion": [1, 0, 1],
            "scores": values,
            "words": [int(10 * value) for value in values],
        }
        for key, values in scores.items()
    ]
    heading = {"model": model, "modality": modality, "engine": "e", "checklist": "c", "accept_rating": 6.0}
    overall = {"repeated_reviews": 0.0, "num_empty": 0}
    return {**heading, "max_score": 10.0, "num_papers": len(papers), "overall": overall, "papers": papers, **changes}


def scores(shift: float, num_papers: int = 20, seed: int = 0) -> dict[str, list[float]]:
    """Two reviews per paper; papers differ, and the two models' reviews of a paper go together."""
    draw = np.random.default_rng(0)
    noise = np.random.default_rng(seed + 1)
    return {
        f"p{index:02}": [float(draw.normal(5, 2) + shift + noise.normal(0, 0.3)) for _ in range(2)]
        for index in range(num_papers)
    }


def test_models_are_ordered_and_people_are_no_side_of_a_pair() -> None:
    given = [evaluated(model, scores(0, seed=i)) for i, model in enumerate(("zeta", "dpo", "human", "base", "sft"))]
    (clean,) = compare(given, QUICK)["modalities"]
    assert [item["model"] for item in clean["models"]] == ["human", "base", "sft", "dpo", "zeta"]
    pairs = [(pair["baseline"], pair["candidate"]) for pair in clean["pairs"]]
    assert pairs == list(combinations(("base", "sft", "dpo", "zeta"), 2))


def test_a_difference_is_taken_paper_by_paper() -> None:
    before, after = scores(0), scores(0.5, seed=1)
    (clean,) = compare([evaluated("base", before), evaluated("dpo", after)], QUICK)["modalities"]
    (pair,) = clean["pairs"]
    found = pair["measures"]["checkmark_score"]
    gaps = [np.mean(after[key]) - np.mean(before[key]) for key in before]
    assert found["value"] == pytest.approx(np.mean(gaps), abs=1e-5)
    spread = np.std(gaps, ddof=1) / 20**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * 2.093 * spread, rel=0.15)  # t(0.975, 19)
    assert found["low"] > 0
    assert found["num_papers"] == 20
    # Unpaired, the papers' own spread would drown it.
    models = {item["model"]: item["measures"]["checkmark_score"] for item in clean["models"]}
    assert models["dpo"]["low"] < models["base"]["high"]


def test_only_papers_that_every_model_reviewed_are_compared() -> None:
    more = scores(0, 25)
    (clean,) = compare([evaluated("base", more), evaluated("dpo", scores(1, 20))], QUICK)["modalities"]
    assert clean["num_papers"] == 20
    assert {item["model"]: item["num_papers_evaluated"] for item in clean["models"]} == {"base": 25, "dpo": 20}
    assert clean["pairs"][0]["measures"]["checkmark_score"]["num_papers"] == 20


def test_families_are_corrected_over_all_pairs_and_modalities() -> None:
    models = [
        evaluated(model, scores(shift, seed=seed), modality)
        for modality in ("clean", "vision")
        for seed, (model, shift) in enumerate((("base", 0), ("sft", 0.1), ("dpo", 0.2)))
    ]
    compared = compare(models, QUICK)["modalities"]
    primary = [pair["measures"]["checkmark_score"] for part in compared for pair in part["pairs"]]
    assert {entry["family_size"] for entry in primary} == {6}
    smallest = min(primary, key=lambda entry: float(entry["p_value"]))
    assert smallest["p_holm"] == pytest.approx(min(1, 6 * smallest["p_value"]), abs=1e-5)
    assert all(entry["p_holm"] >= entry["p_value"] for entry in primary)
    assert compared[0]["pairs"][0]["measures"]["num_words"]["family_size"] == 6
    assert compared[0]["pairs"][0]["items"][0]["family_size"] == 6


def test_the_same_input_gives_the_same_numbers() -> None:
    given = [evaluated("base", scores(0)), evaluated("dpo", scores(1, seed=1))]
    assert compare(given, QUICK) == compare(given[::-1], QUICK)


def test_win_rates_look_at_all_meetings_of_a_paper() -> None:
    rates = win_rates([[1.0, 3.0], [2.0]], [[2.0, 3.0], [2.0, 2.0]])
    assert rates.tolist() == [(1 + 1 + 0 + 0.5) / 4, 0.5]


def test_what_length_explains_is_taken_off() -> None:
    draw = np.random.default_rng(3)
    words = draw.uniform(50, 150, 200)
    longer = draw.uniform(100, 200, 200)
    noise, other = draw.normal(0, 0.5, 200), draw.normal(0, 0.5, 200)
    only_length = difference_at_equal_length((words, words / 10 + noise), (longer, longer / 10 + other), QUICK)
    assert only_length is not None
    assert only_length.low < 0 < only_length.high
    better = difference_at_equal_length((words, words / 10 + noise), (longer, longer / 10 + other + 2), QUICK)
    assert better is not None
    assert better.value == pytest.approx(2, abs=0.2)
    assert better.low > 1.5
    constant = np.full(200, 80.0)
    assert difference_at_equal_length((constant, noise), (constant, other), QUICK) is None


def test_scores_of_different_checklists_are_not_compared() -> None:
    for key in ("checklist", "engine", "accept_rating"):
        with pytest.raises(InputError, match=f"differ in {key}"):
            compare([evaluated("base", scores(0)), evaluated("dpo", scores(0), **{key: "other"})], QUICK)


def test_two_evaluations_under_one_label_are_refused() -> None:
    with pytest.raises(InputError, match="same model label"):
        compare([evaluated("dpo", scores(0)), evaluated("dpo", scores(0))], QUICK)


def test_evaluations_without_a_common_paper_are_refused() -> None:
    other = {f"q{key}": values for key, values in scores(0).items()}
    with pytest.raises(InputError, match="no paper in common"):
        compare([evaluated("base", scores(0)), evaluated("dpo", other)], QUICK)
