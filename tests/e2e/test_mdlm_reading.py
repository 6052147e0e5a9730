"""How a model's outputs are read, told to one stage, holds for the next ones: the finished folder says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mdlm_artifacts import SMALL, make_toy, metrics_of, run_stage
from safetensors.torch import save_file
from training_artifacts import publish_as

from prefmill.demo.text import build_masked_diffusion
from prefmill.families.mdlm.loading import load_diffusion_tokenizer
from tests.unit.families.mdlm.test_mdlm_kin import LLADA_MOE, shapes

pytestmark = pytest.mark.slow
TOLD: dict[str, Any] = {"shifted_logits": True, "block_length": 8}
EVALUATION = {"precision": "fp32", "diffusion_steps": 2, "num_tokens": 8, "exact_chain": False}


def as_published(folder: Path) -> None:
    """The model in `folder` as one whose configuration is written back in its published form."""
    number = len(load_diffusion_tokenizer(str(folder)))
    config = {key: value for key, value in LLADA_MOE.items() if key != "mask_token_id"} | {"vocab_size": number}
    sizes = {key: (number, *size[1:]) if size[0] == 64 else size for key, size in shapes(config).items()}
    torch.manual_seed(0)
    weights = {key: torch.randn(size) * 0.1 + ("norm" in key) for key, size in sizes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("published", [False, True])
def test_a_finished_folder_says_how_its_outputs_are_read(published: bool, tmp_path: Path) -> None:
    start = tmp_path / "start"
    build_masked_diffusion(start, ["how is the table of the draft it is clear and old"] * 3, seed=0)
    told = {**TOLD, "mask_token_id": load_diffusion_tokenizer(str(start)).mask_token_id}
    if published:
        as_published(start)
    datasets = make_toy(tmp_path / "toy", num_sft=16, num_pairs=8, num_prompts_held_out=2)
    short = {**SMALL, "num_train_epochs": 1, "diffusion_steps": 2, "learning_rate": 1e-3}
    run_stage("mdlm_sft", tmp_path / "sft", {**short, **told, "model_name_or_path": str(start)}, datasets=datasets)
    tuned = publish_as(tmp_path / "sft" / "out", "checkpoint")
    run_stage("mdlm_dpo", tmp_path / "dpo", short, policy=tuned, datasets=datasets)
    last = publish_as(tmp_path / "dpo" / "out", "checkpoint")
    for folder in ("sft", "dpo"):
        said = json.loads((tmp_path / folder / "out" / "config.json").read_text())
        assert {key: said.get(key) for key in told} == told
    found = []
    for name, keys in (("untold", {}), ("told", told), ("otherwise", {"shifted_logits": False})):
        run_stage("mdlm_evaluate", tmp_path / name, {**EVALUATION, **keys}, before=tuned, after=last, datasets=datasets)
        found.append(metrics_of(tmp_path / name)["models"])
    assert found[0] == found[1] != found[2]


def test_an_adapter_says_it_too(tmp_path: Path) -> None:
    """Given as the model it is the merged folder to the last digit; a training that goes on with it hands it on."""
    from transformers import AutoModelForCausalLM

    start = tmp_path / "start"
    build_masked_diffusion(start, ["how is the table of the draft it is clear and old"] * 3, seed=0)
    datasets = make_toy(tmp_path / "toy", num_sft=16, num_pairs=8, num_prompts_held_out=2)
    keys = {**SMALL, "num_train_epochs": 1, "diffusion_steps": 2, "learning_rate": 1e-2}
    keys["model_name_or_path"] = str(start)
    run_stage("mdlm_sft", tmp_path / "sft", {**keys, **TOLD, "lora": {"r": 4}}, datasets=datasets)
    adapter = tmp_path / "sft" / "out" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(start)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    run_stage("mdlm_dpo", tmp_path / "dpo", {**keys, "lora": {"start": str(adapter)}}, datasets=datasets)
    for told in (
        tmp_path / "dpo" / "out" / "config.json",
        tmp_path / "dpo" / "out" / "adapter" / "masked_diffusion.json",
    ):
        assert json.loads(told.read_text()).items() >= TOLD.items()
    found = []
    for name, folder in (("merged", adapter.parent), ("adapter", adapter)):
        place = {**EVALUATION, "model_name_or_path": str(folder)}
        run_stage("mdlm_evaluate", tmp_path / name, place, datasets=datasets)
        found.append(metrics_of(tmp_path / name)["models"])
    assert found[0] == found[1]
    # transformers finds the base through the adapter, as of any: a config.json in its folder would hide it.
    with torch.no_grad():
        read, merged = (
            AutoModelForCausalLM.from_pretrained(folder)(torch.arange(6)[None]).logits
            for folder in (adapter, adapter.parent)
        )
    torch.testing.assert_close(read, merged, atol=1e-5, rtol=0)
