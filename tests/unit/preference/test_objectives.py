"""Every objective against its equation in plain Python, in float64, with its gradient; and known limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from prefmill.config import validate
from prefmill.errors import ConfigError
from prefmill.preference.objectives import OBJECTIVES, Objective, ObjectiveConfig
from prefmill.preference.scores import PairScores

# (log pi(y_w), log pi(y_l), |y_w|, |y_l|, log ref(y_w), log ref(y_l))
ROWS = [(-20.0, -31.0, 7, 9, -22.0, -30.0), (-5.0, -4.0, 3, 3, -5.5, -4.5), (-80.0, -60.0, 30, 12, -75.0, -70.0)]
B, E, GAMMA = 0.3, 0.1, 0.4


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(rows: list[tuple[float, ...]] = ROWS) -> PairScores:
    return PairScores(*(column(*values) for values in zip(*rows, strict=True)))


def objective(*names: str, **settings: object) -> Objective:
    values = {"beta": B, "label_smoothing": E, "simpo_gamma": GAMMA, **settings}
    return Objective(validate(ObjectiveConfig, {"loss_type": list(names), **values}))


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x))


# The equations once more, one pair at a time, without tensors.
SCALAR: dict[str, Callable[..., float]] = {
    "sigmoid": lambda w, v, n, m, rw, rv: (
        -(1 - E) * log_s(B * ((w - rw) - (v - rv))) - E * log_s(-B * ((w - rw) - (v - rv)))
    ),
    "hinge": lambda w, v, n, m, rw, rv: max(0.0, 1 - B * ((w - rw) - (v - rv))),
    "robust": lambda w, v, n, m, rw, rv: (
        (-(1 - E) * log_s(B * ((w - rw) - (v - rv))) + E * log_s(-B * ((w - rw) - (v - rv)))) / (1 - 2 * E)
    ),
    "ipo": lambda w, v, n, m, rw, rv: ((w - rw) / n - (v - rv) / m - 1 / (2 * B)) ** 2,
    "ipo_sum": lambda w, v, n, m, rw, rv: ((w - rw) - (v - rv) - 1 / (2 * B)) ** 2,
    "sigmoid_norm": lambda w, v, n, m, rw, rv: -log_s(B * ((w - rw) / n - (v - rv) / m)),
    "simpo": lambda w, v, n, m, rw, rv: -log_s(B * (w / n - v / m) - GAMMA),
    "sft": lambda w, v, n, m, rw, rv: -w / n,
}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_equals_its_equation(name: str) -> None:
    expected = column(*(SCALAR[name](*row) for row in ROWS))
    torch.testing.assert_close(objective(name)(scores()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_gradient(name: str) -> None:
    given = scores()

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return objective(name)(replace(given, chosen=chosen, rejected=rejected))

    inputs = (given.chosen.clone().requires_grad_(), given.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_declares_whether_it_needs_the_reference(name: str) -> None:
    bare = PairScores(*(column(-1, -2, -3) for _ in range(4)))
    moved = scores([(*row[:4], row[4] + 1.5, row[5] - 0.5) for row in ROWS])
    change = (objective(name)(scores()) - objective(name)(moved)).abs().max()
    needs = "reference" in objective(name).needs
    assert bool(change > 1e-6) == needs
    if not needs:
        assert objective(name)(bare).shape == (3,)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_a_missing_reference_is_not_taken_for_zero(name: str) -> None:
    with pytest.raises(AssertionError, match="did not declare"):
        objective(name)(replace(scores(), reference_chosen=None, reference_rejected=None))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sigmoid", math.log(2)), ("hinge", 1.0), ("robust", math.log(2)), ("sigmoid_norm", math.log(2))],
)
def test_where_policy_and_reference_are_the_same(name: str, expected: float) -> None:
    start = scores([(-20.0, -31.0, 7, 9, -20.0, -31.0)])
    assert objective(name)(start).item() == pytest.approx(expected, abs=1e-12)


def test_dpo_gradient_is_the_papers() -> None:
    """dL/dlog pi(y_w) = -b s(-b Delta)."""
    given = scores()
    chosen = given.chosen.clone().requires_grad_()
    objective("sigmoid", label_smoothing=0)(replace(given, chosen=chosen)).sum().backward()
    torch.testing.assert_close(chosen.grad, -B * torch.sigmoid(-B * given.margin))


def test_soft_labels_take_the_place_of_smoothing() -> None:
    soft = replace(scores(), soft_labels=column(1 - E, 1 - E, 1 - E))
    torch.testing.assert_close(objective("sigmoid", label_smoothing=0)(soft), objective("sigmoid")(scores()))


def test_a_mix_is_the_weighted_sum() -> None:
    mixed = objective("sigmoid", "sft", loss_weights=[1.0, 0.2])
    expected = objective("sigmoid")(scores()) + 0.2 * objective("sft")(scores())
    torch.testing.assert_close(mixed(scores()), expected)
    assert "reference" in mixed.needs


def test_length_desensitising() -> None:
    """LD-DPO: alpha = 1 is DPO, alpha = 0 counts the shared length only."""
    shared = {
        "chosen_shared": column(-10, -5, -40),
        "rejected_shared": column(-11, -4, -60),
        "reference_chosen_shared": column(-9, -5.5, -41),
        "reference_rejected_shared": column(-12, -4.5, -70),
    }
    given = replace(scores(), **shared)
    only_shared = replace(given, **{name.removesuffix("_shared"): value for name, value in shared.items()})
    between = {name: (getattr(given, name) + getattr(only_shared, name)) / 2 for name in ("chosen", "rejected")}
    between |= {
        f"reference_{n}": (getattr(given, f"reference_{n}") + shared[f"reference_{n}_shared"]) / 2 for n in between
    }
    for alpha, expected in ((1.0, given), (0.0, only_shared), (0.5, replace(given, **between))):
        damped = objective("sigmoid", ld_alpha=alpha)
        torch.testing.assert_close(damped(given), objective("sigmoid")(expected))
        assert "shared" in damped.needs


def test_extreme_margins_stay_finite() -> None:
    far = scores([(1e4, -1e4, 1, 1, 0.0, 0.0), (-1e4, 1e4, 1, 1, 0.0, 0.0)])
    for name in OBJECTIVES:
        assert torch.isfinite(objective(name)(far)).all(), name


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="loss_weights needs 2 numbers"):
        objective("sigmoid", "sft", loss_weights=[1.0])
    with pytest.raises(ConfigError, match="label_smoothing"):
        objective("robust", label_smoothing=0.5)
    with pytest.raises(ConfigError, match="loss_type"):
        objective("sigmod")
