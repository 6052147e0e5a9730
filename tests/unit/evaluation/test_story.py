"""The sentences: a verdict follows the corrected p-value, and every known reason to doubt is raised when it holds."""

from __future__ import annotations

from typing import Any

import pytest

from prefmill.report.story import data_doubts, judge, p_text, tell


def found(value: float, p_value: float, p_holm: float | None = None) -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.5, "high": value + 0.5, "num_papers": 50}
    return {**interval, "p_value": p_value, "p_holm": p_value if p_holm is None else p_holm}


def model(name: str, score: float, silent: bool = False, **measures: float) -> dict[str, Any]:
    values = {
        "checkmark_score": score,
        "num_words": 100.0,
        "has_rating": 1.0,
        "truncated": 0.0,
        "empty": 0.0,
        **measures,
    }
    described = {key: {"value": value, "low": value, "high": value} for key, value in values.items()}
    items = [{"id": "limits", "value": 0.5}, {"id": "seeds", "value": 0.0}]
    return {"model": name, "measures": described, "repeated_reviews": 0.0, "items": items[: 1 + silent]}


def pair(baseline: str, candidate: str, score: dict[str, Any], **measures: dict[str, Any]) -> dict[str, Any]:
    others = {"num_words": found(0, 1), **measures}
    return {
        "baseline": baseline,
        "candidate": candidate,
        "measures": {"checkmark_score": score, **others},
        "win_rate": {"value": 0.8},
        "at_equal_length": {"value": 0.4, "low": 0.1, "high": 0.7},
    }


def story(
    models: list[dict[str, Any]], pairs: list[dict[str, Any]], engine: str = "transformers", **heading: Any
) -> Any:
    compared = {
        "modality": "clean", "engine": engine, "max_score": 24.0, "num_papers": 50, "models": models, "pairs": pairs,
        **heading,
    }  # fmt: skip
    evaluations = [{"model": item["model"], "num_papers": 50, "training": None} for item in models]
    return tell(compared, evaluations, 0.95)


PROXY = "A checklist score is a proxy: it says that a review has the parts of a good one, not that they are right."


def test_a_gain_that_holds_after_correction_helped() -> None:
    told = story([model("base", 5), model("dpo", 7)], [pair("base", "dpo", found(2, 0.001, 0.003))])
    assert told.verdict == "helped"
    assert told.helped.startswith("Yes:")
    assert told.how_much == "The mean checklist score goes 5.00 (base), 7.00 (dpo), of at most 24."
    assert "dpo − base = +2.00 (+1.50 to +2.50), p = 0.003 after Holm's correction" in told.how_sure
    assert told.how_sure.endswith(" Parentheses hold 95% intervals.")
    assert told.doubts == (PROXY,)


def test_a_gain_that_does_not_hold_after_correction_is_not_claimed() -> None:
    told = story([model("base", 5), model("dpo", 7)], [pair("base", "dpo", found(2, 0.02, 0.06))])
    assert told.verdict == "unclear"
    assert told.helped.startswith("Not shown:")


def test_a_loss_is_called_one() -> None:
    told = story([model("base", 5), model("dpo", 3)], [pair("base", "dpo", found(-2, 0.001))])
    assert told.verdict == "hurt"
    assert told.helped.startswith("No:")


def test_people_are_the_reference_and_the_last_model_is_judged_against_the_first() -> None:
    models = [model("human", 9), model("base", 5), model("sft", 6), model("dpo", 7)]
    pairs = [
        pair("base", "sft", found(1, 0.001)),
        pair("base", "dpo", found(2, 0.001)),
        pair("sft", "dpo", found(1, 0.4)),
    ]
    told = story(models, pairs)
    assert "dpo − base" in told.how_sure
    assert told.how_much.endswith("Reviews by people score 9.00.")
    assert "The step from sft to dpo shows no effect of its own: +1.00, p = 0.400." in told.doubts
    assert not [doubt for doubt in told.doubts if "base to sft" in doubt]


def test_independent_factors_confirm_or_do_not() -> None:
    models = [model("base", 5), model("dpo", 7)]
    agree = story(models, [pair("base", "dpo", found(2, 0.001), num_factors=found(1.5, 0.001))])
    deny = story(models, [pair("base", "dpo", found(2, 0.001), num_factors=found(0.1, 0.7))])
    assert "does not know, agree: +1.50" in agree.how_sure
    assert "does not know, do not confirm it: +0.10" in deny.how_sure


@pytest.mark.parametrize(
    ("measures", "differences", "doubt"),
    [
        ({}, {"num_words": found(30, 0.001)}, "dpo writes 30% longer reviews than base; at equal length"),
        ({}, {"num_words": found(-30, 0.001)}, "30% shorter"),
        ({"truncated": 0.2}, {}, "20% of dpo's reviews were cut off"),
        ({"empty": 0.01}, {}, "1% of dpo's outputs are empty"),
        ({"has_rating": 0.9}, {}, "10% of dpo's reviews give no rating"),
    ],
)  # fmt: skip
def test_side_effects_are_doubts(measures: dict[str, float], differences: dict[str, Any], doubt: str) -> None:
    told = story([model("base", 5), model("dpo", 7, **measures)], [pair("base", "dpo", found(2, 0.001), **differences)])
    assert [text for text in told.doubts if doubt in text] == [told.doubts[0]]
    assert len(told.doubts) == 2


@pytest.mark.parametrize(
    ("name", "before", "after", "p_value", "harm"),
    [
        ("rating_error", 1.88, 3.35, 0.01, "Rating error: 1.88 → 3.35"),
        ("recommendation_correct", 0.488, 0.412, 0.01, "Recommendation accuracy: 48.8% → 41.2%"),
        ("repeated_4grams", 0.1, 0.3, 0.001, "Repeated 4-grams: 10.0% → 30.0%"),
        ("repeated_4grams", 0.1, 0.12, 0.001, None),
        ("rating_error", 1.88, 3.35, 0.2, None),
        ("rating_error", 3.35, 1.88, 0.01, None),
        ("num_words", 90.0, 30.0, 0.01, None),
    ],
)  # fmt: skip
def test_a_gain_with_a_harm_is_no_plain_yes(
    name: str, before: float, after: float, p_value: float, harm: str | None
) -> None:
    models = [model("base", 5, **{name: before}), model("dpo", 7, **{name: after})]
    differences = {name: found(after - before, p_value)}
    told = story(models, [pair("base", "dpo", found(2, 0.001), **differences)])
    # With the measure's meaning, as a first screen is read by those who never saw its name.
    assert [text.partition(" (")[0] for text in told.harms] == ([harm] if harm else [])
    assert all(text.endswith(")") and len(text) < 160 for text in told.harms)
    assert told.verdict == ("mixed" if harm else "helped")
    label = (harm or "").split(":")[0].lower()
    assert told.helped.endswith(f"but are worse in {label}." if harm else "than the base model's.")


def test_a_model_far_above_people_and_items_that_nobody_meets_are_doubts() -> None:
    models = [model("human", 7.0, silent=True), model("base", 5, silent=True), model("dpo", 12.7, silent=True)]
    told = story(models, [pair("base", "dpo", found(7.7, 0.001))])
    assert any("dpo's reviews score 12.70 where people's score 7.00: above people" in doubt for doubt in told.doubts)
    assert "1 of 2 items are met by no review: seeds." in told.doubts
    level = story([model("human", 7.0), model("base", 5), model("dpo", 7)], [pair("base", "dpo", found(2, 0.001))])
    assert level.doubts == (PROXY,)


def test_differences_within_chance_are_no_doubts() -> None:
    noise = {"num_words": found(30, 0.2), "repeated_4grams": found(0.2, 0.2), "rating_error": found(0.7, 0.2)}
    told = story([model("base", 5), model("dpo", 7)], [pair("base", "dpo", found(2, 0.001), **noise)])
    assert told.doubts == (PROXY,)


def test_general_doubts() -> None:
    models = [model("base", 5), {**model("dpo", 7), "repeated_reviews": 0.4}]
    told = story(models, [pair("base", "dpo", found(2, 0.001))], engine="lexical", num_papers=20)
    assert any("40% of dpo's reviews repeat another one" in doubt for doubt in told.doubts)
    assert any("only 20 papers" in doubt for doubt in told.doubts)
    assert any("30 papers were not reviewed by every model" in doubt for doubt in told.doubts)
    assert any("lexical engine" in doubt for doubt in told.doubts)


def test_untraced_training_data_is_a_doubt() -> None:
    heading = {"modality": "clean", "engine": "e", "max_score": 24.0, "num_papers": 50}
    compared = {**heading, "models": [model("dpo", 5)], "pairs": []}
    missing = {"model": "dpo", "num_papers": 50, "training": {"num_missing": 1}}
    told = tell(compared, [missing], 0.95)
    assert told.verdict == "single"
    assert any("What dpo learned from could not be traced in full" in doubt for doubt in told.doubts)


def test_numbers_in_words() -> None:
    assert [p_text(value) for value in (0.0004, 0.012)] == ["p < 0.001", "p = 0.012"]
    assert judge(found(1, 0.049), 0.95) == "helped"
    assert judge(found(1, 0.051), 0.95) == "unclear"


def test_length_bias_of_the_data_and_controls_are_doubts() -> None:
    biased = {"longer_is_chosen": 0.9, "low": 0.85}
    mild = {"longer_is_chosen": 0.66, "low": 0.6}
    doubts = data_doubts({"length_bias": {"dpo_clean_train": biased, "dpo_clean_val": mild}}, False, False)
    assert doubts == ["In 90% of the pairs of dpo_clean_train the preferred review is the longer one."]
    assert data_doubts(None, False, False) == []
    assert "it is a control" in data_doubts(None, True, False)[0]
    assert "another checklist" in data_doubts(None, False, True)[0]
