"""Length bias: known answers, the interval's coverage, and the definition of the AUC by brute force."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from prefmill.datasets.length_bias import LengthBias


def biased(pairs: list[tuple[str, int, int]]) -> LengthBias:
    found = LengthBias()
    for pair in pairs:
        found.add(*pair)
    return found


def test_longer_always_wins() -> None:
    found = biased([(str(n), 10 + n, 5) for n in range(40)])
    assert found.accuracy().value == 1
    assert 0.9 < found.accuracy().low < 1
    assert found.auc() == 1


def test_equal_lengths_say_nothing() -> None:
    found = biased([(str(n), 7, 7) for n in range(40)])
    assert found.accuracy().value == found.auc() == 0.5


def test_accuracy_and_auc_against_their_definitions() -> None:
    rng = random.Random(0)
    pairs = [(str(n // 3), rng.randint(1, 9), rng.randint(1, 7)) for n in range(90)]
    found = biased(pairs)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for _, a, b in pairs]
    assert found.accuracy().value == pytest.approx(sum(wins) / 90)
    product = itertools.product([a for _, a, _ in pairs], [b for _, _, b in pairs])
    assert found.auc() == pytest.approx(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product) / 90**2)


def test_interval_covers_the_truth_although_pairs_of_a_paper_agree() -> None:
    """Six copies of one coin toss a paper: treating pairs as independent would cover about 58 %, not 95 %."""
    rng, covered = random.Random(1), 0
    for _ in range(400):
        tosses = [rng.random() < 0.6 for _ in range(60)]
        found = biased([(str(n), 2 if toss else 0, 1) for n, toss in enumerate(tosses) for _ in range(6)]).accuracy()
        covered += found.low <= 0.6 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_interval_of_few_papers_is_that_of_t() -> None:
    """With 1.96 it covered 83 % of 4 papers, said as 95 %."""
    wins = [1.0, 0.0, 1.0, 0.5]
    found = biased([(str(n), int(2 * win), 1) for n, win in enumerate(wins)]).accuracy()
    low, high = stats.t.interval(0.95, len(wins) - 1, np.mean(wins), stats.sem(wins))
    assert found == (np.mean(wins), max(0, low), min(1, high))
    wins = [0.4, 0.6, 0.5, 0.6]  # whose interval ends within 0 and 1
    pairs = [(str(n), 2 * (round(10 * win) > place), 1) for n, win in enumerate(wins) for place in range(10)]
    low, high = stats.t.interval(0.95, len(wins) - 1, np.mean(wins), stats.sem(wins))
    assert biased(pairs).accuracy()[1:] == pytest.approx((low, high))


def test_interval_is_that_of_all_pairs_where_the_pairs_of_a_paper_are_independent() -> None:
    rng = random.Random(2)
    found = biased([(str(n // 6), 2 if rng.random() < 0.6 else 0, 1) for n in range(6000)]).accuracy()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * (0.6 * 0.4 / 6000) ** 0.5, rel=0.1)
