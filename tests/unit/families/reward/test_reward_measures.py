"""What is said of a reward model's predictions: known values, chance, ties; the order of the sides is no matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prefmill.core.statistics import Resampling
from prefmill.families.reward.data import PixelReader, coin, in_half
from prefmill.families.reward.measures import calibration_error, fit_temperature, fit_tie_band, measure_head, tie_aware
from prefmill.training.objectives import PairScores, Settings, mix

RESAMPLING = Resampling(1000)


def head(margins: Any, labels: Any, flipped: Any, prompts: list[str]) -> dict[str, Any]:
    found = measure_head(np.array(margins), np.array(labels), np.array(flipped), prompts, 1.0, 0.0, RESAMPLING)
    assert found is not None
    return found


def test_f1_and_accuracy_by_hand() -> None:
    """Four decided pairs, a tie and one without a label; the second and third are turned round."""
    found = head(
        [2.0, -1.0, 3.0, -2.0, 0.5, 9.0], [1.0, 1.0, 0.9, 0.2, 0.5, np.nan],
        [False, True, True, False, False, False], list("aabbcc"),
    )  # fmt: skip
    # First is better in truth: yes, no, no, no; said: yes, yes, no, no.
    assert found["num_pairs"] == 5
    assert found["num_decided"] == 4
    assert found["accuracy"]["value"] == pytest.approx(3 / 4)
    assert found["f1"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["num_prompts"] == 3


def test_a_guess_has_an_f1_of_a_half_only_where_the_order_is_random() -> None:
    generator = np.random.default_rng(0)
    margins, prompts = generator.normal(size=4000), [str(n) for n in range(4000)]
    random_order = generator.random(4000) < 0.5
    assert head(margins, np.ones(4000), random_order, prompts)["f1"]["value"] == pytest.approx(0.5, abs=0.03)
    assert head(margins, np.ones(4000), np.zeros(4000, bool), prompts)["f1"]["value"] == pytest.approx(2 / 3, abs=0.03)
    assert head(np.zeros(400), np.ones(400), random_order[:400], prompts[:400])["accuracy"]["value"] == 0.5


def test_intervals_are_over_prompts() -> None:
    """The same hundred pairs are worth less when ten of a prompt are alike."""
    right = np.repeat(np.array([1.0, -1.0] * 5), 10)
    of_ten = head(right, np.ones(100), np.zeros(100, bool), [str(n // 10) for n in range(100)])["accuracy"]
    of_one = head(right, np.ones(100), np.zeros(100, bool), [str(n) for n in range(100)])["accuracy"]
    assert of_ten["value"] == of_one["value"] == 0.5
    assert of_ten["high"] - of_ten["low"] > 2 * (of_one["high"] - of_one["low"])
    alone = head(right, np.ones(100), np.zeros(100, bool), ["a"] * 100)["accuracy"]
    assert alone["low"] is None


def test_ties_count_half() -> None:
    margins, labels = np.array([2.0, 0.0, 0.0, -2.0, 2.0]), np.array([1.0, 0.5, 1.0, 1.0, 0.5])
    assert tie_aware(margins, labels, 0.1).tolist() == [1.0, 1.0, 0.5, 0.0, 0.5]
    assert fit_tie_band(np.array([3.0, 0.05, -0.04]), np.array([1.0, 0.5, 0.5])) > 0
    assert fit_tie_band(np.array([3.0, -3.0]), np.array([1.0, 0.0])) == 0


def test_the_temperature_that_made_the_labels_is_found() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=20_000) * 2
    labels = (generator.random(20_000) < 1 / (1 + np.exp(-logits))).astype(float)
    assert fit_temperature(logits * 4, labels) == pytest.approx(4, rel=0.05)
    assert calibration_error(logits, labels) < 0.02 < calibration_error(logits * 4, labels)
    assert calibration_error(-logits, 1 - labels) == pytest.approx(calibration_error(logits, labels))
    assert fit_temperature(np.zeros(3), np.full(3, np.nan)) == 1.0


REWARD_LOSS = mix(["bradley_terry_heads"], [1.0], Settings(1.0)).loss


def scores(margins: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> PairScores:
    zeros, ones = torch.zeros(len(margins), dtype=margins.dtype), torch.ones(len(margins))
    mean = margins.mean(1)
    return PairScores(
        mean, zeros, ones, ones, weight=weights, head_deviations=margins - mean[:, None], head_labels=labels
    )  # fmt: skip


def test_the_loss_is_bradley_terrys_by_hand_and_does_not_see_the_order() -> None:
    margins = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.3, torch.nan], [torch.nan, 0.5, 1.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    p = 1 / (1 + np.exp(-margins.numpy()))
    first = (-np.log(p[0, 0]) - 0.3 * np.log(p[0, 1]) - 0.7 * np.log(1 - p[0, 1])) / 2
    second = (-0.5 * np.log(p[1, 1]) - 0.5 * np.log(1 - p[1, 1]) - np.log(p[1, 2])) / 2
    found = REWARD_LOSS(scores(margins, labels, weights), Settings(1.0))
    assert found.tolist() == pytest.approx([first, 0.5 * second], rel=1e-12)
    assert torch.allclose(found, REWARD_LOSS(scores(-margins, 1 - labels, weights), Settings(1.0)))
    assert torch.autograd.gradcheck(
        lambda m: REWARD_LOSS(scores(m, labels, weights), Settings(1.0)), margins.requires_grad_()
    )


def test_halves_and_coins_follow_from_names() -> None:
    names = [f"p{n}" for n in range(400)]
    judges = [name for name in names if in_half(name, "judge")]
    assert sorted(judges + [name for name in names if in_half(name, "policy")]) == sorted(names)
    assert 150 < len(judges) < 250
    assert all(in_half(name, "all") for name in names)
    assert 150 < sum(coin(0, name) for name in names) < 250
    assert [coin(0, name) for name in names] != [coin(1, name) for name in names]


def test_a_crop_is_the_same_for_a_prompts_images_and_another_in_each_epoch(tmp_path: Path) -> None:
    class Processor:
        """Returns the pixels as they are."""

        def image_processor(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
            pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
            return {"pixel_values": torch.from_numpy(pixels)}

    picture = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    for name in ("a.png", "b.png"):
        Image.fromarray(picture).save(tmp_path / name)
    reader = PixelReader(Processor(), crop_scale=0.5, seed=3)
    boxes = [reader.crop("p", epoch) for epoch in range(4)]
    assert len(set(boxes)) == 4
    assert boxes == [reader.crop("p", epoch) for epoch in range(4)]
    assert reader.crop("q", 0) != boxes[0]
    for box in boxes:
        assert box is not None
        assert 0 <= box[0] < box[2] <= 1
        assert 0.5 <= box[2] - box[0] <= 1
        first, second = reader.read([(tmp_path / name, box) for name in ("a.png", "b.png")])
        assert torch.equal(first, second)
        assert first.shape[1] < 40
    assert PixelReader(Processor()).crop("p", 0) is None
