"""SPG's and ESPO's losses of pairs against their equations in plain Python, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from prefmill.core.errors import ConfigError
from prefmill.training.family import Family
from prefmill.training.objectives import OBJECTIVES, PairScores, Settings, mix

# (L_w, L_l, |y_w|, |y_l|, L'_w, L'_l, U_l, U'_l)
ROWS = [
    (-20.0, -31.0, 7, 9, -22.0, -30.0, -25.0, -26.5), (-5.0, -4.0, 3, 3, -5.5, -4.5, -3.0, -3.1),
    (-80.0, -60.0, 30, 12, -75.0, -70.0, -50.0, -52.0), (-20.0, -31.0, 7, 9, -30.0, -28.0, -29.0, -27.5),
]  # fmt: skip
B, E, W, CLIP = 0.3, 0.1, 0.25, 0.2
SETTINGS = Settings(beta=B, label_smoothing=E, upper_weight=W, clip=CLIP)


def scores(rows: list[tuple[float, ...]] = ROWS) -> PairScores:
    *given, upper, reference = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    return replace(PairScores(*given), rejected_upper=upper, ref_rejected_upper=reference)


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x))


def spg(w: float, v: float, n: float, m: float, rw: float, rv: float, u: float, ru: float) -> float:
    margin = B * ((w - rw) - ((W * u + (1 - W) * v) - (W * ru + (1 - W) * rv)))
    return -(1 - E) * log_s(margin) - E * log_s(-margin)


def espo(w: float, v: float, n: float, m: float, rw: float, rv: float, u: float, ru: float) -> float:
    total = 0.0
    for change, length, advantage in ((w - rw, n, 1), (v - rv, m, -1)):
        ratio = math.exp(change / length)
        total -= min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)
        total += B * change**2 / 2 / length
    return total / 2


@pytest.mark.parametrize("equation", [spg, espo], ids=["spg", "espo"])
def test_equals_its_equation(equation: Callable[..., float]) -> None:
    expected = torch.tensor([equation(*row) for row in ROWS], dtype=torch.float64)
    loss = OBJECTIVES[equation.__name__].loss
    torch.testing.assert_close(loss(scores(), SETTINGS), expected, rtol=1e-12, atol=1e-12)
    given = scores()

    def of(chosen: torch.Tensor, rejected: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        return loss(replace(given, chosen=chosen, rejected=rejected, rejected_upper=upper), SETTINGS)

    inputs = [value.clone().requires_grad_() for value in (given.chosen, given.rejected, given.rejected_upper)]
    torch.autograd.gradcheck(of, tuple(inputs))


def test_spg_pushes_the_rejected_side_by_its_upper_bound() -> None:
    alone = replace(SETTINGS, upper_weight=1.0)
    rejected, upper = (value.clone().requires_grad_() for value in (scores().rejected, scores().rejected_upper))
    OBJECTIVES["spg"].loss(replace(scores(), rejected=rejected, rejected_upper=upper), alone).sum().backward()
    assert (upper.grad > 0).any()
    assert (rejected.grad == 0).all()
    same = replace(SETTINGS, upper_weight=0.0)
    torch.testing.assert_close(OBJECTIVES["spg"].loss(scores(), same), OBJECTIVES["sigmoid"].loss(scores(), same))


def test_espo_lets_go_of_a_ratio_that_has_gone_far_enough() -> None:
    free = Settings(beta=1e-12, clip=CLIP)
    chosen = torch.tensor([-20.0, -20.0], dtype=torch.float64, requires_grad=True)
    given = PairScores(
        chosen, torch.zeros(2), torch.ones(2) * 10, torch.ones(2), torch.tensor([-21.0, -25.0]), torch.zeros(2)
    )
    OBJECTIVES["espo"].loss(given, free).sum().backward()
    near, far = chosen.grad.tolist()  # e^0.1 is within 1.2, e^0.5 is not
    assert near < 0
    assert far == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["spg", "espo"])
def test_a_winner_that_has_gone_very_far_has_a_gradient(name: str) -> None:
    """Beyond e^88 a ratio overflows in fp32: it was clipped, and its gradient was NaN."""
    start = torch.full((2,), -1000.0)
    chosen, rejected = (start.clone().requires_grad_() for _ in range(2))
    moved = torch.tensor([300.0, 1e4])
    given = PairScores(
        chosen + moved, rejected - moved, torch.ones(2), torch.ones(2), start, start,
        rejected_upper=rejected - moved, ref_rejected_upper=start,
    )  # fmt: skip
    OBJECTIVES[name].loss(given, Settings(beta=0.1, clip=CLIP)).sum().backward()
    for side in (chosen, rejected):
        assert side.grad is not None
        assert side.grad.isfinite().all()


@pytest.mark.parametrize("name", ["spg", "espo"])
def test_they_are_for_scores_that_are_bounds(name: str) -> None:
    with pytest.raises(ConfigError, match="does not fit this model family"):
        mix([name], [1.0], SETTINGS, Family.supplies)
