"""Bradley-Terry with ties: the maximum of its posterior, known strengths found again, and what a tie does."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from prefmill.images import davidson
from prefmill.images.davidson import STRENGTH_SCALE, TIE_SCALE, Comparison, Strengths, fit


def log_posterior(groups: list[list[Comparison]], strengths: dict[str, float], eta: float) -> float:
    """The model as written down, with scalars."""
    value = -(eta**2) / (2 * TIE_SCALE**2) - sum(s**2 for s in strengths.values()) / (2 * STRENGTH_SCALE**2)
    for item in itertools.chain(*groups):
        a, b = strengths[item.first], strengths[item.second]
        masses = [math.exp(a), math.exp(b), math.exp(eta + (a + b) / 2)]
        counts = (item.first_wins, item.second_wins, item.ties)
        value += sum(n * math.log(mass / sum(masses)) for n, mass in zip(counts, masses, strict=True))
    return value


def simulate(
    seed: int, num_prompts: int, num_images: int, votes: int, eta: float
) -> tuple[list[list[Comparison]], dict[str, float]]:
    rng = np.random.default_rng(seed)
    groups, truth = [], {}
    for prompt in range(num_prompts):
        names = [f"{prompt}/{image}" for image in range(num_images)]
        truth |= dict(zip(names, rng.normal(0, 1, num_images), strict=True))
        group = []
        for first, second in itertools.combinations(names, 2):
            half = (truth[first] - truth[second]) / 2
            masses = np.exp([half, -half, eta])
            counts = rng.multinomial(votes, masses / masses.sum())
            group.append(Comparison(first, second, *map(float, counts)))
        groups.append(group)
    return groups, truth


def test_the_fit_is_the_maximum() -> None:
    groups, _ = simulate(0, num_prompts=3, num_images=3, votes=5, eta=0.3)
    groups[1] = groups[1][:1]  # one prompt with two images of which nobody saw the third
    found = fit(groups)
    best = log_posterior(groups, dict(found.of), found.eta)
    for step in (1e-4, -1e-4, 0.1, -0.1):
        assert log_posterior(groups, dict(found.of), found.eta + step) < best
        for name in found.of:
            moved = {**found.of, name: found.of[name] + step}
            assert log_posterior(groups, moved, found.eta) < best


def test_it_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton's method with the true curvature squares its error at every step."""
    steps = []
    step = davidson._Votes.newton_step
    monkeypatch.setattr(davidson._Votes, "newton_step", lambda *given: steps.append(0) or step(*given))
    groups, _ = simulate(2, num_prompts=30, num_images=4, votes=50, eta=1.5)
    fit(groups)
    assert len(steps) <= 5


def test_known_strengths_are_found_again() -> None:
    groups, truth = simulate(1, num_prompts=40, num_images=4, votes=200, eta=0.5)
    found = fit(groups)
    assert found.eta == pytest.approx(0.5, abs=0.05)
    errors = [
        found.of[a] - found.of[b] - (truth[a] - truth[b])
        for group in groups
        for a, b in ((item.first, item.second) for item in group)
    ]
    assert float(np.sqrt(np.mean(np.square(errors)))) < 0.2
    assert abs(float(np.mean(errors))) < 0.05


def test_a_lone_vote_is_about_two_to_one() -> None:
    found = fit([[Comparison("a", "b", 1, 0, 0)]])
    assert 0.6 < found.preference("a", "b") < 0.72
    assert found.preference("a", "b") == pytest.approx(1 - found.preference("b", "a"))


def test_more_votes_move_further_and_stay_finite() -> None:
    preferences = [fit([[Comparison("a", "b", n, 0, 0)]]).preference("a", "b") for n in (1, 3, 10, 10_000)]
    assert preferences == sorted(preferences)
    assert preferences[-1] < 1


def test_ties_raise_eta_and_prefer_nobody() -> None:
    tied = fit([[Comparison("a", "b", 0, 0, 20)]])
    assert tied.preference("a", "b") == pytest.approx(0.5)
    assert tied.eta > 1 > 0 > fit([[Comparison("a", "b", 10, 10, 0)]]).eta


def test_what_nobody_compared_follows_from_the_chain() -> None:
    chain = fit([[Comparison("a", "b", 9, 1, 0), Comparison("b", "c", 9, 1, 0)]])
    assert chain.preference("a", "c") > chain.preference("a", "b") > 0.5


def test_a_cycle_prefers_nobody() -> None:
    found = fit([[Comparison("a", "b", 1, 0, 0), Comparison("b", "c", 1, 0, 0), Comparison("c", "a", 1, 0, 0)]])
    assert found.preference("a", "b") == pytest.approx(0.5)


def test_nothing_to_fit() -> None:
    assert fit([]) == Strengths({}, 0.0)
    assert fit([[]]).of == {}


def test_one_prompt_of_many_images_makes_no_other_prompt_larger() -> None:
    """Each prompt's part of the Hessian was as large as the largest one's: 29 GB of 40,000 prompts, one with 300."""
    wide = [Comparison(f"b{place}", f"b{place + 1}", 2.0, 1.0, 0.0) for place in range(99)]
    groups = [wide, *([Comparison(f"{prompt}/a", f"{prompt}/b", 1.0, 0.0, 0.0)] for prompt in range(300))]
    tracemalloc.start()
    found = fit(groups)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert len(found.of) == 700
    assert found.preference("7/a", "7/b") == pytest.approx(found.preference("299/a", "299/b"), abs=1e-12)
