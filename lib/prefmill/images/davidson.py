"""Bradley-Terry strengths with ties (Davidson, 1970): what many votes between a prompt's images say of each image.

P(i beats j) = e^(s_i) / Z and P(tie) = e^(eta + (s_i + s_j) / 2) / Z, Z their sum with P(j beats i). Strengths are
those of one prompt; eta, how readily people call a tie, is shared. The fit is the maximum of the posterior under a
normal prior, so that images which won every vote stay finite: a lone vote gives about 2 to 1, as Laplace's rule does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRENGTH_SCALE = 1.0  # standard deviation of the prior of a strength
TIE_SCALE = 2.0  # of eta
_MAX_STEPS = 100
_TOLERANCE = 1e-9

Floats = NDArray[np.float64]


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
    theta, eta = np.zeros(votes.shape), 0.0
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
    """All comparisons as arrays [C], with the place (prompt, slot) of their images in strengths [P, K]."""

    def __init__(self, groups: Sequence[Sequence[Comparison]]) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        rows: list[tuple[int, int, int]] = []
        for prompt, group in enumerate(groups):
            names = sorted({name for item in group for name in (item.first, item.second)})
            assert not any(name in self.places for name in names), "an image stands in two groups"
            self.places |= {name: (prompt, slot) for slot, name in enumerate(names)}
            rows += [(prompt, self.places[item.first][1], self.places[item.second][1]) for item in group]
        width = max((slot for _, slot in self.places.values()), default=0) + 1
        self.shape = (len(groups), width)
        self.prompt, self.first, self.second = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        counts = [(c.first_wins, c.second_wins, c.ties) for group in groups for c in group]
        self.wins, self.losses, self.ties = np.array(counts, dtype=np.float64).reshape(-1, 3).T
        self.total = self.wins + self.losses + self.ties

    def posterior(self, theta: Floats, eta: float) -> float:
        """The log-posterior, up to a constant."""
        half = (theta[self.prompt, self.first] - theta[self.prompt, self.second]) / 2
        log_z = np.logaddexp(np.logaddexp(half, -half), eta)
        likelihood = (self.wins - self.losses) * half + self.ties * eta - self.total * log_z
        prior = np.square(theta).sum() / (2 * STRENGTH_SCALE**2) + eta**2 / (2 * TIE_SCALE**2)
        return float(likelihood.sum() - prior)

    def newton_step(self, theta: Floats, eta: float) -> tuple[Floats, float, float]:
        """The step of strengths and eta, and the squared Newton decrement.

        The Hessian is a block for each prompt, bordered by eta: each block is solved on its own.
        """
        half = (theta[self.prompt, self.first] - theta[self.prompt, self.second]) / 2
        logs = np.stack([half, -half, np.full_like(half, eta)])
        # As in softmax: exp of a large difference would overflow.
        logs -= logs.max(axis=0)
        win, _, tie = np.exp(logs) / np.exp(logs).sum(axis=0)
        expected = win + tie / 2
        residual = self.wins + self.ties / 2 - self.total * expected
        gradient = self._scatter(residual) - theta / STRENGTH_SCALE**2
        gradient_eta = float((self.ties - self.total * tie).sum() - eta / TIE_SCALE**2)
        blocks = self._blocks(self.total * (win + tie / 4 - expected**2))
        border = self._scatter(self.total * (tie / 2 - expected * tie))
        corner = float((self.total * tie * (1 - tie)).sum() + 1 / TIE_SCALE**2)
        # Block elimination (Schur complement): one dense Hessian of all prompts would grow with their number squared.
        solved = np.linalg.solve(blocks, np.stack([gradient, border], axis=-1))
        by_gradient, by_border = solved[..., 0], solved[..., 1]
        schur = corner - float((border * by_border).sum())
        d_eta = (gradient_eta - float((border * by_gradient).sum())) / schur
        d_theta = by_gradient - d_eta * by_border
        return d_theta, d_eta, float((gradient * d_theta).sum() + gradient_eta * d_eta)

    def _scatter(self, values: Floats) -> Floats:
        """Sums [P, K] of what each comparison adds to its first image and takes from its second."""
        found = np.zeros(self.shape)
        # add.at, because an image is in several comparisons: `found[...] +=` would count each place once.
        np.add.at(found, (self.prompt, self.first), values)
        np.add.at(found, (self.prompt, self.second), -values)
        return found

    def _blocks(self, variance: Floats) -> Floats:
        """The negative Hessian [P, K, K] in the strengths."""
        num_prompts, width = self.shape
        found: NDArray[Any] = np.zeros((num_prompts, width, width))
        # Slots that a small prompt does not use have the prior alone: without it its block would be singular.
        found[:, np.arange(width), np.arange(width)] = 1 / STRENGTH_SCALE**2
        for row, column, sign in (
            (self.first, self.first, 1), (self.second, self.second, 1),
            (self.first, self.second, -1), (self.second, self.first, -1),
        ):  # fmt: skip
            np.add.at(found, (self.prompt, row, column), sign * variance)
        return found
