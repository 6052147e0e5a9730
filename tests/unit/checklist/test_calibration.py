"""Calibration: known temperatures are recovered, yes and no stay, and what cannot be fitted is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmill.checklist import calibration
from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.records import Answer
from prefmill.store.artifacts import publish

MODEL = {"engine": "vllm", "model_name_or_path": "some/model", "include_paper": "none", "precision": "bf16"}


def drawn(temperature: float, count: int, seed: int = 0) -> tuple[Any, Any]:
    """P(yes) as an over- or under-confident judge states them, and labels drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 1.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-odds))).astype(float)
    return 1 / (1 + np.exp(-odds * temperature)), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_behind_the_labels_is_found(temperature: float) -> None:
    p_yes, labels = drawn(temperature, 20_000)
    found = calibration.fit_temperature(p_yes, labels, 50)
    assert found == pytest.approx(temperature, rel=0.05)
    tempered = calibration.tempered(p_yes, found)
    assert calibration.negative_log_likelihood(tempered, labels) <= calibration.negative_log_likelihood(p_yes, labels)
    assert calibration.calibration_error(tempered, labels) < 0.02


def test_it_is_where_the_derivative_of_the_likelihood_vanishes() -> None:
    p_yes, labels = drawn(1.7, 400, seed=3)
    odds = np.log(p_yes / (1 - p_yes))
    found = calibration.fit_temperature(p_yes, labels, 50)
    slope = float((odds * (1 / (1 + np.exp(-odds / found)) - labels)).mean())
    assert slope == pytest.approx(0, abs=1e-5)


def test_losses_and_errors_by_hand() -> None:
    p_yes, labels = np.array([0.9, 0.9, 0.9, 0.9, 0.2]), np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    expected = -(3 * math.log(0.9) + math.log(0.1) + math.log(0.8)) / 5
    assert calibration.negative_log_likelihood(p_yes, labels) == pytest.approx(expected)
    assert calibration.calibration_error(p_yes, labels) == pytest.approx((4 * (0.9 - 0.75) + 0.2) / 5)
    assert calibration.calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0
    assert math.isfinite(calibration.negative_log_likelihood(np.array([1.0]), np.array([0.0])))


def test_yes_and_no_stay_and_the_order_of_reviews_does() -> None:
    p_yes = np.linspace(0, 1, 1001)
    for temperature in (0.05, 1.0, 2.5, 40.0):
        tempered = calibration.tempered(p_yes, temperature)
        assert ((tempered > 0.5) == (p_yes > 0.5)).all()
        assert (np.diff(tempered) >= 0).all()
    assert calibration.tempered(p_yes, 1.0) == pytest.approx(p_yes, abs=1e-6)
    answers: dict[str, Answer] = {
        "a": {"yes": True, "p_yes": 0.500001, "evidence": "so"},
        "b": {"yes": False, "p_yes": 0.1},
    }
    after = calibration.temper(answers, 2.0)
    assert after["a"]["yes"] is True
    assert after["a"]["evidence"] == "so"
    assert after["b"]["p_yes"] == pytest.approx(1 / (1 + math.exp(math.log(9) / 2)), abs=1e-6)
    assert answers["b"]["p_yes"] == 0.1


def test_what_cannot_be_fitted_is_refused() -> None:
    p_yes, labels = drawn(2.0, 100)
    with pytest.raises(InputError, match=r"too few labels[\s\S]*49[\s\S]*at least 50"):
        calibration.fit_temperature(p_yes[:49], labels[:49], 50)
    with pytest.raises(InputError, match="gives no probabilities"):
        calibration.fit_temperature((p_yes > 0.5).astype(float), labels, 50)
    with pytest.raises(InputError, match=r"no temperature[\s\S]*never wrong"):
        calibration.fit_temperature(p_yes, (p_yes > 0.5).astype(float), 50)
    with pytest.raises(InputError, match="no better than chance"):
        calibration.fit_temperature(p_yes, (p_yes < 0.5).astype(float), 50)
    with pytest.raises(InputError, match=r"too few labelled dev papers[\s\S]*3[\s\S]*at least 5"):
        calibration.calibrate(MODEL, ["a", "b", "c", "a"] * 25, p_yes, labels, 50, 5, 0)


def test_its_worth_is_measured_on_papers_it_was_not_fitted_on() -> None:
    p_yes, labels = drawn(2.5, 4000)
    papers = [f"p{number % 50}" for number in range(4000)]
    found = calibration.calibrate({"m": 1}, papers, p_yes, labels, 50, 5, 0)
    assert found.temperature == pytest.approx(2.5, rel=0.1)
    assert (found.num_labels, found.num_papers, found.num_folds) == (4000, 50, 5)
    assert found.nll_after < found.nll_before - 0.05
    assert found.ece_after < found.ece_before / 2
    # Where two halves of the papers need opposite temperatures, what one half teaches harms the other.
    first, second = drawn(4.0, 500), drawn(0.25, 500)
    both = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    halves = ["a"] * 500 + ["b"] * 500
    found = calibration.calibrate({}, halves, *both, 50, 2, 0)
    assert found.nll_after >= found.nll_before


def published(folder: Path, found: calibration.Calibration | None) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "quality.json").write_text("{}")
    if found is not None:
        calibration.write_calibration(found, folder)
    return publish(folder, "judge_quality", Provenance("judge_quality", "all", "f", {}, {}, "0", {}), {})


def test_it_is_read_back_for_its_own_judge_alone(tmp_path: Path) -> None:
    p_yes, labels = drawn(2.5, 400)
    papers = [f"p{number % 20}" for number in range(400)]
    found = calibration.calibrate(calibration.judge_of(MODEL), papers, p_yes, labels, 50, 5, 0)
    artifact = published(tmp_path / "a", found)
    assert calibration.read_temperature(None, MODEL) is None
    assert calibration.read_temperature(artifact, MODEL) == found.temperature
    assert calibration.read_temperature(artifact, {**MODEL, "engine": "transformers"}) == found.temperature
    for other in ({"model_name_or_path": "b"}, {"include_paper": "text"}, {"revision": "x"}):
        with pytest.raises(ConfigError, match="another judge"):
            calibration.read_temperature(artifact, {**MODEL, **other})
    with pytest.raises(ConfigError, match="another judge"):
        calibration.read_temperature(artifact, {"engine": "lexical", "evidence": True})
    with pytest.raises(ConfigError, match="no temperature was fitted there"):
        calibration.read_temperature(published(tmp_path / "b", None), MODEL)
    assert json.loads((tmp_path / "a" / "calibration.json").read_text())["judge"]["model_name_or_path"] == "some/model"
