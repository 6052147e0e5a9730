"""Pre-training the tiny SDXL's UNet on sample pictures, so that a preference has something to move."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prefmill.core.seeding import seeded
from prefmill.core.stage import Metrics, Task
from prefmill.demo.sample_pictures import SIDE, draw_lit
from prefmill.demo.vae_by_hand import vae_by_hand
from prefmill.families.sdxl.encoding import encode_pixels, encode_prompt
from prefmill.families.sdxl.family import SdxlBatch, errors, predict
from prefmill.families.sdxl.noise import load_schedule

_NUM_PICTURES, _BATCH_SIZE, _PEAK_LEARNING_RATE = 1024, 32, 5e-3
_UNET = {"sample_size": SIDE // 4, "block_out_channels": (32, 32), "transformer_layers_per_block": 1}
_LAST = 50  # steps whose mean loss is told


def pretrain_unet(folder: Path, steps: int, seed: int, task: Task) -> Metrics:
    """Give the pipeline in `folder` a VAE that works and a UNet that has learnt to draw, in dim or full light."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    # Predicting v weights a picture's errors alike at all noise: what a prompt asks for is learnt many times faster.
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    with seeded(seed):
        unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **_UNET, "_name_or_path": ""}).train()
    pipeline.register_modules(vae=vae_by_hand(), unet=unet)
    pipeline.register_to_config(_name_or_path="")  # diffusers would write this machine's folder into the files
    pipeline.save_pretrained(folder)
    pictures, schedule = encoded(pipeline, seed), load_schedule(folder, None)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=steps)
    losses = []
    with seeded(seed):
        for step in tqdm(range(1, steps + 1), desc="learning to draw", unit=" steps"):
            loss = errors(*predict(unet, _drawn(pictures, schedule.num_timesteps), schedule)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            task.progress(step, steps, "steps")
    unet.save_pretrained(folder / "unet")
    last = losses[-_LAST:]
    return {"steps": steps, "final_loss": sum(last) / len(last)}


def encoded(pipeline: Any, seed: int) -> SdxlBatch:
    """All pictures as the UNet sees them, not yet noised."""
    draw = random.Random(f"pictures:{seed}")
    prompts, pictures = zip(*(draw_lit(draw) for _ in range(_NUM_PICTURES)), strict=True)
    embeddings, pooled = encode_prompt(pipeline, prompts, torch.device("cpu"))
    latents = encode_pixels(pipeline.vae, pipeline.image_processor.preprocess(list(pictures)))
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).expand(_NUM_PICTURES, -1)
    none = torch.zeros(_NUM_PICTURES)
    return SdxlBatch(latents, none, none, embeddings, pooled, sizes, weight=none)


def _drawn(pictures: SdxlBatch, num_timesteps: int) -> SdxlBatch:
    """A batch of pictures at random, with noise and timesteps of torch's generator."""
    batch = pictures.side(torch.randint(_NUM_PICTURES, (_BATCH_SIZE,)))
    timesteps = torch.randint(num_timesteps, (_BATCH_SIZE,))
    return replace(batch, noise=torch.randn_like(batch.latents), timesteps=timesteps)
