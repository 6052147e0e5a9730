"""Joint distributions small enough to know exactly: what estimators of a likelihood are checked against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefmill.families.mdlm.estimator import Draws, block_sizes, count_law, systematic_counts
from prefmill.families.mdlm.scorer import masked_logps

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Joint:
    """A distribution over all sequences of L tokens out of V: `table` [V, V, ..., V], L axes, sums to 1."""

    table: Floats

    @property
    def length(self) -> int:
        """L, the tokens of a sequence."""
        return self.table.ndim

    def log_probability(self, sequence: tuple[int, ...]) -> float:
        """log p of the whole sequence, in nats."""
        return float(np.log(self.table[sequence]))

    def masked_sums(self, sequence: tuple[int, ...]) -> Floats:
        """For every set of masked tokens, by its bits: sum over them of log p(token | the tokens not masked), [2^L].

        Brute force: each conditional is a ratio of sums of the table.
        """
        return np.array([self._masked_sum(sequence, bits) for bits in range(2**self.length)])

    def _masked_sum(self, sequence: tuple[int, ...], bits: int) -> float:
        masked = [place for place in range(self.length) if bits >> place & 1]
        known = self.table[tuple(slice(None) if bits >> n & 1 else token for n, token in enumerate(sequence))]
        total = 0.0
        for axis, place in enumerate(masked):
            others = tuple(other for other in range(len(masked)) if other != axis)
            marginal = known.sum(axis=others)
            total += float(np.log(marginal[sequence[place]] / marginal.sum()))
        return total


@torch.no_grad()
def all_masked_sums(
    model: Any, prompt: Sequence[int], response: Sequence[int], mask_token_id: int, shifted: bool = False
) -> Floats:
    """For every set of masked tokens of a short response, by its bits, the sum of their log-probabilities: [2^L].

    What `Joint.masked_sums` has for a joint, for a model. `model` has its own forward.
    """
    length = len(response)
    ids = torch.tensor([*prompt, *response])
    bits = torch.arange(2**length)
    sums = torch.zeros(2**length, dtype=torch.float64)
    for chunk in torch.split(bits, 1024):
        masked = torch.zeros(len(chunk), len(ids), dtype=torch.bool)
        masked[:, len(prompt) :] = (chunk[:, None] >> torch.arange(length)) & 1 == 1
        clean = ids.expand(len(chunk), -1)
        places = masked.nonzero(as_tuple=True)
        logps = masked_logps(model, model.forward, clean.masked_fill(masked, mask_token_id), places, clean, shifted)
        sums[chunk] = sums[chunk].index_add(0, places[0], logps.double())
    return sums.numpy()


def random_joint(vocabulary: int, length: int, seed: int, tilt: float = 1.0) -> Joint:
    """A joint of random log-probabilities with a standard deviation of `tilt`, neighbours tied to one another."""
    generator = np.random.default_rng(seed)
    logits = tilt * generator.normal(size=(vocabulary,) * length)
    pull = tilt * generator.normal(size=(vocabulary, vocabulary))
    for place in range(length - 1):
        shape = [1] * length
        shape[place] = shape[place + 1] = vocabulary
        logits = logits + pull.reshape(shape)
    table = np.exp(logits - logits.max())
    return Joint(table / table.sum())


def near(joint: Joint, seed: int, distance: float) -> Joint:
    """Another joint whose log-probabilities differ from those of `joint` by `distance` in standard deviation."""
    noise = np.random.default_rng(seed).normal(size=joint.table.shape)
    table = joint.table * np.exp(distance * noise)
    return Joint(table / table.sum())


def estimate(draws: Draws, sums: Floats) -> float:
    """The mean over the draws of weight x masked sum, `sums` [2^L] as `Joint.masked_sums` gives them."""
    places = draws.masked @ (1 << np.arange(draws.masked.shape[1]))
    return float(np.mean(draws.weights * sums[places]))


def moments_by_count(sums: Floats, length: int) -> tuple[Floats, Floats]:
    """Mean and variance of one draw with exactly l masked tokens, over all masks, for l = 1..L; [L] each."""
    means, variances = np.empty(length), np.empty(length)
    for count in range(1, length + 1):
        values = np.array([length / count * sums[bits] for bits in subsets(length, count)])
        assert len(values) == comb(length, count)
        means[count - 1], variances[count - 1] = values.mean(), values.var()
    return means, variances


def offset_pieces(law: Floats, num_draws: int) -> list[tuple[float, float]]:
    """Every stretch of offsets in [0, 1) on which systematic counts stay the same: a point inside, and its length."""
    edges = np.cumsum(law)[:-1]
    cuts = np.mod(edges[:, None] - np.arange(num_draws) / num_draws, 1.0)
    # Rounded, as cuts that differ by rounding alone would leave a piece whose middle lies on an edge.
    ordered = np.unique(np.concatenate([[0.0, 1.0], cuts.ravel(), np.arange(num_draws) / num_draws]).round(14))
    return [((low + high) / 2, high - low) for low, high in pairwise(ordered.tolist())]


def exact_variances(sums: Floats, num_draws: int) -> dict[str, float]:
    """Variance of the mean of n draws by sampling, enumerated over all masks and offsets; `sums` [2^L] by masked set.

    For 1/t it is the integral over t >= 0.001, as implementations cut it: without, one masked token makes it infinite.
    """
    length = len(sums).bit_length() - 1
    means, variances = moments_by_count(sums, length)
    shares = np.array(block_sizes(num_draws, "systematic")) / num_draws
    blocks = [_systematic_variance(means, variances, size) for size in block_sizes(num_draws, "systematic")]
    t = np.geomspace(0.001, 1, 20_001)
    # Second moment: (1/t)^2 times the chance of a set of l tokens, t^l (1 - t)^(L - l); it is steep near 0.
    densities = [np.trapezoid(t ** (count - 2.0) * (1 - t) ** (length - count), t) for count in range(length + 1)]
    masked = np.array([bits.bit_count() for bits in range(len(sums))])
    second = float((sums**2 * np.array(densities)[masked]).sum())
    return {
        # Blocks are independent: variances add, each by the square of its share.
        "systematic": float(shares**2 @ np.array(blocks)),
        # The law of total variance: within a count, and between counts.
        "iid": float((variances.mean() + means.var()) / num_draws),
        "inverse_t": (second - float(means.mean()) ** 2) / num_draws,
    }


def _systematic_variance(means: Floats, variances: Floats, num_draws: int) -> float:
    """Of one block's mean: of the masks, and of the offset."""
    law = count_law(len(means), "systematic")
    pieces = offset_pieces(law, num_draws)
    centres = np.array([means[systematic_counts(offset, law, num_draws) - 1].mean() for offset, _ in pieces])
    lengths = np.array([length for _, length in pieces])
    return float(variances.mean() / num_draws + lengths @ (centres - lengths @ centres) ** 2)


def allocation_variances(policy: Floats, reference: Floats) -> dict[str, float]:
    """Variance of a score difference for mask counts / maskings a count, iid, as VRPO's table 2 has them, best first.

    V = V_t/n_t + V_y/(n_t n_y) of the difference where policy and reference share draws, the sum of both otherwise.
    """
    length = len(policy).bit_length() - 1
    means, variances = moments_by_count(policy - reference, length)
    split = {"8/1": (8, 1), "4/1": (4, 1), "2/2": (2, 2), "1/4": (1, 4), "1/1": (1, 1)}
    found = {name: float(means.var() / n + variances.mean() / (n * m)) for name, (n, m) in split.items()}
    return {**found, "4/1 unshared": exact_variances(policy, 4)["iid"] + exact_variances(reference, 4)["iid"]}


def subsets(length: int, count: int) -> Iterator[int]:
    """Every set of `count` out of `length` tokens, as bits."""
    for places in combinations(range(length), count):
        yield sum(1 << place for place in places)
