"""A tiny SDXL and pairs of small pictures, as artifacts, for tests of the stages that train on pairs of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_artifacts import publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.image_rows import ImagePair
from prefmill.store.jsonl import write_jsonl

PROMPTS = ("a red square on the left", "a blue circle", "two green lines", "a yellow sun over a hill")


def make_sdxl(folder: Path, seed: int = 0) -> Artifact:
    """A tiny SDXL pipeline with random weights."""
    from prefmill.demo.tiny_models import build

    build("sdxl", folder, seed)
    return publish_as(folder, "checkpoint")


def make_pairs(folder: Path, train: int = 12, val: int = 4, sizes: Sequence[tuple[int, int]] = ((40, 32),)) -> Artifact:
    """Pairs whose preferred picture has a bright square in it, the other noise alone; in turn of these sizes."""
    rows: list[ImagePair] = []
    for number in range(train + val):
        names = [f"images/p{number}/{side}.png" for side in ("good", "bad")]
        for name, bright in zip(names, (True, False), strict=True):
            draw_picture(folder / name, number, bright, sizes[(number + bright) % len(sizes)])
        rows.append(
            {
                "pair_id": f"pair{number}",
                "prompt_id": f"p{number}",
                "prompt": PROMPTS[number % len(PROMPTS)],
                "preferred": names[0],
                "rejected": names[1],
                "labels": {"overall": 1.0},
                "weight": 1.0,
                "split": "train" if number < train else "val",
            }
        )
    write_jsonl(folder / "pairs.jsonl", rows)
    return publish_as(folder, "image_pairs")


def draw_picture(path: Path, seed: int, bright: bool, size: tuple[int, int]) -> None:
    """Noise, with a bright square in its middle or without one."""
    import numpy as np
    from PIL import Image

    generator: Any = np.random.default_rng([seed, bright])
    pixels = generator.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
    if bright:
        pixels[8:24, 12:28] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
