"""tiny_image_model: plain folders that diffusers and transformers load, the same every time."""

from __future__ import annotations

from dataclasses import replace
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


@pytest.mark.slow
def test_a_pretrained_one_has_learnt_what_prompts_ask_for(tmp_path: Path) -> None:
    """Its error is lower with a picture's own prompt than with another's, and follows from the seed to the byte."""
    digests, told = [], {}
    for name, steps in (("a", 20), ("b", 20), ("c", 2), ("long", 250)):
        task = task_for(tmp_path / name, "tiny_image_model")
        told[name] = stage.run(validate(stage.TinyImageModelConfig, {"pretrain_steps": steps}), task)
        digests.append(publish_as(task.output, "checkpoint").manifest.content_digest)
    assert digests[0] == digests[1] != digests[2]
    assert told["long"]["final_loss"] < 0.8 * told["c"]["final_loss"]
    own, others = errors_by_prompt(tmp_path / "long" / "output")
    assert own < 0.95 * others


def errors_by_prompt(folder: Path) -> tuple[float, float]:
    """Mean errors at nearly pure noise, with the pictures' prompts and with those of others."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    from prefmill.demo.pretrain_images import encoded
    from prefmill.families.sdxl.family import errors, predict
    from prefmill.families.sdxl.noise import load_schedule

    pipeline, schedule = StableDiffusionXLPipeline.from_pretrained(folder), load_schedule(folder, None)
    generator = torch.Generator().manual_seed(0)
    batch = encoded(pipeline, seed=1).side(torch.arange(256))
    noise, late = torch.randn(batch.latents.shape, generator=generator), torch.full((256,), 900)
    own = replace(batch, noise=noise, timesteps=late)
    turned = replace(own, embeddings=own.embeddings.roll(1, 0), pooled=own.pooled.roll(1, 0))
    with torch.no_grad():
        found = [errors(*predict(pipeline.unet, given, schedule)).mean().item() for given in (own, turned)]
    return found[0], found[1]
