"""tiny_image_model: plain folders that diffusers and transformers load, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_artifacts import publish_as, task_for

import stages.tiny_image_model as stage
from prefmill.core.config import validate


@pytest.mark.slow
def test_both_models_load_and_follow_from_the_seed(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPModel, CLIPProcessor

    digests = []
    for name, architecture, seed in (("a", "sdxl", 0), ("b", "sdxl", 0), ("c", "sdxl", 1), ("d", "clip", 0)):
        task = task_for(tmp_path / name, "tiny_image_model")
        stage.run(validate(stage.TinyImageModelConfig, {"architecture": architecture, "seed": seed}), task)
        digests.append(publish_as(task.output, "checkpoint").manifest.content_digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "a" / "output")
    CLIPModel.from_pretrained(tmp_path / "d" / "output")
    CLIPProcessor.from_pretrained(tmp_path / "d" / "output")
