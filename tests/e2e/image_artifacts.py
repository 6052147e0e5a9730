"""Pictures with a known order of quality, and artifacts of them, for tests of the image stages."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.image_rows import GeneratedImage
from prefmill.core.stage import Task
from prefmill.images.files import inspect_image
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl


def draw(path: Path, seed: int, blur: float = 0.0, side: int = 32) -> Path:
    """A picture of coloured bars that follows from `seed`, blurred by a radius in pixels."""
    import numpy as np
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(seed)
    bars = np.repeat(rng.integers(0, 256, (side // 4, side // 4, 3)), 4, axis=0).repeat(4, axis=1).astype(np.uint8)
    image = Image.fromarray(bars).filter(ImageFilter.GaussianBlur(blur))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def make_images(folder: Path, num_prompts: int = 4, num_seeds: int = 2) -> Artifact:
    """A generated_images artifact whose images get blurrier with their seed."""
    rows = []
    for index in range(num_prompts):
        prompt_id = f"p{index:02}"
        for seed in range(num_seeds):
            name = f"images/{prompt_id}/{seed}.png"
            facts = inspect_image(draw(folder / name, index, blur=2.0 * seed))
            rows.append(
                GeneratedImage(
                    image_id=f"{prompt_id}/{seed}", prompt_id=prompt_id, prompt=f"coloured bars, number {index}",
                    seed=seed, file=name, width=facts.width, height=facts.height, sha256=facts.sha256,
                )
            )  # fmt: skip
    write_jsonl(folder / "images.jsonl", rows)
    prompts = [{"prompt_id": row["prompt_id"], "prompt": row["prompt"]} for row in rows[::num_seeds]]
    write_jsonl(folder / "prompts.jsonl", prompts)
    (folder / "summary.json").write_text("{}")
    return publish_as(folder, "generated_images")


def publish_as(folder: Path, kind: str) -> Artifact:
    """What is in `folder` as an artifact."""
    return publish(folder, kind, Provenance("test", "all", "f", {}, {}, "0", {}), {})


def task_for(folder: Path, stage: str, shard: tuple[int, int] = (0, 1), **inputs: Artifact) -> Task:
    """A task by hand; `shard` is its index and their number."""
    output, logs = folder / "output", folder / "logs"
    for path in (output, logs):
        path.mkdir(parents=True, exist_ok=True)
    values: Mapping[str, Any] = {"shard": shard[0]}
    given = {name: (item,) for name, item in inputs.items()}
    return Task("r", stage, "all", values, {"shard": shard[1]}, given, output, logs)


def bomb(path: Path, width: int = 50_000, height: int = 50_000) -> Path:
    """A PNG of a few hundred bytes that claims billions of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path
