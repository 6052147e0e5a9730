"""Diffusion objectives against scalar references in float64, their gradients, and the identities between them."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import mpmath
import pytest
import torch
from torch import Tensor
from toy_diffusion import make_schedule

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.dpo import choose_objective, cosine_to_sft, settings_of
from prefmill.families.sdxl.family import SdxlFamily
from prefmill.training.objectives import (
    OBJECTIVES,
    PairScores,
    Settings,
    dpo,
    dspo,
    dspo_official_sdxl,
    dspo_rm,
    mapo,
    mix,
    phi,
    sft,
)
from prefmill.training.telemetry import gradient_coefficient

NAMES = ("dpo", "flow_dpo", "dspo", "dspo_official_sdxl", "dspo_rm", "mapo", "sft")
N, D = 5, 12
SETTINGS = Settings(beta=7.0)


def draw(seed: int = 0, spread: float = 0.05) -> dict[str, Tensor]:
    """Predictions of both sides under policy and reference, their noise, and soft labels; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noise, ref_w, ref_l = normal(N, D), normal(N, D), normal(N, D)
    return {
        "noise": noise, "ref_w": ref_w, "ref_l": ref_l, "w": ref_w + spread * normal(N, D),
        "l": ref_l + spread * normal(N, D), "p": torch.rand(N, generator=generator, dtype=torch.float64),
    }  # fmt: skip


def scores_of(given: dict[str, Tensor]) -> PairScores:
    """The scores as the family makes them from predictions."""

    def error(prediction: Tensor) -> Tensor:
        return -((prediction - given["noise"]) ** 2).mean(1)

    ones = torch.ones(N, dtype=torch.float64)
    return PairScores(
        error(given["w"]), error(given["l"]), ones, ones, error(given["ref_w"]), error(given["ref_l"]),
        soft_label=given["p"], chosen_residual=given["w"] - given["noise"],
        ref_chosen_residual=given["ref_w"] - given["noise"],
    )  # fmt: skip


def logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def scalar(name: str, given: dict[str, Tensor], n: int, settings: Settings) -> float:
    """The loss of pair n, by the definitions, one number at a time."""

    def mean_square(key: str) -> float:
        return sum((given[key][n, d].item() - given["noise"][n, d].item()) ** 2 for d in range(D)) / D

    winner, loser = mean_square("w"), mean_square("l")
    u = -(SETTINGS.beta / 2) * ((winner - loser) - (mean_square("ref_w") - mean_square("ref_l")))
    p, push = given["p"][n].item(), 1 - logistic(u)
    if name in ("dpo", "flow_dpo", "dspo_rm"):
        return -p * math.log(logistic(u)) - (1 - p) * math.log(logistic(-u))
    if name == "dspo":
        total = 0.0
        for d in range(D):
            eps_th, eps, ref = (given[key][n, d].item() for key in ("w", "noise", "ref_w"))
            total += ((eps_th - eps) - settings.dspo_lambda * push * (eps_th - ref)) ** 2
        return total / D
    if name == "dspo_official_sdxl":
        drift = ((given["w"] - given["ref_w"]) ** 2).mean().item()
        own = sum((given["w"][n, d] - given["ref_w"][n, d]).item() ** 2 for d in range(D)) / D
        return push**2 * (own if drift >= 0.1 else 1.0)
    if name == "mapo":
        phis = [settings.mapo_snr * error / (math.exp(settings.mapo_snr * error) - 1) for error in (winner, loser)]
        return winner - settings.beta * math.log(logistic(settings.num_timesteps * (phis[0] - phis[1])))
    return winner


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_a_loss_is_its_definition(name: str, spread: float) -> None:
    given, settings = draw(spread=spread), replace(SETTINGS, dspo_lambda=0.7)
    losses = OBJECTIVES[name].loss(scores_of(given), settings)
    assert losses.tolist() == pytest.approx([scalar(name, given, n, settings) for n in range(N)], rel=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    given = draw(1)
    predictions = [given[key].requires_grad_() for key in ("w", "l")]

    def loss(winner: Tensor, loser: Tensor) -> Tensor:
        scores = scores_of({**given, "w": winner, "l": loser})
        settings = replace(SETTINGS, dspo_lambda=0.7, dspo_stop_gradient=False)
        return mix([name, "sft"], [1.0, 0.3], settings, SdxlFamily.supplies).loss(scores, settings).sum()

    assert torch.autograd.gradcheck(loss, predictions)


def test_dspo_stops_the_gradient_of_both_factors() -> None:
    """The gradient is 2 (a - f d) / D with f and d constants."""
    given = draw(2)
    winner = given["w"].requires_grad_()
    scores = scores_of({**given, "w": winner})
    (found,) = torch.autograd.grad(dspo(scores, replace(SETTINGS, dspo_lambda=0.7)).sum(), winner)
    factor = 0.7 * (1 - torch.sigmoid(SETTINGS.beta / 2 * scores.margin))
    a, d = given["w"] - given["noise"], given["w"] - given["ref_w"]
    assert torch.allclose(found, 2 / D * (a - factor[:, None] * d), rtol=1e-12)


def test_dspo_rm_of_a_sure_reward_is_dpo() -> None:
    scores = scores_of({**draw(3), "p": torch.ones(N, dtype=torch.float64)})
    hard = PairScores(**{**vars(scores), "soft_label": None})
    assert torch.equal(dspo_rm(scores, SETTINGS), dpo(hard, SETTINGS))
    assert not torch.equal(dspo_rm(scores_of(draw(3)), SETTINGS), dpo(hard, SETTINGS))


def test_dspo_without_lambda_is_fine_tuning() -> None:
    scores = scores_of(draw(4))
    assert torch.equal(dspo(scores, replace(SETTINGS, dspo_lambda=0.0)), sft(scores, SETTINGS))
    assert not torch.equal(dspo(scores, SETTINGS), sft(scores, SETTINGS))


def test_dspo_with_the_published_numbers_is_fine_tuning_too() -> None:
    """lambda = beta = 0.01: the cosine that is logged shows it."""
    scores, beta = scores_of(draw(5)), Settings(beta=0.01, dspo_lambda=0.01)
    assert cosine_to_sft(scores, beta).min() > 1 - 1e-6
    assert cosine_to_sft(scores_of(draw(5, spread=1.0)), SETTINGS).min() < 0.99


def test_the_official_branch_is_dpos_gradient_scaled() -> None:
    given = draw(6)
    winner = given["w"].requires_grad_()
    scores = scores_of({**given, "w": winner, "p": torch.ones(N, dtype=torch.float64)})
    (official,) = torch.autograd.grad(dspo_official_sdxl(scores, SETTINGS).sum(), winner, retain_graph=True)
    (plain,) = torch.autograd.grad(dpo(scores, SETTINGS).sum(), winner)
    s = torch.sigmoid(SETTINGS.beta / 2 * scores.margin)
    assert torch.allclose(official, (2 * s * (1 - s))[:, None] * plain, rtol=1e-10)


def test_the_start_is_ln_2() -> None:
    given = draw(7, spread=0.0)
    scores = scores_of({**given, "p": torch.ones(N, dtype=torch.float64)})
    assert dpo(scores, Settings(beta=5000)).tolist() == [math.log(2)] * N


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_mapo_and_its_gradients_are_the_authors(scale: float) -> None:
    """Their training script's loss, written out in float64; errors from 0.01 to above 1."""
    settings = Settings(beta=0.1, mapo_snr=0.5, num_timesteps=1000)
    given = {name: scale * value for name, value in draw(10).items()}
    sides = [given[key].requires_grad_() for key in ("w", "l")]
    m_w, m_l = (((side - given["noise"]) ** 2).mean(1) for side in sides)
    odds = 0.5 * m_w / (torch.exp(0.5 * m_w) - 1) - 0.5 * m_l / (torch.exp(0.5 * m_l) - 1)
    theirs = m_w - 0.1 * torch.nn.functional.logsigmoid(1000 * odds)
    ours = mapo(scores_of(given), settings)
    assert (ours - theirs).abs().max() < 1e-9
    gradients = [torch.autograd.grad(loss.sum(), sides) for loss in (ours, theirs)]
    assert max((own - other).abs().max().item() for own, other in zip(*gradients, strict=True)) < 1e-9


@pytest.mark.parametrize("key", [{"beta": 0.2}, {"mapo_snr": 1.0}, {"num_timesteps": 100}])
def test_every_number_of_mapo_changes_its_gradient(key: dict[str, float]) -> None:
    given, base = draw(11), Settings(beta=0.1, num_timesteps=5)
    loser = given["l"].requires_grad_()
    gradients = [
        torch.autograd.grad(mapo(scores_of(given), settings).sum(), loser)[0]
        for settings in (base, replace(base, **key))  # type: ignore[arg-type]
    ]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


@pytest.mark.parametrize("error", [0.0, 1e-9, 1e-5, 1e-3, 0.09, 0.11, 0.3, 5.0, 800.0])
def test_phi_and_its_slope_are_exact_down_to_zero(error: float) -> None:
    value = torch.tensor([error], dtype=torch.float64, requires_grad=True)
    phi(value).backward()
    with mpmath.workdps(40):
        exact, slope = mpmath.taylor(lambda x: x / mpmath.expm1(x) if x else mpmath.mpf(1), error or 1e-30, 1)[:2]
    assert value.grad is not None
    assert phi(value).item() == pytest.approx(float(exact), rel=1e-14)
    assert value.grad.item() == pytest.approx(float(slope), rel=1e-12)


def test_mapo_in_bf16_is_computed_in_fp32() -> None:
    error = torch.tensor([0.001], dtype=torch.bfloat16)
    assert phi(error).dtype == torch.float32
    assert phi(error).item() == pytest.approx(0.9995, abs=1e-5)
    naive = error / (torch.exp(error) - 1)
    assert not torch.isfinite(naive).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_says_how_hard_a_pair_pulls(name: str) -> None:
    scores = scores_of(draw(8))
    found = gradient_coefficient(scores, OBJECTIVES[name], SETTINGS)
    assert torch.isfinite(found).all()
    assert (found > 0).any()


def test_pairs_count_by_their_weight_and_the_anchor_is_added() -> None:
    scores = scores_of(draw(9))
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    weighted = PairScores(**{**vars(scores), "weight": weight})
    expected = weight * (mapo(scores, SETTINGS) + 0.25 * sft(scores, SETTINGS))
    assert torch.allclose(mix(["mapo", "sft"], [1.0, 0.25], SETTINGS).loss(weighted, SETTINGS), expected)


def test_images_supply_what_these_objectives_need_and_no_lengths() -> None:
    assert all(OBJECTIVES[name].needs <= SdxlFamily.supplies for name in NAMES)
    with pytest.raises(ConfigError, match="'simpo' does not fit this model family") as refused:
        mix(["simpo"], [1.0], SETTINGS, SdxlFamily.supplies)
    assert "lengths" in str(refused.value)
    assert "mapo" in str(refused.value)


@pytest.mark.parametrize(
    ("parts", "refused"),
    [
        ([], set()),  # not on this machine
        (["unet", "vae"], {"flow_dpo"}),
        (["transformer", "vae"], {"dpo", "dspo", "dspo_official_sdxl", "mapo"}),
    ],
)
def test_an_objective_that_cannot_be_trained_is_refused_in_the_plan(
    parts: list[str], refused: set[str], tmp_path: Path
) -> None:
    """`simpo`, and the default objective on SD 3, were refused when the task had its GPU."""
    of_images = {"sigmoid", "hinge", "ipo", "sft", "dpo", "flow_dpo", "dspo", "dspo_official_sdxl", "dspo_rm", "mapo"}
    if parts:
        (tmp_path / "model_index.json").write_text(json.dumps({part: ["diffusers", "X"] for part in parts}))
    found = set()
    for name in OBJECTIVES:
        with contextlib.suppress(ConfigError):
            found.add(
                validate(SdxlPreferenceConfig, {"model_name_or_path": str(tmp_path), "objective": name}).objective
            )
    assert found == of_images - refused
    with pytest.raises(ConfigError, match="take one of" if parts else "objectives are sigmoid, hinge"):
        validate(SdxlPreferenceConfig, {"model_name_or_path": str(tmp_path), "objective": min(refused or {"simpo"})})


def test_sft_weight_adds_the_winners_error() -> None:
    """m_w of the key's description, by hand."""
    keys = {"objective": "dpo", "beta": 7.0, "learning_rate": 1e-4, "num_train_epochs": 1}
    config, schedule, given = validate(SdxlPreferenceConfig, {**keys, "sft_weight": 0.3}), make_schedule(), draw()
    settings = settings_of(config, schedule)
    found = choose_objective(config, settings, schedule).loss(scores_of(given), settings)
    winner = ((given["w"] - given["noise"]) ** 2).mean(1)
    assert torch.allclose(found, dpo(scores_of(given), settings) + 0.3 * winner, atol=1e-12)
