"""Pre-training the tiny SDXL's UNet behind a VAE made by hand, so that a preference has something to move."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prefmill.core.seeding import seeded
from prefmill.core.stage import Metrics, Task
from prefmill.demo.sample_pictures import SIDE, draw_lit
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


_CHANNELS, _WIDTH = 4, 16  # of the latents; four channels of a half carry one, see _set_ends
_LARGE = 32.0


def vae_by_hand() -> Any:
    """An AutoencoderKL whose latents are the means of 4 x 4 pixels, and whose pixels the nearest latent.

    The fourth channel is the mean of red, green and blue.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(_WIDTH,) * 3,
        norm_num_groups=_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=_CHANNELS,
        scaling_factor=1.5,  # brings sample pictures to about unit variance
        force_upcast=False,
    )
    colours = torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)])
    with torch.no_grad():
        for weight in vae.parameters():
            weight.zero_()  # a block whose last weights are 0 adds nothing to what it is given
        _set_ends(vae.encoder, colours)
        _set_ends(vae.decoder, torch.eye(_CHANNELS))
        for block in vae.encoder.down_blocks[:-1]:
            block.downsamplers[0].conv.weight[:, :, :2, :2] = torch.eye(_WIDTH)[:, :, None, None] / 4
        for block in vae.decoder.up_blocks[:-1]:
            block.upsamplers[0].conv.weight[:, :, 1, 1] = torch.eye(_WIDTH)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight[:, :, 0, 0] = torch.eye(len(conv.weight))
    return vae


def _set_ends(half: Any, mixed: Tensor) -> None:
    """Carry each row x of `mixed` [4, in] through a half as the group (x, -x, K, -K), and out again.

    With a large K the last norm, over that group, only divides by K / sqrt(2); and SiLU(x) - SiLU(-x) = x.
    """
    half.conv_in.weight[0::4, :, 1, 1], half.conv_in.weight[1::4, :, 1, 1] = mixed, -mixed
    half.conv_in.bias[2::4], half.conv_in.bias[3::4] = _LARGE, -_LARGE
    half.conv_norm_out.weight.fill_(_LARGE / 2**0.5)
    # The encoder's other four outputs are the latents' variances, the decoder has three colours.
    for row in range(min(_CHANNELS, len(half.conv_out.weight))):
        half.conv_out.weight[row, 4 * row : 4 * row + 2, 1, 1] = torch.tensor([1.0, -1.0])
