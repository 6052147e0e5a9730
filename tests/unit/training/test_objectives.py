"""Every objective against its equation in plain Python, in float64, with its gradient; and known limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.training.family import Family
from prefmill.training.objectives import OBJECTIVES, PairScores, Settings, mix
from stages.dpo import DpoConfig
from stages.mdlm_dpo import MdlmDpoConfig
from stages.sdxl_dpo import SdxlDpoConfig

# (log pi(y_w), log pi(y_l), |y_w|, |y_l|, log ref(y_w), log ref(y_l))
ROWS = [(-20.0, -31.0, 7, 9, -22.0, -30.0), (-5.0, -4.0, 3, 3, -5.5, -4.5), (-80.0, -60.0, 30, 12, -75.0, -70.0)]
SETTINGS = Settings(beta=0.3, label_smoothing=0.1, simpo_gamma=0.4)
B, E, GAMMA = 0.3, 0.1, 0.4


def scores(rows: list[tuple[float, ...]] = ROWS) -> PairScores:
    return PairScores(*(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)))


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x))


def smoothed(u: float) -> float:
    return -(1 - E) * log_s(u) - E * log_s(-u)


# The equations once more, one pair at a time, without tensors.
SCALAR: dict[str, Callable[..., float]] = {
    "sigmoid": lambda w, v, n, m, rw, rv: smoothed(B * ((w - rw) - (v - rv))),
    "hinge": lambda w, v, n, m, rw, rv: max(0.0, 1 - B * ((w - rw) - (v - rv))),
    "robust": lambda w, v, n, m, rw, rv: (
        (-(1 - E) * log_s(B * ((w - rw) - (v - rv))) + E * log_s(-B * ((w - rw) - (v - rv)))) / (1 - 2 * E)
    ),
    "ipo": lambda w, v, n, m, rw, rv: ((w - rw) - (v - rv) - 1 / (2 * B)) ** 2,
    "ipo_mean": lambda w, v, n, m, rw, rv: ((w - rw) / n - (v - rv) / m - 1 / (2 * B)) ** 2,
    "sigmoid_norm": lambda w, v, n, m, rw, rv: smoothed(B * ((w - rw) / n - (v - rv) / m)),
    "simpo": lambda w, v, n, m, rw, rv: -log_s(B * (w / n - v / m) - GAMMA),
    "sft": lambda w, v, n, m, rw, rv: -w / n,
}


@pytest.mark.parametrize("name", sorted(SCALAR))
def test_equals_its_equation(name: str) -> None:
    expected = torch.tensor([SCALAR[name](*row) for row in ROWS], dtype=torch.float64)
    torch.testing.assert_close(OBJECTIVES[name].loss(scores(), SETTINGS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SCALAR))
def test_gradient(name: str) -> None:
    given = scores()

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        rest = (given.chosen_length, given.rejected_length, given.ref_chosen, given.ref_rejected)
        return OBJECTIVES[name].loss(PairScores(chosen, rejected, *rest), SETTINGS)

    inputs = (given.chosen.clone().requires_grad_(), given.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", sorted(SCALAR))
def test_says_whether_it_needs_the_reference(name: str) -> None:
    given = scores()
    moved = scores([(*row[:4], row[4] + 1.5, row[5] - 0.5) for row in ROWS])
    change = OBJECTIVES[name].loss(given, SETTINGS) - OBJECTIVES[name].loss(moved, SETTINGS)
    assert bool(change.abs().max() > 1e-6) == OBJECTIVES[name].needs_reference


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sigmoid", math.log(2)), ("hinge", 1.0), ("robust", math.log(2)), ("sigmoid_norm", math.log(2))],
)
def test_where_policy_and_reference_are_the_same(name: str, expected: float) -> None:
    start = scores([(-20.0, -31.0, 7, 9, -20.0, -31.0)])
    assert OBJECTIVES[name].loss(start, SETTINGS).item() == pytest.approx(expected, abs=1e-12)


def test_dpo_gradient_is_the_papers() -> None:
    """dL/dlog pi(y_w) = -b s(-bD)."""
    given = scores()
    chosen = given.chosen.clone().requires_grad_()
    OBJECTIVES["sigmoid"].loss(replace(given, chosen=chosen), Settings(beta=B)).sum().backward()
    torch.testing.assert_close(chosen.grad, -B * torch.sigmoid(-B * given.margin))


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_a_soft_label_takes_the_place_of_smoothing(name: str) -> None:
    soft = replace(scores(), soft_label=torch.full((3,), 1 - E, dtype=torch.float64))
    found = OBJECTIVES[name].loss(soft, Settings(beta=B))
    torch.testing.assert_close(found, OBJECTIVES[name].loss(scores(), SETTINGS))


def test_extreme_margins_stay_finite() -> None:
    far = scores([(1e4, -1e4, 1, 1, 0.0, 0.0), (-1e4, 1e4, 1, 1, 0.0, 0.0)])
    for name in SCALAR:
        assert torch.isfinite(OBJECTIVES[name].loss(far, SETTINGS)).all(), name


def test_a_mix_is_the_weighted_sum() -> None:
    mixed = mix(["sigmoid", "sft"], [1.0, 0.2], SETTINGS)
    expected = OBJECTIVES["sigmoid"].loss(scores(), SETTINGS) + 0.2 * OBJECTIVES["sft"].loss(scores(), SETTINGS)
    torch.testing.assert_close(mixed.loss(scores(), SETTINGS), expected)
    assert mixed.needs_reference
    assert not mix(["simpo", "sft"], [1.0, 1.0], SETTINGS).needs_reference


def test_bad_mixes_are_refused() -> None:
    for schema, keys in ((SdxlDpoConfig, {"objective": "sigmod"}), (DpoConfig, {"loss_type": ["sft", "sigmod"]}),
                         (MdlmDpoConfig, {"loss_type": ["sigmod"]})):  # fmt: skip
        with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):  # as `prefmill plan` reads it
            validate(schema, keys)
    with pytest.raises(ConfigError, match=r"no objective 'sigmod' \(did you mean 'sigmoid'"):
        mix(["sigmod"], [1.0], SETTINGS)
    with pytest.raises(ConfigError, match="needs a weight"):
        mix(["sigmoid", "sft"], [1.0], SETTINGS)
    for weights in ([-1.0, 1.0], [0.0, 0.0]):  # the worse answers would be learnt, or none
        with pytest.raises(ConfigError, match="none below 0"):
            mix(["sigmoid", "sft"], weights, SETTINGS)
    mix(["sigmoid", "sft"], [1.0, 0.0], SETTINGS)  # as a sweep over the weight has it
    with pytest.raises(ConfigError, match="rate of flipped labels"):
        mix(["robust"], [1.0], Settings(beta=0.1))


def test_every_objective_is_held_to_its_equation() -> None:
    """Those of text here and in test_bound_objectives.py, of images and rewards in their families' tests."""
    assert set(OBJECTIVES) == {
        *SCALAR,
        "dpo",
        "flow_dpo",
        "dspo",
        "dspo_official_sdxl",
        "dspo_rm",
        "mapo",
        "bradley_terry_heads",
        "spg",
        "espo",
    }
    assert {name for name, objective in OBJECTIVES.items() if objective.needs <= Family.supplies} == set(SCALAR)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("dspo", "noise_errors, residuals"),
        ("dspo_rm", "errors, soft_label"),
        ("bradley_terry_heads", "heads"),
    ],
)
def test_text_refuses_by_name_what_it_cannot_supply(name: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"objective '{name}' does not fit") as refused:
        mix([name], [1.0], SETTINGS, Family.supplies)
    assert f"it needs {missing}" in str(refused.value)
    assert ", ".join(SCALAR) in str(refused.value)
