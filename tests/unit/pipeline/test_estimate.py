"""Requests against partitions; the memory model against what autograd really keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.stage import load_stage, stage_names
from prefmill.slurm.cluster import Resources, read_cluster, resources_for
from prefmill.slurm.memory import ModelSize, gpu_memory, host_memory, layer_bytes, model_size, optimizer_bytes
from prefmill.slurm.partitions import Partition
from prefmill.slurm.policy import never_starts
from prefmill.training.config import LoraConfig, TrainingConfig
from tests.conftest import REPOSITORY

GPU = Partition("gpu", nodes=4, max_minutes=2880, max_nodes=2, cpus=96, memory_gb=1000, gpus=8)
SIZE = ModelSize(
    parameters=10**9, linear_parameters=8 * 10**8, linear_widths=10**6, layers=10, hidden=1000, intermediate=4000,
    key_value=500, vocabulary=1000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"nodes": 2, "gpus": 8, "cpus": 96, "time_limit_minutes": 2880, "memory_gb": 1000}, None),
        ({"nodes": 3}, "nodes: 3 asked for, gpu has 2"), ({"gpus": 9}, "gpus: 9 asked for, gpu has 8 a node"),
        ({"time_limit_minutes": 2881}, "time_limit_minutes: 2881"),
        ({"cpus": 97}, "cpus: 97"), ({"memory_gb": 1001}, "memory_gb: 1001"),
        ({"partition": "gpus"}, "there is no partition 'gpus': gpu"),
        ({"partition": "gpu,gpus"}, "there is no partition 'gpus': gpu"), ({"partition": "gpu,gpu"}, None),
    ],
)  # fmt: skip
def test_what_can_never_start_is_named(asked: dict[str, Any], said: str | None) -> None:
    problems = list(never_starts(Resources.model_validate({"partition": "gpu", **asked}), {"gpu": GPU, "": GPU}))
    assert [problem.startswith(said) for problem in problems] == [True] if said else problems == []


def training(**keys: Any) -> TrainingConfig:
    return TrainingConfig(learning_rate=1e-5, num_train_epochs=1, max_length=1000, **keys)


def zero(folder: Path, stage: int) -> str:
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(path)


def test_weights_gradients_and_adams_state_are_divided_as_zero_divides_them(tmp_path: Path) -> None:
    def gigabytes(config: TrainingConfig, world: int = 8) -> list[float]:
        memory = gpu_memory(SIZE, config, world, 1, 1)
        return [round(part * 2**30 / 1e9, 3) for part in (memory.weights, memory.gradients, memory.optimizer)]

    assert gigabytes(training(precision="fp32"), 1) == [4, 4, 8]
    assert gigabytes(training(), 1) == [5.6, 4, 8]  # bf16 copies of the linear layers under autocast
    assert gigabytes(training()) == [5.6, 8, 8]  # DDP's buckets
    assert gigabytes(training(deepspeed=zero(tmp_path, 1))) == [2, 2, 1.5]
    assert gigabytes(training(deepspeed=zero(tmp_path, 2))) == [2, 0.25, 1.5]
    assert gigabytes(training(deepspeed=zero(tmp_path, 3))) == [0.25, 0.25, 1.5]
    assert gigabytes(training(lora=LoraConfig(r=10)), 1) == [2, 0.04, 0.08]


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_an_optimizers_state_is_what_it_keeps(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    weight = torch.nn.Linear(64, 64, bias=False)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name), weight)
    optimizer = kind(weight.parameters(), **options)
    weight(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    each = sum(value.nbytes for value in kept if value.numel() > 1) / weight.weight.numel()
    assert each == pytest.approx(optimizer_bytes(name), abs=0.2)  # Adafactor keeps a row and a column


def test_moments_may_be_in_8_bits_or_in_4() -> None:
    names = ("paged_adamw_8bit", "adamw_8bit", "lion_8bit", "lion_32bit", "adamw_torch_4bit", "ademamix_8bit")
    assert [optimizer_bytes(name) for name in names] == [2, 2, 1, 4, 1, 3]


def test_fsdp_shards_weights_gradients_and_moments_in_fp32() -> None:
    memory = gpu_memory(SIZE, training(fsdp=True), 8, 1, 1)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.gathered)
    # Embeddings and head, 0.2e9, with gradients in bf16; two layers of 0.08e9 and one's gradient in bf16 and fp32.
    assert [part * 2**30 / 1e9 for part in parts] == pytest.approx([0.5, 0.5, 1, 0.2 * 4 + 0.08 * (4 + 6)])
    frozen = gpu_memory(SIZE, training(fsdp=True, lora=LoraConfig(r=10)), 8, 1, 1)
    parts = (frozen.weights, frozen.gradients, frozen.optimizer, frozen.gathered)
    assert [part * 2**30 / 1e9 for part in parts] == pytest.approx([0.25, 0.005, 0.01, 0.2 * 2 + 0.08 * 4])


def test_what_is_offloaded_is_the_hosts(tmp_path: Path) -> None:
    shipped = REPOSITORY / "configs" / "deepspeed"
    away, here = (training(deepspeed=str(shipped / name)) for name in ("zero3_offload.json", "zero3.json"))
    memory = gpu_memory(SIZE, away, 8, 1, 1)
    assert (memory.weights, memory.gradients, memory.optimizer) == (0, 0, 0)
    assert memory.gathered * 2**30 == pytest.approx(8e8 / 10 * 4)  # the largest layer and its gradient
    assert memory.activations == gpu_memory(SIZE, here, 8, 1, 1).activations
    assert host_memory(SIZE, away, 8) * 2**30 == pytest.approx(18e9 / 8)
    assert host_memory(SIZE, here, 8) == 0
    optimizer = tmp_path / "optimizer.json"
    optimizer.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    memory = gpu_memory(SIZE, training(deepspeed=str(optimizer)), 8, 1, 1)
    assert (round(memory.weights * 2**30 / 1e9, 3), memory.gradients, memory.optimizer) == (2, 0, 0)
    assert host_memory(SIZE, training(deepspeed=str(optimizer)), 8) * 2**30 == pytest.approx(16e9 / 8)


def test_deepspeed_in_fp32_keeps_no_second_copy(tmp_path: Path) -> None:
    memory = gpu_memory(SIZE, training(deepspeed=zero(tmp_path, 3), precision="fp32"), 8, 1, 1)
    parts = (memory.weights, memory.gradients, memory.optimizer)
    assert [round(part * 2**30 / 1e9, 3) for part in parts] == [0.5, 0.5, 1]


def test_checkpointing_keeps_one_layer_and_the_boundaries() -> None:
    whole = gpu_memory(SIZE, training(), 1, 2, 1).activations
    less = gpu_memory(SIZE, training(activation_checkpointing=True), 1, 2, 1).activations
    assert whole == pytest.approx(10 * layer_bytes(SIZE, "bf16", 4) * 2000 / 2**30)
    assert less == pytest.approx(whole / 10 + 10 * 1000 * 4 * 2000 / 2**30)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "residual"), [("bf16", 4), ("bf16", 2), ("fp32", 4)])
def test_the_activations_of_a_layer_are_what_autograd_keeps(precision: str, residual: int, tmp_path: Path) -> None:
    counted = [_kept_bytes(tmp_path, layers, precision, residual) for layers in (2, 3)]
    size = model_size(str(tmp_path))
    assert size.layers == 3
    assert counted[1] - counted[0] == pytest.approx(layer_bytes(size, precision, residual), rel=0.01)


def _kept_bytes(folder: Path, layers: int, precision: str, residual: int) -> float:
    """Bytes that autograd keeps for one token, weights and their copies left out."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_hidden_layers=layers,
    )  # fmt: skip
    config.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(torch.bfloat16) if residual == 2 else model
    tokens, kept = 510, {}  # no weight has a side of 510

    def note(tensor: Any) -> Any:
        if tokens in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16" and residual == 4)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        model.get_decoder()(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)[0].sum()
    return sum(size for size, _ in kept.values()) / tokens


def test_the_shipped_cluster_file_has_an_entry_for_every_stage_and_gpus_for_what_trains() -> None:
    cluster = read_cluster(REPOSITORY / "configs/clusters/h100.yaml")
    assert sorted(cluster.stages) == stage_names()
    training = [name for name in stage_names() if load_stage(name).trains]
    assert [name for name in training if not resources_for(cluster, name).gpus] == ["tiny_model"] * (
        "tiny_model" in training
    )


@pytest.mark.slow
def test_masked_diffusion_is_counted_as_it_runs() -> None:
    """LLaDA-8B: parameters as published (8.02B), every number with its origin."""
    told = {}
    blocks = ["mdlm_sft.block_length=32", "mdlm_dpo.block_length=32"]
    runs: dict[str, tuple[str, list[str]]] = {
        "mdlm_llada": ("mdlm_llada", []),
        "mdlm_llada_lora": ("mdlm_llada_lora", []),
        "blocks": ("mdlm_llada", blocks),
    }
    for name, (pipeline, keys) in runs.items():
        files = [f"configs/pipelines/{pipeline}.yaml", "--cluster", "configs/clusters/h100.yaml", "--gpu-memory", "80"]
        command = [sys.executable, "-m", "prefmill.cli.main", "estimate", *files, *keys]
        told[name] = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert all("GSAI-ML/LLaDA-8B-Instruct (8.02B), 8 GPUs" in text for text in told.values())
    assert "38.9 GB a GPU: weights 1.9, gradients 16.8, optimizer 11.2" in told["mdlm_llada"]
    assert "8.7 GB a GPU: weights 5.4" in told["mdlm_llada_lora"]
    assert "activations 3.5" in told["mdlm_llada"]
    assert "activations 7.0" in told["blocks"]  # every token stands there twice
    assert "    weights: parameters x bytes a number" in told["mdlm_llada"]


def test_a_16_gb_card_holds_llada_8b_in_4_bits() -> None:
    size = model_size("GSAI-ML/LLaDA-8B-Instruct")
    keys: dict[str, Any] = {"lora": LoraConfig(r=16), "activation_checkpointing": True}
    four_bit = training(**keys).model_copy(update={"quantization": "4bit", "max_length": 4096})
    assert gpu_memory(size, four_bit, 1, 1, 256).total < 14
    assert gpu_memory(size, training(**keys), 1, 1, 256).total > 16


def test_several_passes_hold_gradients_whole(tmp_path: Path) -> None:
    config = training(deepspeed=zero(tmp_path, 3))
    once, often = (gpu_memory(SIZE, config, 8, 1, 1, several_passes=several) for several in (False, True))
    assert (often.gradients - once.gradients) * 2**30 == pytest.approx(SIZE.parameters * 2)


def test_a_stages_own_processes_are_its_ranks() -> None:
    assert Resources(nodes=2, gpus=8).ranks(None) == 16
    assert Resources(nodes=2, gpus=8).ranks(1) == 2
    assert Resources(nodes=2, gpus=8, processes=4).ranks(1) == 8  # the cluster file has the last word, as in a job
