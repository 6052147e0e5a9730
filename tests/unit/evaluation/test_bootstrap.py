"""The statistics: nominal error on ties, power on a known effect, and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from prefmill.core.errors import InputError
from prefmill.core.statistics import Array, Resampling, _stretch, holm, means, statistic, wilson, within

LEVEL = 0.05
NUM_STUDIES = 1000
QUICK = Resampling(num_resamples=2000)


def binomial_bounds(count: int, share: float) -> tuple[int, int]:
    """The central range that holds all but 1 in 1000 of Binomial(count, share)."""
    logs = [
        math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
        + hits * math.log(share) + (count - hits) * math.log(1 - share)
        for hits in range(count + 1)
    ]  # fmt: skip
    mass = np.cumsum(np.exp(logs))
    return int(np.searchsorted(mass, 0.0005)), int(np.searchsorted(mass, 0.9995))


def simulate_scores(num_papers: int, num_samples: int, effect: float, seed: int) -> tuple[Array, Array]:
    """Whole-number scores of two models, [studies, papers, samples] each.

    A paper makes reviews of it alike for both models (which pairing removes) and, by a part of its own, for each
    model (which makes reviews of a paper poor witnesses for each other: counting them singly overstates the evidence).
    """
    draw = np.random.default_rng(seed)
    shape = (NUM_STUDIES, num_papers, 1)
    paper = draw.normal(12, 3, shape)
    models = [paper + shift + draw.normal(0, 2, shape) for shift in (0.0, effect)]
    first, second = (np.rint(model + draw.normal(0, 1.5, (*shape[:2], num_samples))) for model in models)
    return first, second


def count_differences(rows: Array) -> int:
    """In how many studies a difference is reported, given differences [studies, clusters]."""
    return sum(found.p_value < LEVEL for found in means(rows.T, QUICK))


@pytest.mark.parametrize("num_papers", [8, 40])
def test_ties_are_called_different_at_the_nominal_rate(num_papers: int) -> None:
    first, second = simulate_scores(num_papers, 4, effect=0.0, seed=num_papers)
    low, high = binomial_bounds(NUM_STUDIES, LEVEL)
    assert low <= count_differences((second - first).mean(axis=2)) <= high
    # The control: the same studies with every review counted as a witness of its own.
    assert count_differences((second - first).reshape(NUM_STUDIES, -1)) > 2 * high


def test_a_known_effect_is_found_and_covered() -> None:
    effect = 2.0
    first, second = simulate_scores(40, 4, effect, seed=1)
    found = means((second - first).mean(axis=2).T, QUICK)
    assert sum(item.p_value < LEVEL and item.value > 0 for item in found) > 0.95 * NUM_STUDIES
    low, high = binomial_bounds(NUM_STUDIES, 1 - LEVEL)
    assert low <= sum(item.low <= effect <= item.high for item in found) <= high


def test_the_interval_and_the_p_value_agree() -> None:
    first, second = simulate_scores(12, 2, effect=1.5, seed=2)
    found = means((second - first).mean(axis=2).T, QUICK)
    apart = [item for item in found if abs(item.p_value - LEVEL) > 0.004]
    assert len(apart) > NUM_STUDIES * 0.8
    assert all((item.p_value < LEVEL) == (item.low > 0 or item.high < 0) for item in apart)


@pytest.mark.parametrize("num_papers", [3, 5, 10])
def test_small_p_values_of_few_papers_are_those_of_the_t_test(num_papers: int) -> None:
    """Of normal differences; Holm's correction multiplies just these. Of 4 papers that tie, 3 % had p <= 0.001."""
    values = np.random.default_rng(num_papers).normal(1.0, 1.0, size=(num_papers, 400))
    ratios = np.array([item.p_value for item in means(values, Resampling())]) / ttest_1samp(values, 0).pvalue
    assert np.median(ratios) == pytest.approx(1, abs=0.15)
    assert np.quantile(ratios, 0.05) > 0.3


def test_papers_that_agree_are_as_many_signs_and_no_more() -> None:
    """Whole numbers are often equal: three papers with one and the same gain had p = 0.0002."""
    for count, expected in ((2, 0.5), (3, 0.25), (8, 2 / 256)):
        (gain, loss) = means(np.stack([np.ones(count), -2 * np.ones(count)], axis=1), QUICK)
        assert (gain.p_value, loss.p_value) == (expected, expected)


def test_identical_models_have_no_difference() -> None:
    (found,) = means(np.zeros((5, 1)), QUICK)
    assert (found.value, found.low, found.high, found.p_value, found.num_papers) == (0, 0, 0, 1, 5)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    assert means(values, QUICK) == means(values, QUICK)
    assert means(values, QUICK) != means(values, Resampling(2000, seed=1))


def test_many_papers_are_drawn_in_chunks_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    whole = means(values, QUICK)
    monkeypatch.setattr("prefmill.core.statistics._CHUNK_CELLS", 1000)
    monkeypatch.setattr("prefmill.core.statistics._KEPT_CELLS", 0)
    for before, after in zip(whole, means(values, QUICK), strict=True):
        assert (after.low, after.high, after.p_value) == pytest.approx((before.low, before.high, before.p_value))


def test_a_mean_has_the_interval_of_the_t_distribution() -> None:
    values = np.random.default_rng(4).normal(3, 2, size=(25, 1))
    (found,) = means(values, Resampling(50_000))
    half = 2.0639 * values.std(ddof=1) / 5  # t(0.975, 24)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08)


def test_a_ratio_is_taken_of_the_means() -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = statistic(values, QUICK, lambda drawn: drawn[:, 0] / drawn[:, 1])
    assert found.value == pytest.approx(0.75)
    assert found.low < 0.75 < found.high


def test_one_paper_is_too_few() -> None:
    with pytest.raises(InputError, match=r"too few papers(.|\n)*got:\s+1"):
        means(np.zeros((1, 3)), QUICK)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("degrees", "tabled"), [(1, 12.706), (2, 4.303), (9, 2.262), (29, 2.045), (5000, 1.960)])
def test_intervals_are_stretched_by_the_tabled_quantile(degrees: int, tabled: float) -> None:
    """Hesterberg 2015: Student's quantile over the normal's, 1.960, and the factor of few papers."""
    papers = degrees + 1
    expected = tabled / 1.960 * math.sqrt(papers / degrees)
    assert _stretch(papers, 0.95) == pytest.approx(expected, rel=4e-4)


def test_papers_that_all_agree_leave_room_for_others() -> None:
    """Published values of Wilson's interval (Newcombe 1998, table I): 0 of 20 is 0 to 0.1611."""
    resampling = Resampling(1000, 0, 0.95)
    for count, expected in ((20, 0.1611), (9, 0.2991)):
        (none,) = means(np.zeros((count, 1)), resampling)
        (every,) = means(np.ones((count, 1)), resampling)
        assert (none.low, none.high) == (0.0, 0.0)
        assert within(none, resampling).low == 0.0
        assert within(none, resampling).high == pytest.approx(expected, abs=5e-5)
        assert within(every, resampling).low == pytest.approx(1 - expected, abs=5e-5)
        assert within(every, resampling).high == 1.0
    assert wilson(81 / 263, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # the same table
    assert wilson(15 / 148, 148, 0.95) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_the_p_value_of_equal_papers_inverts_their_interval() -> None:
    """Nine wins of nine: the score test of 1/2 gives z = 3."""
    for confidence in (0.9, 0.997, 0.9974):
        resampling = Resampling(1000, 0, confidence)
        (found,) = means(np.full((9, 1), 0.5), resampling)
        told = within(found, resampling, -0.5, 0.5)
        assert told.p_value == pytest.approx(0.0026998, abs=1e-6)
        assert (told.p_value < 1 - confidence) == (told.low > 0)
    (half,) = means(np.zeros((9, 1)), resampling)
    assert within(half, resampling, -0.5, 0.5).p_value == 1


def test_an_interval_with_a_width_is_only_cut() -> None:
    resampling = Resampling(1000, 0, 0.95)
    (found,) = means(np.array([[0.0], [0.0], [1.0]]), resampling)
    told = within(found, resampling)
    assert found.low < 0
    assert (told.low, told.high, told.p_value) == (0.0, min(1.0, found.high), found.p_value)
