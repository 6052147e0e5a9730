"""Mixtures of experts and encoders through fine-tuning, preferences and evaluation, and back to their own form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mdlm_artifacts import SMALL, make_toy, metrics_of, run_stage
from safetensors.torch import load_file, save_file
from training_artifacts import publish_as
from transformers import AutoConfig, AutoModelForMaskedLM

from prefmill.demo.text import build_masked_diffusion
from prefmill.families.mdlm.loading import load_diffusion_tokenizer
from tests.unit.families.mdlm.test_mdlm_kin import ENCODERS, LLADA2, LLADA_MOE, shapes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["llada_moe", "llada2_moe", "modernbert"])
def test_a_tuned_model_has_its_published_names(name: str, tmp_path: Path) -> None:
    start = tmp_path / "start"
    build_masked_diffusion(start, ["how is the table of the draft it is clear and old"] * 3, seed=0)
    tokenizer = load_diffusion_tokenizer(str(start))
    torch.manual_seed(0)
    if name == "modernbert":
        keys = {**ENCODERS[name], "vocab_size": len(tokenizer)}
        AutoModelForMaskedLM.from_config(AutoConfig.for_model(name, **keys)).save_pretrained(start)
    else:
        config = {**(LLADA2 if name == "llada2_moe" else LLADA_MOE), "vocab_size": len(tokenizer)}
        sizes = {key: (len(tokenizer), *size[1:]) if size[0] == 64 else size for key, size in shapes(config).items()}
        weights = {key: torch.randn(size) * 0.1 + ("norm" in key) for key, size in sizes.items()}
        save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
        (start / "config.json").write_text(json.dumps({**config, "mask_token_id": tokenizer.mask_token_id}))
    before = load_file(start / "model.safetensors")
    datasets = make_toy(tmp_path / "toy", num_sft=16, num_pairs=8, num_prompts_held_out=2)
    # Rows of up to 64 tokens, so that LLaDA2, by the blocks of 32 that are its own, has two of them.
    blocks = {"block_length": 8} if name == "llada_moe" else {}
    short = {**SMALL, **blocks, "num_train_epochs": 1, "diffusion_steps": 2, "learning_rate": 1e-3}
    run_stage("mdlm_sft", tmp_path / "sft", {**short, "model_name_or_path": str(start)}, datasets=datasets)
    tuned = publish_as(tmp_path / "sft" / "out", "checkpoint")
    run_stage("mdlm_dpo", tmp_path / "dpo", short, policy=tuned, datasets=datasets)
    after = load_file(tmp_path / "dpo" / "out" / "model.safetensors")
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert sum(not torch.equal(after[key], before[key]) for key in before) > len(before) // 2
    keys = {**blocks, "precision": "fp32", "diffusion_steps": 2, "num_tokens": 8, "exact_chain": bool(blocks)}
    last = publish_as(tmp_path / "dpo" / "out", "checkpoint")
    run_stage("mdlm_evaluate", tmp_path / "evaluation", keys, before=tuned, after=last, datasets=datasets)
    assert "ended_share" in metrics_of(tmp_path / "evaluation")["models"]["after"]
