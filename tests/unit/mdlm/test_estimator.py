"""The score estimators on joints whose conditionals are known exactly, by enumeration rather than sampling."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest

from prefmill.mdlm.estimator import draw, draws_of, recommend_draws, systematic_counts
from prefmill.mdlm.exact import Floats, Joint, estimate, moments_by_count, near, random_joint, subsets

LENGTH = 10


def offset_pieces(length: int, num_draws: int) -> list[tuple[float, Fraction]]:
    """Every stretch of offsets in [0, L) on which the mask counts stay the same: a point inside, and its share."""
    cuts = {Fraction(index * length, num_draws) % 1 for index in range(num_draws)} | {Fraction(0)}
    edges = [*sorted(whole + cut for whole in range(length) for cut in cuts), Fraction(length)]
    return [(float((low + high) / 2), (high - low) / length) for low, high in pairwise(edges)]


def exact_mean(sums: Floats, length: int, num_draws: int) -> float:
    """The systematic estimator's expectation: over every offset, and every mask of every draw's count."""
    means, _ = moments_by_count(sums, length)
    pieces = offset_pieces(length, num_draws)
    values = [float(share) * means[systematic_counts(offset, length, num_draws) - 1].mean() for offset, share in pieces]
    return float(sum(values))


def exact_variances(sums: Floats, num_draws: int) -> dict[str, float]:
    """Variance of the mean of n draws, exactly: systematic and iid counts, and 1/t by the integral over t.

    1/t: E[(1/t)^2 s^2] = sum over masks s^2 * int t^(l-2) (1-t)^(L-l) dt, infinite for l = 1 unless s is 0 there, so
    it is cut at t >= 0.001 as implementations do.
    """
    length = len(sums).bit_length() - 1
    means, variances = moments_by_count(sums, length)
    within, between = variances.mean(), means.var()
    offsets = offset_pieces(length, num_draws)
    counts = [systematic_counts(offset, length, num_draws) - 1 for offset, _ in offsets]
    shares = np.array([float(share) for _, share in offsets])
    centres = np.array([means[places].mean() for places in counts])
    spread = float(shares @ (centres - shares @ centres) ** 2)
    t = np.linspace(0.001, 1, 20_001)
    masked = np.array([bits.bit_count() for bits in range(len(sums))])
    weights = np.array([np.trapezoid(t ** (m - 2.0) * (1 - t) ** (length - m), t) for m in range(length + 1)])
    second = float((sums**2 * weights[masked]).sum())
    return {
        "systematic": float(within / num_draws + spread),
        "iid": float((within + between) / num_draws),
        "inverse_t": (second - means.mean() ** 2) / num_draws,
    }


@pytest.fixture(scope="module")
def differences() -> list[tuple[Floats, Floats]]:
    """Masked sums of drawn sequences under a policy and its reference: V = 3, L = 10."""
    reference = random_joint(3, LENGTH, seed=0, tilt=0.5)
    policy = near(reference, seed=1, distance=0.1)
    flat = np.random.default_rng(2).choice(3**LENGTH, p=policy.table.ravel(), size=3)
    sequences = [tuple(int(token) for token in np.unravel_index(place, policy.table.shape)) for place in flat]
    return [(policy.masked_sums(sequence), reference.masked_sums(sequence)) for sequence in sequences]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_unbiased_for_every_length_and_number_of_draws(length: int) -> None:
    joint = random_joint(3, length, seed=length)
    sequence = (2,) + (0,) * (length - 1)
    sums = joint.masked_sums(sequence)
    for num_draws in range(1, 3 * length + 2):
        assert exact_mean(sums, length, num_draws) == pytest.approx(joint.log_probability(sequence), abs=1e-12)


@pytest.mark.parametrize("length", [1, 3, 10, 300])
@pytest.mark.parametrize("num_draws", [1, 3, 8, 16, 32])
def test_systematic_counts_are_exactly_uniform(length: int, num_draws: int) -> None:
    """The rounded grids of published evaluators are not: some counts come up 1.25 times too often."""
    share = np.zeros((num_draws, length))
    for offset, weight in offset_pieces(length, num_draws):
        share[range(num_draws), systematic_counts(offset, length, num_draws) - 1] += float(weight)
    assert share == pytest.approx(np.full((num_draws, length), 1 / length), abs=1e-12)


def test_drawn_masks_have_the_counts_and_are_uniform_subsets() -> None:
    generator = np.random.default_rng(0)
    seen: dict[int, int] = {}
    for _ in range(6000):
        drawn = draw(4, 4, "systematic", generator)
        assert drawn.weights == pytest.approx(4 / drawn.masked.sum(1))
        for mask in drawn.masked:
            bits = int(mask @ (1 << np.arange(4)))
            seen[bits] = seen.get(bits, 0) + 1
    for count in (1, 2, 3):
        found = np.array([seen[bits] for bits in subsets(4, count)])
        assert found == pytest.approx(np.full(len(found), 6000 / len(found)), rel=0.1)


def test_the_first_half_of_a_power_of_two_is_systematic_too() -> None:
    for offset, _ in offset_pieces(10, 8):
        whole = systematic_counts(offset, 10, 8)
        for part in (1, 2, 4):
            assert list(np.sort(whole[:part])) == list(np.sort(systematic_counts(offset, 10, part)))


def test_sampling_agrees_with_the_enumeration(differences: list[tuple[Floats, Floats]]) -> None:
    """The draws themselves have the mean and the variance that the enumeration says."""
    sums = differences[0][0] - differences[0][1]
    expected = exact_variances(sums, 8)
    for sampling in ("systematic", "iid"):
        generator = np.random.default_rng(3)
        values = [estimate(draw(LENGTH, 8, sampling, generator), sums) for _ in range(4000)]
        assert np.mean(values) == pytest.approx(moments_by_count(sums, LENGTH)[0].mean(), abs=5 * np.std(values) / 63)
        assert np.var(values) == pytest.approx(expected[sampling], rel=0.15)


def test_the_order_of_the_variances(differences: list[tuple[Floats, Floats]]) -> None:
    """At 8 draws: shared far below unshared, systematic below iid, L/l below 1/t."""
    shared = [exact_variances(policy - reference, 8) for policy, reference in differences]
    mean = {name: np.mean([item[name] for item in shared]) for name in shared[0]}
    apart = [
        exact_variances(policy, 8)["iid"] + exact_variances(reference, 8)["iid"] for policy, reference in differences
    ]
    assert np.mean(apart) > 50 * mean["iid"]
    assert mean["iid"] > 1.2 * mean["systematic"]
    assert mean["inverse_t"] > 3 * mean["systematic"]


def test_one_masking_a_count_is_the_best_use_of_a_budget(differences: list[tuple[Floats, Floats]]) -> None:
    """VRPO's table 2 (arXiv 2505.19223) in order: V = V_t/n_t + V_y/(n_t n_y), shared or not."""
    rows: dict[str, list[float]] = {}
    for policy, reference in differences:
        means, variances = moments_by_count(policy - reference, LENGTH)
        alone = [moments_by_count(sums, LENGTH) for sums in (policy, reference)]
        for name, steps, masks in (("8/1", 8, 1), ("4/1", 4, 1), ("2/2", 2, 2), ("1/4", 1, 4), ("1/1", 1, 1)):
            rows.setdefault(name, []).append(means.var() / steps + variances.mean() / (steps * masks))
        rows.setdefault("4/1 unshared", []).append(sum(m.var() + v.mean() for m, v in alone) / 4)
    found = [float(np.mean(rows[name])) for name in ("8/1", "4/1", "2/2", "1/4", "1/1", "4/1 unshared")]
    assert found == sorted(found)


def test_draws_follow_from_seed_row_and_epoch() -> None:
    def masks(tokens: list[int], seed: int, epoch: int) -> bytes:
        return draws_of(tokens, 4, 8, "systematic", seed, epoch).masked.tobytes()

    row = [5, 6, 7, 8, 9]
    assert masks(row, 0, 0) == masks(row, 0, 0)
    others = [masks(row, 1, 0), masks(row, 0, 1), masks([5, 6, 7, 8, 8], 0, 0)]
    assert len({masks(row, 0, 0), *others}) == 4


def test_brute_forced_conditionals_are_those_of_a_known_chain() -> None:
    """Independent tokens: every conditional is the token's own probability."""
    p = np.array([0.2, 0.3, 0.5])
    joint = Joint(np.einsum("i,j,k->ijk", p, p, p))
    for sequence in product(range(3), repeat=3):
        sums = joint.masked_sums(sequence)
        for bits in range(8):
            assert sums[bits] == pytest.approx(sum(np.log(p[sequence[n]]) for n in range(3) if bits >> n & 1))


@pytest.mark.parametrize(("variance", "expected"), [(0.0, 1), (4.9, 1), (9.0, 2), (39.0, 8), (1e9, 32)])
def test_the_recommendation_is_the_smallest_that_holds_the_tolerance(variance: float, expected: int) -> None:
    assert recommend_draws(variance, beta=0.1, tolerance=0.05, most=32) == expected
