"""The image demo's parts: a VAE set by hand, pictures that a tiny SDXL learns from, and their prompts."""

from __future__ import annotations

import csv
import random

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.demo.pretrain_images import vae_by_hand
from prefmill.demo.sample_pictures import draw_lit
from prefmill.families.sdxl.encoding import encode_pixels
from stages.tiny_image_model import TinyImageModelConfig
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_latents_are_means_of_pixels_and_pixels_the_nearest_latent(dtype: torch.dtype, tolerance: float) -> None:
    """Against torch's own pooling and interpolation."""
    vae = vae_by_hand().to(dtype)
    pixels = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    means = avg_pool2d(pixels, 4)
    latents = encode_pixels(vae, pixels) / vae.config.scaling_factor
    torch.testing.assert_close(latents, torch.cat([means, means.mean(1, keepdim=True)], 1), atol=tolerance, rtol=0)
    with torch.no_grad():
        decoded = vae.decode(latents.to(vae.dtype)).sample.float()
    torch.testing.assert_close(decoded, interpolate(means, scale_factor=4), atol=tolerance, rtol=0)


def test_pictures_show_what_their_prompts_say_and_the_demo_asks_for_such() -> None:
    draw = random.Random(0)
    drawn = dict(draw_lit(draw) for _ in range(1000))
    with (REPOSITORY / "configs/generate_images/scenes.csv").open() as stream:
        asked = [row["prompt"] for row in csv.DictReader(stream)]
    assert len(set(asked)) == len(asked) == 90
    assert set(asked) <= set(drawn)
    red, green, blue = drawn["a green square on a red ground"].getpixel((0, 0))
    assert red > 2 * max(green, blue)


def test_a_clip_is_not_pretrained() -> None:
    with pytest.raises(ConfigError, match="only the SDXL is trained"):
        validate(TinyImageModelConfig, {"architecture": "clip", "pretrain_steps": 5})
