"""Figures of judging, of SDXL and of masked diffusion on one GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_training import seconds
from benchmarks.scoring_work import Work, save_model, usual_prompts
from benchmarks.sdxl_models import (
    FULL,
    SMALL,
    Size,
    embed,
    encode,
    make_encoders,
    make_unet,
    make_vae,
    random_batch,
    run_unet,
    with_lora,
)
from prefmill.demo.text import Shape
from prefmill.reviews.generated import generate

JUDGE = Shape(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
              intermediate_size=18_944)  # fmt: skip


def judge(tiny: bool) -> str:
    """Items a second of the engine and of a prompt an item through the same vLLM, and the share read from its cache."""
    if tiny:
        return "left out: on a CPU this is benchmarks.scoring"
    from vllm import SamplingParams

    from prefmill.checklist.engine import VllmConfig
    from prefmill.checklist.engines import open_engine
    from prefmill.checklist.items import load_checklist

    rows = generate(7, 64)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), [row["review_text"] for row in rows], JUDGE)
        papers = [
            ({"paper_id": row["paper_id"], "title": row["title"], "abstract": row["abstract"], "text": ""},
             [{"paper_id": row["paper_id"], "review_id": row["review_id"], "text": row["review_text"]}])
            for row in rows
        ]  # fmt: skip
        engine: Any = open_engine(
            VllmConfig(model_name_or_path=folder, include_paper="title_abstract"), load_checklist()
        )
        llm = engine._llm
        prompts = usual_prompts(Work(papers, folder, 0.0), item_first=True)
        wanted = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        spent = {
            "ours": seconds(lambda: (llm.reset_prefix_cache(), list(engine.score(papers)))),
            "usual script": seconds(lambda: (llm.reset_prefix_cache(), llm.generate(prompts, wanted, use_tqdm=False))),
        }
    rates = ", ".join(f"{name} {len(prompts) / value:,.0f} items/s" for name, value in spent.items())
    cached = engine.num_cached_tokens / engine.num_prompt_tokens
    return f"{rates}: {spent['usual script'] / spent['ours']:.1f} x; {cached:.0%} of the tokens from the cache"


def sdxl(tiny: bool) -> str:
    """Steps a second of one pair: ours with caches and dspo, diffusers' recipe with VAE, encoders and a reference."""
    size, device = (SMALL, torch.device("cpu")) if tiny else (FULL, torch.device("cuda"))
    with device:
        unet = with_lora(make_unet(size), size.rank).to(torch.bfloat16)
        vae, encoders = make_vae(size).to(torch.bfloat16), make_encoders(size)
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([value for value in unet.parameters() if value.requires_grad], lr=1e-5)
    spent = {"ours": seconds(lambda: _own_step(unet.train(), optimizer, size, device)),
             "recipe": seconds(lambda: _recipe_step(unet.train(), vae, encoders, optimizer, size, device))}  # fmt: skip
    rates = ", ".join(f"{name} {1 / value:.2f} steps/s" for name, value in spent.items())
    return f"{rates}: {spent['recipe'] / spent['ours']:.2f} x"


def _own_step(unet: Any, optimizer: Any, size: Size, device: torch.device) -> None:
    from benchmarks.sdxl_step import our_loss

    with torch.autocast(device.type, dtype=torch.bfloat16):
        our_loss(unet, random_batch(1, size).to(device), "dspo").backward()
    optimizer.step()
    optimizer.zero_grad()


def _recipe_step(unet: Any, vae: Any, encoders: Any, optimizer: Any, size: Size, device: torch.device) -> None:
    from benchmarks.sdxl_step import reference_errors

    pixels = torch.zeros(2, 3, size.pixels, size.pixels, device=device, dtype=torch.bfloat16)
    tokens = torch.ones(1, 77, dtype=torch.long, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        encode(vae, pixels)
        embed(encoders, tokens)
        batch = random_batch(1, size).to(device)
        policy, reference = run_unet(unet, batch), reference_errors(unet, batch)
        (policy - reference).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def masked_diffusion(tiny: bool) -> str:
    """Values scored a second, forward and backward, and tokens generated a second."""
    from prefmill.families.mdlm.generation import Unmasking
    from prefmill.families.mdlm.generation import generate as unmask
    from prefmill.families.mdlm.scorer import restore_forward
    from tests.gpu.test_nothing_read_back import take
    from tests.training_steps import Step
    from tests.training_steps import masked_diffusion as make

    device = torch.device("cpu" if tiny else "cuda")
    with device:
        made = make("tiny" if tiny else "true")
    step = Step(made.model.train(), made.batch.to(device), made.losses)
    scored = made.batch.weights.numel() / seconds(lambda: take(step, device))
    restore_forward(step.model.eval().to(torch.bfloat16))
    num_tokens = 16 if tiny else 128
    how = Unmasking(num_tokens, num_tokens, num_tokens, 0.0, "low_confidence", 0)
    written = num_tokens / seconds(lambda: unmask(step.model, [[1, 2, 3]], how, 499))
    return f"{scored:,.1f} values/s scored and trained, {written:,.1f} tokens/s generated, one answer, a step a token"
