"""When a judge is believed: by the mass on its answers, and by whether they differ."""

from __future__ import annotations

from typing import Any

import pytest

from prefmill.checklist.judge_gate import AnswerCounts, JudgeGate, check, in_words, warnings
from prefmill.core.errors import InputError

GATE = JudgeGate()


def counts(num_reviews: int, yes: int, mass: float | None, items: int = 2) -> AnswerCounts:
    """Of every `num_reviews` answers to an item, `yes` are yes."""
    found = AnswerCounts()
    for number in range(num_reviews):
        answer: Any = {"yes": number < yes, "p_yes": 0.9 if number < yes else 0.1}
        answers = [{**answer, "p_yes": abs(answer["p_yes"] - item / 1e6)} for item in range(items)]
        found.add({f"i{i}": said if mass is None else {**said, "mass": mass} for i, said in enumerate(answers)})
    return found


def test_a_judge_without_mass_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="this judge says yes to 98% and puts 2% of its mass on an answer"):
        check(counts(100, 98, 0.02), GATE)
    check(counts(100, 98, 0.02), JudgeGate(min_answer_mass=0))


@pytest.mark.parametrize("yes", [0, 1, 99, 100])
def test_a_constant_judge_is_refused(yes: int) -> None:
    with pytest.raises(InputError, match=r"expected: at most 98% of one answer \(judge.max_same_answer\)"):
        check(counts(100, yes, 0.9), GATE)
    check(counts(100, yes, 0.9), JudgeGate(max_same_answer=1))
    check(counts(10, 0, 0.9), GATE)  # ten reviews may well be alike


@pytest.mark.parametrize("mass", [0.9, None])
def test_a_judge_that_judges_passes(mass: float | None) -> None:
    check(counts(100, 60, mass), GATE)


def test_figures_are_means_and_a_standard_deviation() -> None:
    found = counts(100, 60, 0.7)
    assert found.overall() == {
        "yes_share": 0.6, "mean_p_yes": 0.58, "spread": 0.3919, "answer_mass": 0.7, "p_yes_stderr": None,
        "same_throughout": [],
    }  # fmt: skip
    assert found.by_item(["i1", "never"])["never"]["answer_mass"] is None
    assert in_words(counts(3, 3, None).overall()) == "this judge says yes to 100%"


def test_items_answered_alike_are_named() -> None:
    found = counts(30, 12, 0.3)
    for number in range(30):
        found.items.setdefault("same", type(found.items["i0"])()).add({"yes": True, "p_yes": 0.6 + number / 100})
    (alike, low) = warnings(found.overall(), 3)
    assert alike == "1 of 3 items are answered alike for every review: same"
    assert "puts 30% of its mass" in low


def test_a_mass_of_one_is_hidden_but_of_sampled_answers() -> None:
    """Votes that are all yes or no have it, and were to start their server without an option it has not."""
    (told,) = warnings(counts(5, 2, 1.0).overall(), 2)
    assert told.startswith("the server hides the mass")
    voted = AnswerCounts()
    voted.add({"i0": {"yes": True, "p_yes": 0.75, "mass": 1.0, "p_yes_stderr": 0.1}})
    assert warnings(voted.overall(), 1) == []


def test_a_judge_that_gives_every_question_one_answer_is_refused() -> None:
    """As a cache that leaves the question out: half of the reviews get yes to everything, so no share looks odd."""
    found, few = AnswerCounts(), AnswerCounts()
    for number in range(100):
        answers: Any = {f"i{item}": {"yes": number % 2, "p_yes": 0.2 + number % 2 / 2} for item in range(24)}
        found.add(answers)
        few.add({name: answers[name] for name in ("i0", "i1")})
    with pytest.raises(InputError, match=r"one and the same P\(yes\), in 100% of the reviews[\s\S]*a cache"):
        check(found, GATE)
    check(found, JudgeGate(max_same_answer=1))
    check(few, GATE)  # two items may well go together
