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

dpo stays at 2.19 in operations. The target took a backward pass for as much work as a forward one; attention's is twice
its forward (four products, not two), 1.6 TFLOPs a pair, and frozen weights do not take that away. Little can be left
out without changing a number: keys and values of the prompt, which winner and loser share, 0.05; gradients to the skip
connections from the layers before the first adapter, which lead nowhere, 0.2. Both together would give 2.21.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sdxl_models import (
    ALPHAS,
    FULL,
    SMALL,
    TARGETS,
    embed,
    encode,
    make_encoders,
    make_pairs,
    make_pipeline,
    make_unet,
    make_vae,
    random_batch,
    run_unet,
    with_lora,
)
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.stage import Task, load_stage
from prefmill.families.sdxl.family import SdxlBatch, SdxlFamily
from prefmill.families.sdxl.noise import NoiseSchedule
from prefmill.training.objectives import OBJECTIVES, Settings

BETA = 5000.0
PAIRS_A_STEP, STEPS, WARM_UP, TURNS = 2, 4, 2, 3
RECIPE = "recipe"
KINDS = {"addmm": "linear layers", "mm": "linear layers", "convolution": "convolutions", "bmm": "attention"}
OURS, DEFAULT = "sdxl_dpo, dpo", "sdxl_dpo, dspo"


def main() -> int:
    """Count, measure and print; returns 0."""
    torch.manual_seed(0)
    print("TFLOPs per pair at SDXL's size, 1024 x 1024 pixels")
    counts = count()
    for name, flops in counts.items():
        against = "" if name.startswith(" ") else f"{counts[RECIPE] / flops:8.2f} x"
        print(f"{name:<60}{flops / 1e12:8.2f}{against}")
        if name == OURS:
            print_kinds()
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


def print_kinds() -> None:
    """The operations of a step with dpo, forward and backward, by kind of layer."""
    with torch.device("meta"):
        adapted, batch = with_lora(make_unet(FULL), FULL.rank), random_batch(1, FULL)
    with FlopCounterMode(display=False) as forward:
        loss = our_loss(adapted, batch, "dpo")
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    for way, counter in (("forward", forward), ("backward", backward)):
        found = dict.fromkeys(KINDS.values(), 0.0)
        for operation, flops in counter.get_flop_counts()["Global"].items():
            found[KINDS[str(operation).removeprefix("aten.").split("_")[0]]] += flops / 1e12
        print(f"  {way}: " + ", ".join(f"{kind} {flops:.2f}" for kind, flops in found.items()))


def measure(folder: Path) -> float:
    """Seconds a pair of both, in turns; returns how many times longer the recipe takes."""
    model, pairs = make_pipeline(folder / "model"), make_pairs(folder / "pairs", (STEPS + WARM_UP) * PAIRS_A_STEP)
    recipe = Recipe(model.path, pairs.path)
    print(
        f"seconds a pair at an eighth of SDXL's width, {SMALL.pixels} pixels, {PAIRS_A_STEP} pairs per step, one thread"
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

        from prefmill.families.sdxl.encoding import load_pixels

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
        self.pixels = torch.stack([load_pixels(path, (SMALL.pixels, SMALL.pixels), False)[0] for path in files])
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
    from prefmill.training.callbacks import StageCallback

    original, times = StageCallback.on_step_end, []

    def on_step_end(self: Any, *args: Any, **kwargs: Any) -> None:
        times.append(time.perf_counter())
        original(self, *args, **kwargs)

    StageCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    try:
        yield times
    finally:
        StageCallback.on_step_end = original  # type: ignore[method-assign]


def our_loss(model: Any, batch: SdxlBatch, objective: str) -> Tensor:
    """The stage's forward pass, given what the reference said."""
    dspo = objective == "dspo"
    family = SdxlFamily(lambda *_: None, lambda *_: torch.zeros(()), NoiseSchedule(ALPHAS), dspo, winner_alone=dspo)
    reference = torch.zeros(batch.num_pairs, device=batch.latents.device)
    given = replace(batch, ref_predictions=batch.noise[: batch.num_pairs])
    scores = family.pair_scores(model, given, reference, reference)
    return OBJECTIVES[objective].loss(scores, Settings(BETA)).mean()


def reference_errors(model: Any, batch: SdxlBatch) -> Tensor:
    """The reference's forward pass."""
    with torch.no_grad(), model.disable_adapter():
        return run_unet(model, batch)


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


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
