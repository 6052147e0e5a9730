"""A step of sdxl_dpo beside diffusers' published recipe for DPO on SDXL, rebuilt from its documented steps.

    python -m benchmarks.sdxl_step

The recipe (examples/research_projects/diffusion_dpo, its SDXL command): in every step the VAE encodes both images of
each pair, both text encoders the prompts, the UNet runs for the reference with its adapter off, then for the policy
with gradient checkpointing, LoRA of rank 8, AdamW, no caches. sdxl_dpo runs the policy alone; what it computed before
is kept for later trials and resumes, so that a first run also pays for the reference once. Its default objective,
dspo, has a gradient through the winner alone.

Floating-point operations are counted by torch on the meta device, at SDXL's size and 1024 x 1024 pixels, a pair. Time
is measured on a UNet, VAE and text encoders of an eighth of SDXL's width on 256 x 256 pixels, which keeps their
shares of the work: the stage as a user runs it, the recipe beside it in turns. The recipe gets its pixels and tokens
from memory. Targets: 2.3 times fewer operations, 2 times less time. The last line is for machines: the ratio in time.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prefmill.artifacts import Artifact, Provenance, publish
from prefmill.config import validate
from prefmill.preference.objectives import Settings
from prefmill.records import write_jsonl
from prefmill.sdxl.family import SdxlBatch, SdxlFamily
from prefmill.sdxl.names import DiffusionObjective
from prefmill.sdxl.noise import NoiseSchedule
from prefmill.sdxl.objectives import DspoFactors, choose
from prefmill.stage import Task, load_stage

BETA, TARGETS = 5000.0, ["to_q", "to_k", "to_v", "to_out.0"]
PAIRS_A_STEP, STEPS, WARM_UP, TURNS = 2, 4, 2, 3
RECIPE = "recipe"
OURS, DEFAULT = "sdxl_dpo, dpo", "sdxl_dpo, dspo"
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


def main() -> int:
    """Count, measure and print; returns 0."""
    torch.manual_seed(0)
    print("TFLOPs a pair at SDXL's size, 1024 x 1024 pixels")
    counts = count()
    for name, flops in counts.items():
        against = "" if name.startswith(" ") else f"{counts[RECIPE] / flops:8.2f} x"
        print(f"{name:<60}{flops / 1e12:8.2f}{against}")
    print("predicted from UNet passes alone: recipe 64.0, sdxl_dpo with dpo 27.0, that is 2.4 x; target 2.3 x\n")
    with tempfile.TemporaryDirectory() as folder:
        ratio = measure(Path(folder))
    print(f"ratio: {ratio:.2f}")
    return 0


def count() -> dict[str, float]:
    """Operations a pair: of the parts, of the recipe's step, of this project's."""
    with torch.device("meta"):
        unet, vae, encoders = make_unet(FULL), make_vae(FULL), make_encoders(FULL)
        batch = random_batch(1, FULL)
        pixels, tokens = torch.zeros(2, 3, FULL.pixels, FULL.pixels), torch.zeros(1, 77, dtype=torch.long)
    adapted = with_lora(unet, FULL.rank)
    unet_flops = counted(lambda: run_unet(adapted, batch)) / 2
    vae_flops, text_flops = counted(lambda: encode(vae, pixels)) / 2, counted(lambda: embed(encoders, tokens))
    reference = counted(lambda: reference_errors(adapted, batch))
    ours, dspo = (counted(lambda name=name: our_loss(adapted, batch, name).backward()) for name in ("dpo", "dspo"))
    adapted.get_base_model().enable_gradient_checkpointing()
    adapted.train()
    checkpointing = counted(lambda: our_loss(adapted, batch, "dpo").backward())
    once = 2 * vae_flops + text_flops
    return {
        "  UNet forward, one sample": unet_flops,
        "  VAE encoding, one image": vae_flops,
        "  text encoders, one prompt": text_flops,
        RECIPE: once + reference + checkpointing,
        "recipe without checkpointing": once + reference + ours,
        OURS: ours,
        "sdxl_dpo, dpo, the reference not yet kept": ours + reference,
        "sdxl_dpo, dpo, with checkpointing": checkpointing,
        DEFAULT: dspo,
        "sdxl_dpo, dspo, the reference not yet kept": dspo + reference,
    }


def measure(folder: Path) -> float:
    """Seconds a pair of both, in turns; returns how many times longer the recipe takes."""
    model, pairs = make_pipeline(folder / "model"), make_pairs(folder / "pairs")
    recipe = Recipe(model.path, pairs.path)
    print(
        f"seconds a pair at an eighth of SDXL's width, {SMALL.pixels} pixels, {PAIRS_A_STEP} pairs a step, one thread"
    )
    parts = recipe.parts()
    shares = {name: seconds / parts["UNet"] for name, seconds in parts.items()}
    print(
        f"  UNet forward, one sample {parts['UNet']:.3f}; beside it VAE {shares['VAE']:.2f} (SDXL's work: 0.72)", end=""
    )
    print(f", text {shares['text']:.3f} (0.016)")
    times: dict[str, list[float]] = {RECIPE: [], OURS: [], DEFAULT: []}
    for turn in range(TURNS + 1):
        steps = [recipe.step() / PAIRS_A_STEP for _ in range(STEPS)]
        found = {RECIPE: steps}
        found |= {name: run_stage(folder, f"{name[-4:]}{turn}", name[10:], model, pairs) for name in (OURS, DEFAULT)}
        for name, seconds in found.items() if turn else ():  # the first turn fills the caches
            times[name] += seconds
    spent = {name: median(seconds) for name, seconds in times.items()}
    reference = 2 * parts["UNet"]
    spent["sdxl_dpo, dpo, the reference not yet kept"] = spent[OURS] + reference
    spent["sdxl_dpo, dspo, the reference not yet kept"] = spent[DEFAULT] + reference
    for name, seconds in spent.items():
        print(f"{name:<60}{seconds:8.3f}{spent[RECIPE] / seconds:8.2f} x")
    for name, seconds in times.items():
        print(f"  {name}: {min(seconds):.3f} to {max(seconds):.3f} in {len(seconds)} steps")
    print("target 2 x")
    return spent[RECIPE] / spent[OURS]


class Recipe:
    """The published script's training step, on pixels and tokens in memory."""

    def __init__(self, model: Path, pairs: Path) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from peft import LoraConfig
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        from prefmill.sdxl.encoding import load_pixels

        self.unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(r=SMALL.rank, lora_alpha=SMALL.rank, init_lora_weights="gaussian", target_modules=TARGETS)
        )
        self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
        self.encoders = (
            CLIPTextModel.from_pretrained(model, subfolder="text_encoder").requires_grad_(False),
            CLIPTextModelWithProjection.from_pretrained(model, subfolder="text_encoder_2").requires_grad_(False),
        )
        self.trained = [value for value in self.unet.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        files = sorted((pairs / "images").iterdir())[: 2 * PAIRS_A_STEP]
        self.pixels = torch.stack([load_pixels(path, SMALL.pixels, False)[0] for path in files])
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        texts = [f"a picture, number {number}" for number in range(PAIRS_A_STEP)]
        self.tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        size = [SMALL.pixels, SMALL.pixels, 0, 0, SMALL.pixels, SMALL.pixels]
        self.time_ids = torch.tensor([size] * 2 * PAIRS_A_STEP, dtype=torch.float32)

    def step(self) -> float:
        """One optimizer step; returns its seconds."""
        started = time.perf_counter()
        batch = self.batch()
        policy = run_unet(self.unet, batch)
        self.unet.disable_adapters()
        with torch.no_grad():
            reference = run_unet(self.unet, batch)
        self.unet.enable_adapters()
        change = [((value - batch.noise) ** 2).mean((1, 2, 3)).chunk(2) for value in (policy, reference)]
        inside = -BETA / 2 * ((change[0][0] - change[0][1]) - (change[1][0] - change[1][1]))
        (-torch.nn.functional.logsigmoid(inside).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def batch(self) -> SdxlBatch:
        """Latents of both images and embeddings of the prompts, made anew."""
        latents = encode(self.vae, self.pixels)
        text, pooled = embed(self.encoders, self.tokens)
        noise = torch.randn(latents[:PAIRS_A_STEP].shape).repeat(2, 1, 1, 1)
        steps = torch.randint(1000, (PAIRS_A_STEP,)).repeat(2)
        twice = (text.repeat(2, 1, 1), pooled.repeat(2, 1))
        return SdxlBatch(latents, noise, steps, *twice, self.time_ids, torch.ones(PAIRS_A_STEP))

    def parts(self) -> dict[str, float]:
        """Seconds of the forward passes that SDXL's work is made of."""
        batch = self.batch()
        with torch.no_grad():
            unet = min(timed(lambda: run_unet(self.unet, batch)) for _ in range(2)) / len(batch.latents)
            vae = min(timed(lambda: encode(self.vae, self.pixels)) for _ in range(2)) / len(self.pixels)
            text = min(timed(lambda: embed(self.encoders, self.tokens)) for _ in range(2)) / len(self.tokens)
        return {"UNet": unet, "VAE": vae, "text": text}


def run_stage(folder: Path, name: str, objective: str, model: Artifact, pairs: Artifact) -> list[float]:
    """sdxl_dpo as it is: seconds a pair of each step, without those in which it warms up."""
    stage = load_stage("sdxl_dpo")
    keys = {
        "objective": objective, "beta": BETA, "resolution": SMALL.pixels, "precision": "fp32", "learning_rate": 1e-5,
        "lora": {"r": SMALL.rank, "alpha": float(SMALL.rank), "use_dora": False, "target_modules": TARGETS},
        "max_steps": STEPS + WARM_UP, "per_device_train_batch_size": PAIRS_A_STEP, "effective_batch_size": PAIRS_A_STEP,
        "logging_steps": 100, "save_steps": 100, "report_to": [], "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    for part in ("out", "logs"):
        (folder / name / part).mkdir(parents=True)
    inputs = {"model": (model,), "pairs": (pairs,)}
    task = Task("r", "sdxl_dpo", "all", {}, {}, inputs, folder / name / "out", folder / name / "logs")
    with step_times() as times, redirect_stdout(io.StringIO()):  # its log lines
        stage.run(validate(stage.config, keys), task)
    return [(after - before) / PAIRS_A_STEP for before, after in pairwise(times[WARM_UP - 1 :])]


@contextmanager
def step_times() -> Iterator[list[float]]:
    """When each optimizer step ended."""
    from prefmill.callbacks import StageCallback

    original, times = StageCallback.on_step_end, []

    def on_step_end(self: Any, *args: Any, **kwargs: Any) -> None:
        times.append(time.perf_counter())
        original(self, *args, **kwargs)

    StageCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    try:
        yield times
    finally:
        StageCallback.on_step_end = original  # type: ignore[method-assign]


def our_loss(model: Any, batch: SdxlBatch, objective: DiffusionObjective) -> Tensor:
    """The stage's forward pass, given what the reference said."""
    dspo = objective == "dspo"
    family = SdxlFamily(lambda *_: None, lambda *_: torch.zeros(()), NoiseSchedule(ALPHAS), dspo, winner_alone=dspo)
    reference = torch.zeros(batch.num_pairs, device=batch.latents.device)
    given = replace(batch, ref_predictions=batch.noise[: batch.num_pairs])
    scores = family.pair_scores(model, given, reference, reference)
    return choose(objective, 0.0, DspoFactors()).loss(scores, Settings(BETA)).mean()


def reference_errors(model: Any, batch: SdxlBatch) -> Tensor:
    """The reference's forward pass."""
    with torch.no_grad(), model.disable_adapter():
        return run_unet(model, batch)


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


def counted(work: Callable[[], object]) -> float:
    """Floating-point operations of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def random_batch(pairs: int, size: Size) -> SdxlBatch:
    """Pairs of SDXL's shapes."""
    side = size.pixels // 8
    latents = torch.zeros(2 * pairs, 4, side, side)
    text, pooled = torch.zeros(2 * pairs, 77, size.cross), torch.zeros(2 * pairs, size.text[1]["hidden_size"])
    steps = torch.zeros(2 * pairs, dtype=torch.long)
    return SdxlBatch(latents, latents, steps, text, pooled, torch.zeros(2 * pairs, 6), torch.ones(pairs))


def with_lora(unet: Any, rank: int) -> Any:
    """The UNet with the recipe's adapter."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))


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


def make_pipeline(folder: Path) -> Artifact:
    """The small models as a pipeline's folder."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from prefmill.tiny.tokenizer import train_clip_tokenizer

    tokenizer = train_clip_tokenizer([f"a picture, number {number}" for number in range(99)], 1000, 77)
    encoders = make_encoders(SMALL, len(tokenizer))
    StableDiffusionXLPipeline(
        vae=make_vae(SMALL), text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=make_unet(SMALL), add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ).save_pretrained(folder)  # fmt: skip
    return published(folder, "checkpoint")


def make_pairs(folder: Path) -> Artifact:
    """Pairs of noise, enough for all steps."""
    from PIL import Image

    rows, generator = [], np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range((STEPS + WARM_UP) * PAIRS_A_STEP):
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


if __name__ == "__main__":
    sys.exit(main())
