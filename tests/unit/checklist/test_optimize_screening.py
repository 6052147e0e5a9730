"""The screen: kappas and mutual information by hand, and what each threshold drops."""

from __future__ import annotations

import numpy as np
import pytest

from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.select_step import Screened, kappa, mutual_information, screen, seed_kappa

RULES = SelectConfig()
N = 400


def columns(seed: int, count: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((N, count)) < 0.5).astype(float)


def by_id(found: list[Screened]) -> dict[str, Screened]:
    return {item.id: item for item in found}


def test_kappa_by_hand() -> None:
    first = np.array([1.0] * 20 + [1.0] * 5 + [0.0] * 10 + [0.0] * 15)
    second = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15)
    assert kappa(first, second) == pytest.approx(0.4)  # agreement 0.7, chance 0.5
    assert kappa(first, first) == 1
    assert kappa(np.ones(5), np.ones(5)) == 1
    assert kappa(first, 1 - first) < 0


def test_seed_kappa_is_the_agreement_of_drawn_answers() -> None:
    generator = np.random.default_rng(0)
    p_yes = generator.beta(0.5, 1.0, size=20_000)
    draws = [(generator.random(len(p_yes)) < p_yes).astype(float) for _ in range(2)]
    assert seed_kappa(p_yes) == pytest.approx(kappa(*draws), abs=0.02)
    assert seed_kappa(np.array([0.0, 1.0, 1.0])) == 1
    assert seed_kappa(np.full(10, 0.7)) == pytest.approx(0)


def test_mutual_information_by_hand() -> None:
    first, independent = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    assert mutual_information(first, first) == pytest.approx(1)
    assert mutual_information(first, 1 - first) == pytest.approx(1)
    assert mutual_information(first, independent) == pytest.approx(0)
    assert mutual_information(first, np.zeros(4)) == 0


def test_each_fault_is_found_and_nothing_else() -> None:
    yes = columns(0, 4)
    yes[:, 1] = 0
    yes[:3, 1] = 1  # below 2 %
    yes[:, 3] = yes[:, 0]
    yes[0, 3] = 1 - yes[0, 3]
    paraphrases = {"good": yes[:, [2]].T, "first": columns(5, 1).T}
    found = by_id(screen(["first", "rare", "good", "copy"], yes, yes, paraphrases, RULES))
    any_share = RULES.model_copy(update={"min_answer_share": 0})
    never = by_id(screen(["never"], np.zeros((N, 1)), np.zeros((N, 1)), {}, any_share))
    assert never["never"].status == "constant"  # whatever the rule allows: nothing can be learnt from it
    assert {name: item.status for name, item in found.items()} == {
        "first": "unreliable", "rare": "constant", "good": "passed", "copy": "passed",
    }  # fmt: skip
    assert found["good"].paraphrase_kappa == 1
    assert found["first"].paraphrase_kappa is not None
    assert found["copy"].paraphrase_kappa is None
    assert found["first"].seed_kappa is None, "answers that are sure need no second seed"


def test_of_two_that_repeat_each_other_the_steadier_is_kept_otherwise_the_earlier() -> None:
    yes = columns(1, 2)
    yes = np.column_stack([yes, yes[:, 0], 1 - yes[:, 1]])
    ids = ["a", "b", "a_again", "not_b"]
    found = by_id(screen(ids, yes, yes, {}, RULES))
    assert [item.status for item in found.values()] == ["passed", "passed", "redundant", "redundant"]
    assert (found["a_again"].redundant_with, found["not_b"].redundant_with) == ("a", "b")
    assert found["not_b"].correlation == 1
    found = by_id(screen(ids, yes, yes, {"a_again": yes[:, [0]].T}, RULES))
    assert (found["a"].status, found["a"].redundant_with) == ("redundant", "a_again")
    assert found["a_again"].status == "passed"


def test_an_unsure_engine_is_unreliable() -> None:
    yes = columns(2, 2)
    p_yes = np.column_stack([np.where(yes[:, 0] == 1, 0.55, 0.45), np.where(yes[:, 1] == 1, 0.95, 0.05)])
    found = by_id(screen(["unsure", "sure"], yes, p_yes, {}, RULES))
    assert [item.status for item in found.values()] == ["unreliable", "passed"]
