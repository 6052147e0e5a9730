"""Agreement of two raters, shifts and rank correlations: by hand, under clustering, and at the edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prefmill.checklist.agreement import agreement, mean_shift, rank_correlation, reliability
from prefmill.checklist.optimize.select_step import kappa
from prefmill.core.statistics import Resampling

RESAMPLING = Resampling(2000)


def test_kappa_f1_and_accuracy_by_hand() -> None:
    judge = np.array([1.0] * 20 + [1.0] * 5 + [0.0] * 10 + [0.0] * 15)
    people = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15)
    papers = [f"p{number % 10}" for number in range(50)]
    found = agreement(papers, judge, people, RESAMPLING)
    assert found["kappa"]["value"] == pytest.approx(0.4)  # 0.7 observed, 0.5 by chance
    assert found["kappa"]["value"] == pytest.approx(kappa(judge, people))
    assert found["f1"]["value"] == pytest.approx(40 / 55, abs=1e-6)
    assert found["accuracy"]["value"] == pytest.approx(0.7)
    assert (found["num_answers"], found["num_papers"]) == (50, 10)
    assert (found["yes_share"], found["other_yes_share"]) == (0.5, 0.6)
    for name in ("kappa", "f1", "accuracy"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"] <= 1


def test_answers_of_a_paper_are_one_piece_of_evidence() -> None:
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(30) < 0.7, 20)  # a paper's answers are all right or all wrong
    people = (rng.random(600) < 0.5).astype(float)
    judge = np.where(right, people, 1 - people)
    clustered = agreement([f"p{number // 20}" for number in range(600)], judge, people, RESAMPLING)["accuracy"]
    singly = agreement([f"p{number}" for number in range(600)], judge, people, RESAMPLING)["accuracy"]
    assert clustered["high"] - clustered["low"] > 3 * (singly["high"] - singly["low"])


def test_the_interval_covers_the_truth() -> None:
    """Twenty answers a paper that are alike: 95 % intervals hold the true accuracy in about 95 % of 200 studies."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        level = rng.beta(4, 2, 20)
        right = (rng.random((20, 20)) < level[:, None]).astype(float).ravel()
        found = agreement([str(number // 20) for number in range(400)], right, np.ones(400), Resampling(1000))
        held += found["accuracy"]["low"] <= 4 / 6 <= found["accuracy"]["high"]
    assert 0.90 <= held / 200 <= 0.99


def test_the_edges() -> None:
    papers, ones = ["a", "a", "b", "b", "c", "c"], np.ones(6)
    same = agreement(papers, ones, ones, RESAMPLING)
    assert (same["kappa"], same["f1"]["value"], same["accuracy"]["value"]) == (None, 1, 1)
    none = agreement(papers, 1 - ones, 1 - ones, RESAMPLING)
    assert (none["kappa"], none["alpha"], none["f1"]) == (None, None, None)
    assert none["ac1"]["value"] == 1
    assert none["accuracy"] == {"value": 1.0, "low": 0.438503, "high": 1.0}  # Wilson: 3 of 3 papers
    single = agreement(["a"] * 6, ones, np.array([1.0, 0, 1, 0, 1, 1]), RESAMPLING)
    assert single["accuracy"] == {"value": 0.666667, "low": None, "high": None}
    opposite = agreement(["a", "b", "c", "d"], np.array([1.0, 0, 1, 0]), np.array([0.0, 1, 0, 1]), RESAMPLING)
    assert opposite["kappa"]["value"] == opposite["kappa"]["low"] == -1


@pytest.mark.filterwarnings("ignore")
def test_every_small_table_is_that_of_another_library() -> None:
    """Of up to four answers: kappa and F1 as scikit-learn has them, and None where it has none."""
    from sklearn.metrics import cohen_kappa_score, f1_score

    for size in (1, 2, 3, 4):
        for said in itertools.product([0.0, 1.0], repeat=2 * size):
            judge, people = np.array(said[:size]), np.array(said[size:])
            found = agreement([str(number) for number in range(size)], judge, people, Resampling(50))
            kappa_there = cohen_kappa_score(judge, people, labels=[0, 1])
            f1_there = f1_score(people, judge, zero_division=np.nan)
            for name, expected in (("kappa", kappa_there), ("f1", f1_there)):
                if np.isnan(expected):
                    assert found[name] is None
                else:
                    assert found[name]["value"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_alpha_of_every_small_table_is_that_of_another_library() -> None:
    from nltk.metrics.agreement import AnnotationTask

    for size in (1, 2, 3, 4):
        for said in itertools.product([0.0, 1.0], repeat=2 * size):
            rows = [(f"c{place // size}", place % size, value) for place, value in enumerate(said)]
            found = agreement([str(number) for number in range(size)], np.array(said[:size]), np.array(said[size:]),
                              Resampling(50))["alpha"]  # fmt: skip
            if len(set(said)) == 1:
                assert found is None
            else:
                assert found["value"] == pytest.approx(AnnotationTask(data=rows).alpha(), abs=1e-6)


def test_alpha_of_several_people_with_gaps_is_that_of_another_library() -> None:
    from nltk.metrics.agreement import AnnotationTask

    rng = np.random.default_rng(3)
    answers = (rng.random((40, 5)) < rng.beta(0.5, 0.5, 40)[:, None]).astype(float)
    answers[rng.random(answers.shape) < 0.4] = np.nan
    answers = answers[(~np.isnan(answers)).sum(axis=1) > 1]
    rows = [(f"c{rater}", unit, value) for (unit, rater), value in np.ndenumerate(answers) if not np.isnan(value)]
    papers = [str(unit % 9) for unit in range(len(answers))]
    found = reliability(papers, np.nansum(answers, axis=1), (~np.isnan(answers)).sum(axis=1).astype(float), RESAMPLING)
    assert found is not None
    assert found["value"] == pytest.approx(AnnotationTask(data=rows).alpha(), abs=1e-6)
    assert found["low"] < found["value"] < found["high"]


@pytest.mark.parametrize(
    ("table", "ac1"), [((118, 5, 2, 0), 0.94078), ((20, 5, 10, 15), 0.40594), ((1, 2, 4, 3), -0.15385)]
)
def test_ac1_is_that_of_another_library(table: tuple[int, int, int, int], ac1: float) -> None:
    """By irrCAC 0.4. The first table is Gwet's own: 118 of 125 agree, and kappa is -0.02."""
    judge, people = (np.repeat(said, table) for said in ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]))
    found = agreement([str(number % 10) for number in range(sum(table))], judge, people, RESAMPLING)
    assert found["ac1"]["value"] == pytest.approx(ac1, abs=1e-5)
    assert -1 <= found["ac1"]["low"] < ac1 < found["ac1"]["high"] <= 1


def test_draws_without_a_kappa_do_not_count_as_agreement() -> None:
    """Each says yes once, of another paper: draws without these two had kappa 1, and the interval ended there."""
    judge, people = np.zeros(20), np.zeros(20)
    judge[0] = people[1] = 1.0
    found = agreement([str(number) for number in range(20)], judge, people, RESAMPLING)
    assert found["kappa"]["value"] == pytest.approx(-1 / 19, abs=1e-6)
    assert found["kappa"]["high"] <= 0.1
    assert found["f1"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(found["f1"]["high"])}
    assert found["f1"]["high"] < 0.5


def test_papers_count_the_same_in_a_mean_shift() -> None:
    found = mean_shift(["a", "a", "a", "b"], np.array([0.1, 0.1, 0.1, 0.3]), RESAMPLING)
    assert found["value"] == pytest.approx(0.2)
    assert found["low"] < 0.2 < found["high"]
    assert mean_shift(["a", "a"], np.array([0.1, 0.3]), RESAMPLING) == {"value": 0.2, "low": None, "high": None}


def test_rank_correlation_is_spearmans_with_an_interval() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.lognormal(5, 0.5, 400)
    scores = np.round(np.log(lengths) * 3 + rng.normal(0, 1.5, 400))
    papers = [f"p{number // 4}" for number in range(400)]
    found = rank_correlation(papers, scores, lengths, RESAMPLING)
    assert found is not None
    order = [np.argsort(np.argsort(values + rng.normal(0, 1e-9, 400))) for values in (scores, lengths)]
    assert found["value"] == pytest.approx(float(np.corrcoef(*order)[0, 1]), abs=0.02)
    assert 0.5 < found["low"] < found["value"] < found["high"] < 0.9
    assert rank_correlation(papers, scores, lengths**3, RESAMPLING) == found
    assert rank_correlation(papers, np.ones(400), lengths, RESAMPLING) is None
    assert rank_correlation(papers[:2], scores[:2], lengths[:2], RESAMPLING) is None
