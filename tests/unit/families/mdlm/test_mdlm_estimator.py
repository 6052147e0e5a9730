"""The score estimators on joints whose conditionals are known exactly, by enumeration rather than sampling."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from benchmarks.exact_joints import (
    Floats,
    Joint,
    allocation_variances,
    estimate,
    exact_variances,
    moments_by_count,
    near,
    offset_pieces,
    random_joint,
    subsets,
)
from benchmarks.markov_chain import random_chain
from benchmarks.mdlm_variance import chain_differences, coverage, variance
from prefmill.families.mdlm.estimator import (
    Draws,
    ascending,
    balanced_masks,
    count_law,
    draw,
    draws_of,
    recommend_draws,
    systematic_counts,
)

LENGTH = 10


def exact_mean(sums: Floats, length: int, num_draws: int) -> float:
    """The systematic estimator's expectation: over every offset, and every mask of every draw's count."""
    means, _ = moments_by_count(sums, length)
    law = count_law(length, "systematic")
    pieces = offset_pieces(law, num_draws)
    values = [share * means[systematic_counts(offset, law, num_draws) - 1].mean() for offset, share in pieces]
    return float(sum(values))


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


@pytest.mark.parametrize(("length", "most"), [(1, 4), (2, 8), (3, 10), (4, 8), (5, 4)])
def test_balanced_masks_are_unbiased_over_every_offset_and_every_order(length: int, most: int) -> None:
    joint = random_joint(3, length, seed=length)
    sequence = (2,) + (0,) * (length - 1)
    sums, law = joint.masked_sums(sequence), count_law(length, "balanced")
    orders = [np.array(order) for order in permutations(range(length))]
    for num_draws in range(1, most + 1):
        total = 0.0
        for offset, share in offset_pieces(law, num_draws):
            counts = ascending(systematic_counts(offset, law, num_draws))
            weights = 1 / (counts * law[counts - 1])
            found = [estimate(Draws(balanced_masks(order, counts, weights), weights), sums) for order in orders]
            total += share * float(np.mean(found))
        assert total == pytest.approx(joint.log_probability(sequence), abs=1e-11)


def test_balanced_masks_give_every_token_the_same_weight() -> None:
    """A value that one token has on its own is estimated with far less error than by independent masks."""
    variances = {}
    for sampling in ("balanced", "systematic"):
        generator = np.random.default_rng(0)
        drawn = [draw(7, 8, sampling, generator) for _ in range(2000)]
        variances[sampling] = np.var([(item.weights @ item.masked)[0] / 8 for item in drawn])
        assert np.mean([(item.weights @ item.masked)[0] / 8 for item in drawn]) == pytest.approx(1, abs=0.05)
    assert variances["systematic"] > 10 * variances["balanced"]


@pytest.mark.parametrize("length", [1, 3, 10, 300])
@pytest.mark.parametrize("num_draws", [1, 3, 8, 16, 32])
def test_systematic_counts_are_exactly_uniform(length: int, num_draws: int) -> None:
    """The rounded grids of published evaluators are not: some counts come up 1.25 times too often."""
    law = count_law(length, "systematic")
    share = np.zeros((num_draws, length))
    for offset, weight in offset_pieces(law, num_draws):
        share[range(num_draws), systematic_counts(offset, law, num_draws) - 1] += weight
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
    law = count_law(10, "balanced")
    for offset, _ in offset_pieces(law, 8):
        whole = systematic_counts(offset, law, 8)
        for part in (1, 2, 4):
            assert list(np.sort(whole[:part])) == list(np.sort(systematic_counts(offset, law, part)))


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
    """VRPO's table 2 (arXiv 2505.19223) in order, exactly."""
    rows = [allocation_variances(policy, reference) for policy, reference in differences]
    found = [float(np.mean([row[name] for row in rows])) for name in rows[0]]
    assert list(rows[0]) == ["8/1", "4/1", "2/2", "1/4", "1/1", "4/1 unshared"]
    assert found == sorted(found)


def test_draws_follow_from_seed_row_and_epoch() -> None:
    def masks(tokens: list[int], seed: int, epoch: int) -> bytes:
        return draws_of(tokens, 4, 8, "balanced", seed, epoch).masked.tobytes()

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


@pytest.mark.parametrize("length", [7, 32])
def test_the_error_falls_as_draws_grow_and_the_standard_error_is_true(length: int) -> None:
    """On a chain whose likelihoods are known: 64 draws have an eighth of the variance of 8, and intervals hold."""
    values, truths = chain_differences(length, count=3)
    few, many = (variance("balanced", length, num_draws, values, samples=150) for num_draws in (8, 64))
    assert 5 < few / many < 13
    assert variance("iid", length, 8, values, samples=150) > 1.2 * few
    assert 0.9 <= coverage("balanced", length, values, truths, samples=100) <= 0.98


def test_a_chains_conditionals_are_those_of_its_joint() -> None:
    chain = random_chain(3, 4, seed=0)
    table = np.zeros((3,) * 4)
    for words in product(range(3), repeat=4):
        table[words] = np.exp(chain.log_probability(np.array(words)))
    sums = Joint(table).masked_sums((2, 0, 1, 1))
    bits = np.arange(16)
    masked = (bits[:, None] >> np.arange(4)) & 1 == 1
    assert chain.masked_logps(np.array([2, 0, 1, 1]), masked).sum(1) == pytest.approx(sums)


def test_the_setting_vrpo_has_the_papers_draws() -> None:
    """n counts with one masking each, drawn independently and shared: unbiased, and worse than `balanced` at 8."""
    from prefmill.core.config import read_yaml, validate
    from stages.mdlm_dpo import MdlmDpoConfig
    from tests.conftest import REPOSITORY

    config = validate(MdlmDpoConfig, read_yaml(REPOSITORY / "configs" / "mdlm_dpo" / "vrpo.yaml"))
    assert (config.sampling, config.num_draws) == ("iid", 8)
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.05])
    drawn = draws_of([5, 6, 7, 8, 9], 4, config.num_draws, config.sampling, seed=0, epoch=0)
    assert drawn.weights == pytest.approx(4 / drawn.masked.sum(1)), "L/l, as in the paper's equation for B"
