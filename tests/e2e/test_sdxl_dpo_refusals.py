"""sdxl_dpo refuses keys, pairs, a pipeline and weights that it cannot train with, each in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from image_pair_artifacts import make_pairs, make_sdxl
from mdlm_artifacts import run_stage
from safetensors.torch import load_file, save_file
from training_artifacts import publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, DivergedError, InputError
from stages.sdxl_dpo import SdxlDpoConfig

KEYS: dict[str, Any] = {
    "resolution": 32, "precision": "fp32", "lora": {"r": 4}, "learning_rate": 1e-3, "num_train_epochs": 2,
    "per_device_train_batch_size": 2, "effective_batch_size": 4, "logging_steps": 1, "save_steps": 2, "report_to": [],
    "objective": "dpo", "use_ema": True, "random_flip": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_sdxl(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_a_unet_that_is_no_number_after_its_last_step_is_not_published(
    tmp_path: Path, model: Artifact, cache: Path
) -> None:
    pairs = make_pairs(tmp_path / "pairs", val=0)
    keys = {**KEYS, "lora": None, "use_ema": False, "max_steps": 1, "learning_rate": 1e38, "cache_dir": str(cache)}
    with pytest.raises(DivergedError, match="a trained weight is not a number"):
        run_stage("sdxl_dpo", tmp_path, keys, model=model, pairs=pairs)
    assert not (tmp_path / "out" / "unet").exists()


def test_latents_that_are_no_numbers(tmp_path: Path, pairs: Artifact) -> None:

    broken = make_sdxl(tmp_path / "model").path
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"] = weights["encoder.conv_in.bias"] * math.nan
    save_file(weights, file, {"format": "pt"})
    keys = {**KEYS, "model_name_or_path": str(broken), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(InputError, match="latents are not numbers") as raised:
        run_stage("sdxl_dpo", tmp_path / "run", keys, pairs=pairs)
    assert "images/p" in str(raised.value)


def test_pairs_it_refuses(tmp_path: Path, model: Artifact) -> None:
    keys = {**KEYS, "cache_dir": str(tmp_path / "cache")}
    cut = make_pairs(tmp_path / "cut", train=2, val=0)
    image = cut.path / "images" / "p1" / "good.png"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(InputError, match=r"missing image|not an image|damaged image"):
        run_stage("sdxl_dpo", tmp_path / "a", keys, model=model, pairs=cut)
    gone = make_pairs(tmp_path / "gone", train=2, val=0)
    (gone.path / "images" / "p0" / "bad.png").unlink()
    with pytest.raises(InputError, match=r"pairs.jsonl:1"):
        run_stage("sdxl_dpo", tmp_path / "b", keys, model=model, pairs=publish_as(gone.path, "image_pairs"))
    none = make_pairs(tmp_path / "none", train=0, val=2)
    with pytest.raises(InputError, match="no pairs to train on"):
        run_stage("sdxl_dpo", tmp_path / "c", keys, model=model, pairs=none)


def test_configurations_it_refuses(tmp_path: Path, model: Artifact, pairs: Artifact) -> None:
    for values, message in (
        ({"max_length": 10}, "a key of text models"),
        ({"reward_temperature": 2.0}, "only objective dspo_rm"),
        ({"bucket_step": 64}, "per_device_train_batch_size: 1"),
        ({"bucket_step": 40}, "must divide resolution"),
        ({"mapo_snr": 0.5}, "only objective mapo"),
        ({"attn_implementation": "flash"}, "sdpa, xformers, sliced"),
        ({"fsdp": True, "lora": None}, "shard it with deepspeed"),
        ({"deepspeed": "configs/deepspeed/zero3.json"}, "deepspeed shards a whole UNet"),
        ({"deepspeed": "configs/deepspeed/zero3.json", "lora": None, "use_ema": True}, "no rank holds the whole model"),
        ({"lora": None, "save_merged": True}, "always saved as a pipeline"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(SdxlDpoConfig, {"per_device_train_batch_size": 2, **values})
    keys = {**KEYS, "cache_dir": str(tmp_path / "cache")}
    for more, message in (
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"save_dtype": "bf16"}, "saved in fp32"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_stage("sdxl_dpo", tmp_path / "run", {**keys, **more}, model=model, pairs=pairs)
    with pytest.raises(InputError, match="no diffusers pipeline here"):
        run_stage("sdxl_dpo", tmp_path / "run", {**keys, "model_name_or_path": str(tmp_path)}, pairs=pairs)
