"""What a checklist made this way is worth on papers it was not made from: nested cross-validation and baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.lasso import Array, variance, weighted_moments
from prefmill.checklist.optimize.selection import Design, Papers, select
from prefmill.core.statistics import (
    Estimate,
    Resampling,
    assign_folds,
    correlations,
    second_moments,
    statistic,
    sums_by,
)

Progress = Callable[[int, int], None]
_PERMUTED_AT_ONCE = 50  # permuted targets solved together: tens of megabytes
_MOMENTS_OF_A_SCORE = 6
_MIN_OF_A_SIZE = 5  # papers, to be exchanged among themselves


def outer_training(papers: Papers, num_folds: int, seed: int) -> Array:
    """The training sets [Q, N], 1 inside and 0 held out, of one cross-validation grouped by paper."""
    folds = assign_folds(papers, num_folds, seed)
    return np.stack([(folds != fold).astype(float) for fold in range(num_folds)])


def checklist_scores(design: Design, training: Array, rules: SelectConfig, seed: int, equal: bool = False) -> Array:
    """The held-out score of every review [N]: of the checklist chosen and weighted without the review's fold.

    With `equal`, kept items get the same weight for a yes instead of fitted ones.
    """
    coefficients = select(design, design.target[None], training, rules, seed).coefficients[0]
    if equal:
        coefficients = np.sign(coefficients) * design.spread
    return _held_out(coefficients @ design.answers.T, training)


def fitted_scores(features: Array, target: Array, training: Array) -> Array:
    """The held-out prediction [N] of `target` [N] by least squares on `features` [N, F]; the baselines' fit."""
    design = np.column_stack([np.ones(len(features)), features])
    scores = []
    for inside in training.astype(bool):
        # lstsq, as features may be collinear: a rating of two values and its square are.
        solution, *_ = np.linalg.lstsq(design[inside], target[inside], rcond=None)
        scores.append(design @ solution)
    return _held_out(np.stack(scores), training)


def fixed_scores(score: Array, training: Array) -> Array:
    """A score that is not fitted [N], on the same footing as those that are."""
    return _held_out(np.broadcast_to(score, training.shape), training)


def correlation(scores: Array, design: Design, training: Array, resampling: Resampling) -> Estimate:
    """The correlation of held-out `scores` [N] with the target within folds, with an interval over papers."""
    return statistic(_per_paper(design, training, scores), resampling, correlations)


def gain(scores: Array, baseline: Array, design: Design, training: Array, resampling: Resampling) -> Estimate:
    """How much better `scores` correlate than `baseline`, both [N], on the same resampled papers."""
    # In one row of a paper: each draw takes the same papers for both, and what they share cancels.
    values = np.hstack([_per_paper(design, training, item) for item in (scores, baseline)])
    size = _MOMENTS_OF_A_SCORE
    return statistic(values, resampling, lambda means: correlations(means[:, :size]) - correlations(means[:, size:]))


def compare_with_baselines(
    scores: Array, baselines: Mapping[str, Array], design: Design, training: Array, resampling: Resampling
) -> dict[str, dict[str, dict[str, float]]]:
    """The baselines' own correlations, and the checklist's advantage over each."""
    return {
        name: {
            "correlation": rounded(correlation(baseline, design, training, resampling)),
            "advantage": rounded(gain(scores, baseline, design, training, resampling)),
        }
        for name, baseline in baselines.items()
    }


def permutation_test(
    design: Design, training: Array, rules: SelectConfig, seed: int, num_permutations: int, progress: Progress
) -> tuple[float, float]:
    """The held-out correlation, and the p-value of one as large or larger when targets say nothing of the answers.

    Targets move between papers, mostly with as many reviews, a paper's together: what the reviews of one paper have in
    common stays (block permutation, Good 2005, section 9). The whole choice is repeated for each permutation.
    """
    shuffled = permuted(design.target, design.papers, num_permutations, seed + 3)
    targets = np.vstack([design.target[None], shuffled])
    found: list[Array] = []
    for start in range(0, len(targets), _PERMUTED_AT_ONCE):
        found.append(_fold_correlations(design, targets[start : start + _PERMUTED_AT_ONCE], training, rules, seed))
        progress(min(start + _PERMUTED_AT_ONCE, len(targets)), len(targets))
    values = np.concatenate(found).round(9)  # a tie stays one under rounding, and counts against a signal
    # The true target is among the values, so that p is never 0 (Phipson and Smyth 2010).
    return float(values[0]), float((values >= values[0]).mean())


def permuted(target: Array, papers: Papers, count: int, seed: int) -> Array:
    """`count` versions [count, N] of `target` with the papers' blocks exchanged among papers of the same size.

    Papers of rare sizes exchange theirs among each other, repeated or cut to the other's size (decision 0194).
    """
    generator = np.random.default_rng(seed)
    rows = [np.flatnonzero(papers == paper) for paper in np.unique(papers)]
    blocks, rare = _exchangeable(rows)
    result = np.repeat(target[None], count, axis=0)
    for version in result:
        for block in blocks:
            version[block] = target[block[generator.permutation(len(block))]]
        for own, other in enumerate(generator.permutation(len(rare))):
            version[rare[own]] = np.resize(target[rare[other]], len(rare[own]))
    return result


def _exchangeable(rows: list[NDArray[np.int64]]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """The rows of papers by size, a block [papers, size] for each size that is not rare, and those of the others."""
    by_size = [[row for row in rows if len(row) == size] for size in sorted({len(row) for row in rows})]
    blocks = [np.stack(group) for group in by_size if len(group) >= _MIN_OF_A_SIZE]
    return blocks, [row for group in by_size if len(group) < _MIN_OF_A_SIZE for row in group]


def rounded(estimate: Estimate) -> dict[str, float]:
    """An estimate as it is published."""
    return {name: round(value, 6) for name, value in asdict(estimate).items()}


def _held_out(scores: Array, training: Array) -> Array:
    """From scores [Q, N] of each fold's model: every review's own fold's, in units of their spread in training.

    Folds' models differ in scale and level; held-out reviews are compared within their fold alone.
    """
    result = np.zeros(training.shape[1])
    for score, inside in zip(scores, training.astype(bool), strict=True):
        spread = score[inside].std()
        result[~inside] = (score[~inside] - score[~inside].mean()) / spread if spread > 1e-9 else 0.0
    return result


def _per_paper(design: Design, training: Array, scores: Array) -> Array:
    """Sums over each paper's reviews of `second_moments` of score and target, [papers, 6]."""
    target = design.target.copy()
    for inside in training.astype(bool):
        # Scores are centred in their fold as well; folds' means differ by chance alone.
        target[~inside] -= target[~inside].mean()
    return sums_by(design.papers, second_moments(scores, target))


def _fold_correlations(design: Design, targets: Array, training: Array, rules: SelectConfig, seed: int) -> Array:
    """The held-out correlation [P] for each of `targets` [P, N], in the form of `correlation`."""
    coefficients = select(design, targets, training, rules, seed).coefficients
    train = weighted_moments(design.answers, targets, training)
    test = weighted_moments(design.answers, targets, 1 - training)
    spread = np.sqrt(variance(coefficients, train.gram))[..., None]
    scaled = np.where(spread > 1e-9, coefficients / np.maximum(spread, 1e-9), 0.0)
    sizes = (1 - training).sum(axis=1)
    products = np.einsum("pqk,pqk,q->p", scaled, test.cross, sizes)
    norms = np.sqrt((variance(scaled, test.gram) @ sizes) * (test.target_var @ sizes))
    return np.where(norms > 1e-12, products / np.maximum(norms, 1e-12), 0.0)
