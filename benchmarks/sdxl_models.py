"""SDXL's models at its own size, for the meta device, and at an eighth of its width; what they are run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefmill.core.artifact import Artifact, Provenance
from prefmill.families.sdxl.family import SdxlBatch
from prefmill.families.sdxl.noise import NoiseSchedule
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


@dataclass(frozen=True)
class Size:
    """Widths of the three models; `pixels` is the side of an image."""

    divisor: int
    pixels: int
    rank: int
    vae: tuple[int, int, int, int]
    cross: int
    text: tuple[dict[str, int], dict[str, int]]


FULL = Size(1, 1024, 8, (128, 256, 512, 512), 2048, (
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
))  # fmt: skip
# The VAE and the text encoders are cut until their share of the time is at most SDXL's share of the work.
SMALL = Size(8, 256, 1, (12, 32, 64, 64), 256, (
    {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4},
    {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 1, "num_attention_heads": 4},
))  # fmt: skip


def make_unet(size: Size) -> Any:
    """SDXL's UNet, its width divided."""
    from diffusers import UNet2DConditionModel

    widths = tuple(width // size.divisor for width in (320, 640, 1280))
    return UNet2DConditionModel(
        sample_size=size.pixels // 8, block_out_channels=widths, layers_per_block=2,
        norm_num_groups=32 // size.divisor, attention_head_dim=(5, 10, 20) if size.divisor == 1 else (1, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, cross_attention_dim=size.cross,
        addition_embed_type="text_time", addition_time_embed_dim=256 // size.divisor,
        projection_class_embeddings_input_dim=6 * 256 // size.divisor + size.text[1]["hidden_size"],
    )  # fmt: skip


def make_vae(size: Size) -> Any:
    """SDXL's VAE, its width divided."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=size.vae, layers_per_block=2,
        norm_num_groups=32 // size.divisor, latent_channels=4, sample_size=size.pixels, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, force_upcast=False,
    )  # fmt: skip


def make_encoders(size: Size, vocab_size: int = 49408) -> tuple[Any, Any]:
    """SDXL's two text encoders."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = [
        CLIPTextConfig(**given, vocab_size=vocab_size, projection_dim=given["hidden_size"], hidden_act="gelu")
        for given in size.text
    ]
    return CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])


def with_lora(unet: Any, rank: int) -> Any:
    """The UNet with the recipe's adapter."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))


def run_unet(unet: Any, batch: SdxlBatch) -> Tensor:
    """What it predicts for a batch."""
    noised = NoiseSchedule(ALPHAS).add(batch.latents, batch.noise, batch.timesteps)
    known = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    prediction: Tensor = unet(noised, batch.timesteps, batch.embeddings, added_cond_kwargs=known, return_dict=False)[0]
    return prediction


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents, eight images at a time."""
    with torch.no_grad():
        moments = [vae.encode(part).latent_dist.mean for part in pixels.split(8)]
    return torch.cat(moments) * vae.config.scaling_factor


def embed(encoders: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and pooled embeddings of prompts."""
    with torch.no_grad():
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[1][0]


def random_batch(pairs: int, size: Size) -> SdxlBatch:
    """Pairs of SDXL's shapes."""
    side = size.pixels // 8
    latents = torch.zeros(2 * pairs, 4, side, side)
    text, pooled = torch.zeros(2 * pairs, 77, size.cross), torch.zeros(2 * pairs, size.text[1]["hidden_size"])
    steps = torch.zeros(2 * pairs, dtype=torch.long)
    return SdxlBatch(latents, latents, steps, text, pooled, torch.zeros(2 * pairs, 6), torch.ones(pairs))


def make_pipeline(folder: Path) -> Artifact:
    """The small models as a pipeline's folder."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from prefmill.demo.tokenizer import train_clip_tokenizer

    tokenizer = train_clip_tokenizer([f"a picture, number {number}" for number in range(99)], 1000, 77)
    encoders = make_encoders(SMALL, len(tokenizer))
    StableDiffusionXLPipeline(
        vae=make_vae(SMALL), text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=make_unet(SMALL), add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ).save_pretrained(folder)  # fmt: skip
    return published(folder, "checkpoint")


def make_pairs(folder: Path, count: int) -> Artifact:
    """So many pairs of noise."""
    from PIL import Image

    rows, generator = [], np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        names = [f"images/{number:02}{side}.png" for side in "ab"]
        for name in names:
            pixels = generator.integers(0, 256, (SMALL.pixels, SMALL.pixels, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        rows.append({
            "pair_id": f"pair{number}", "prompt_id": f"p{number}", "prompt": f"a picture, number {number}",
            "preferred": names[0], "rejected": names[1], "labels": {}, "weight": 1.0, "split": "train",
        })  # fmt: skip
    write_jsonl(folder / "pairs.jsonl", rows)
    return published(folder, "image_pairs")


def published(folder: Path, kind: str) -> Artifact:
    """What is in `folder` as an artifact."""
    return publish(folder, kind, Provenance("benchmark", "all", "f", {}, {}, "0", {}), {})
