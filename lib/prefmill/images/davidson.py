"""Bradley-Terry strengths with ties (Davidson, 1970): what many votes between a prompt's images say of each image.

P(i beats j) = e^(s_i) / Z and P(tie) = e^(eta + (s_i + s_j) / 2) / Z, Z their sum with P(j beats i). Strengths are
those of one prompt; eta, how readily people call a tie, is shared. The fit is the maximum of the posterior under a
normal prior, so that images which won every vote stay finite: a lone vote gives about 2 to 1, as Laplace's rule does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRENGTH_SCALE = 1.0  # standard deviation of the prior of a strength
TIE_SCALE = 2.0  # of eta
_MAX_STEPS = 100
_TOLERANCE = 1e-9

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """The votes between two images of a prompt: how many for each, and ties. Votes may be fractions."""

    first: str
    second: str
    first_wins: float
    second_wins: float
    ties: float


@dataclass(frozen=True)
class Strengths:
    """A fit: the strength of every image that was compared, and eta."""

    of: Mapping[str, float]
    eta: float

    def preference(self, first: str, second: str) -> float:
        """P(`first` beats `second`) + P(tie) / 2, in (0, 1)."""
        half = (self.of[first] - self.of[second]) / 2
        # The largest exponent is taken off first: exp of a large one would overflow.
        weights = np.exp(np.array([half, -half, self.eta]) - max(abs(half), self.eta))
        return float((weights[0] + weights[2] / 2) / weights.sum())


def fit(groups: Sequence[Sequence[Comparison]]) -> Strengths:
    """Strengths of all images and the shared eta from the comparisons of every prompt; exact, by Newton's method.

    An image must be in one group only. Deterministic.
    """
    votes = _Votes(groups)
    theta, eta = np.zeros(len(votes.places)), 0.0
    value = votes.posterior(theta, eta)
    for _ in range(_MAX_STEPS):
        d_theta, d_eta, decrement = votes.newton_step(theta, eta)
        scale = 1.0
        # The log-posterior is strictly concave, so a step that is halved often enough raises it.
        # The tolerance is for the top, where rounding alone says which value is higher.
        while (found := votes.posterior(theta + scale * d_theta, eta + scale * d_eta)) < value - _TOLERANCE:
            scale /= 2
        theta, eta, value = theta + scale * d_theta, eta + scale * d_eta, found
        if decrement < _TOLERANCE:
            break
    return Strengths({name: float(theta[place]) for name, place in votes.places.items()}, float(eta))


class _Votes:
    """All comparisons as arrays [C], with the places of their images in strengths [N].

    Prompts with equally many images stand together, so that their blocks of the Hessian are one array: filled up to
    the largest prompt, one of 300 images among 40,000 would make it 29 GB.
    """

    def __init__(self, groups: Sequence[Sequence[Comparison]]) -> None:
        self.places: dict[str, int] = {}
        self._alike: dict[int, tuple[slice, slice]] = {}  # by number of images: their strengths, and comparisons
        named = [(sorted({name for item in group for name in (item.first, item.second)}), group)
                 for group in groups if group]  # fmt: skip
        rows: list[Comparison] = []
        for number, part in itertools.groupby(sorted(named, key=lambda one: len(one[0])), lambda one: len(one[0])):
            first_image, first_row = len(self.places), len(rows)
            for names, group in part:
                assert not any(name in self.places for name in names), "an image stands in two groups"
                self.places |= {name: len(self.places) + place for place, name in enumerate(names)}
                rows += group
            self._alike[number] = slice(first_image, len(self.places)), slice(first_row, len(rows))
        pairs = [(self.places[row.first], self.places[row.second]) for row in rows]
        self.first, self.second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        counts = [(row.first_wins, row.second_wins, row.ties) for row in rows]
        self.wins, self.losses, self.ties = np.array(counts, dtype=np.float64).reshape(-1, 3).T
        self.total = self.wins + self.losses + self.ties

    def posterior(self, theta: Floats, eta: float) -> float:
        """The log-posterior, up to a constant."""
        half = (theta[self.first] - theta[self.second]) / 2
        log_z = np.logaddexp(np.logaddexp(half, -half), eta)
        likelihood = (self.wins - self.losses) * half + self.ties * eta - self.total * log_z
        prior = np.square(theta).sum() / (2 * STRENGTH_SCALE**2) + eta**2 / (2 * TIE_SCALE**2)
        return float(likelihood.sum() - prior)

    def newton_step(self, theta: Floats, eta: float) -> tuple[Floats, float, float]:
        """The step of strengths and eta, and the squared Newton decrement.

        The Hessian is a block for each prompt, bordered by eta: each block is solved on its own.
        """
        half = (theta[self.first] - theta[self.second]) / 2
        logs = np.stack([half, -half, np.full_like(half, eta)])
        # As in softmax: exp of a large difference would overflow.
        logs -= logs.max(axis=0)
        win, _, tie = np.exp(logs) / np.exp(logs).sum(axis=0)
        expected = win + tie / 2
        residual = self.wins + self.ties / 2 - self.total * expected
        gradient = self._scatter(residual) - theta / STRENGTH_SCALE**2
        gradient_eta = float((self.ties - self.total * tie).sum() - eta / TIE_SCALE**2)
        border = self._scatter(self.total * (tie / 2 - expected * tie))
        corner = float((self.total * tie * (1 - tie)).sum() + 1 / TIE_SCALE**2)
        # Block elimination (Schur complement): one dense Hessian of all prompts would grow with their number squared.
        by_gradient, by_border = self._solved(self.total * (win + tie / 4 - expected**2), gradient, border)
        schur = corner - float(border @ by_border)
        d_eta = (gradient_eta - float(border @ by_gradient)) / schur
        d_theta = by_gradient - d_eta * by_border
        return d_theta, d_eta, float(gradient @ d_theta + gradient_eta * d_eta)

    def _scatter(self, values: Floats) -> Floats:
        """Sums [N] of what each comparison adds to its first image and takes from its second."""
        found = np.zeros(len(self.places))
        # add.at, because an image is in several comparisons: `found[...] +=` would count each place once.
        np.add.at(found, self.first, values)
        np.add.at(found, self.second, -values)
        return found

    def _solved(self, variance: Floats, *sides: Floats) -> Floats:
        """Each of `sides` [N] by the inverse of the negative Hessian in the strengths, prompt by prompt."""
        found = np.empty((len(sides), len(self.places)))
        for number, (images, rows) in self._alike.items():
            given = np.stack([side[images].reshape(-1, number) for side in sides], axis=-1)
            first, second = (places[rows] - images.start for places in (self.first, self.second))
            blocks = _blocks(len(given), number, first, second, variance[rows])
            found[:, images] = np.linalg.solve(blocks, given).reshape(-1, len(sides)).T
        return found


def _blocks(num_prompts: int, number: int, first: Places, second: Places, variance: Floats) -> Floats:
    """The negative Hessian [P, K, K] in the strengths of P prompts with K = `number` images each."""
    found: Floats = np.zeros((num_prompts, number, number))
    found[:, np.arange(number), np.arange(number)] = 1 / STRENGTH_SCALE**2
    for row, column, sign in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
        np.add.at(found, (row // number, row % number, column % number), sign * variance)
    return found
