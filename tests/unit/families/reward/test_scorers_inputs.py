"""What published scorers are shown, against numbers that their authors' own code gave for the same picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from prefmill.families.reward.open_clip import as_open_clip_reads
from prefmill.families.reward.published import middle, whole


def picture(width: int, height: int) -> Image.Image:
    """Numbers that anybody can make again, grey."""
    values = (np.arange(height * width).reshape(height, width) * 37 % 256).astype(np.uint8)
    return Image.fromarray(values).convert("RGB")


def test_hpsv2_scales_numbers_without_rounding_them() -> None:
    """Of ResizeMaxSize(4) on torchvision's ToTensor: bytes were scaled, and scores up to 3e-4 off."""
    expected = [
        [0.0, 0.0, 0.0, 0.0], [0.381522, 0.521133, 0.441167, 0.378548], [0.459122, 0.434861, 0.558116, 0.471597],
        [0.0, 0.0, 0.0, 0.0],
    ]  # fmt: skip
    for channel in whole(picture(9, 5), 4).numpy():
        np.testing.assert_allclose(channel, expected, atol=2e-6)


def test_image_reward_and_aesthetics_cut_an_odd_rest_as_torchvision() -> None:
    """Of Resize(4) and CenterCrop(4): transformers' crop is a column further left."""
    expected = [[74, 111, 148, 185], [77, 114, 151, 188], [80, 117, 154, 191], [83, 120, 157, 194]]
    assert np.asarray(middle(picture(7, 4), 4))[..., 0].tolist() == expected


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a cat\u2019s \u201chat\u201d", 'a cat\'s "hat"'),  # ftfy.fix_text
        ("dogs &amp;amp; cats &lt;3", "dogs & cats <3"),  # html.unescape, twice
        ("na\u00efve caf\u00e9", "na\u00efve caf\u00e9"),
    ],
)
def test_prompts_are_cleaned_as_by_open_clips_tokenizer(prompt: str, read: str) -> None:
    assert as_open_clip_reads(prompt) == read
