"""The memory of image trainings: parameters against diffusers' own models, activations against torch's allocator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefmill.families.sdxl.backbone import BACKBONES
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.slurm.image_memory import CLIP_L_14, SDXL_UNET, count_reward, count_unet, image_memory
from stages.train_reward import TrainRewardConfig
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CLIP = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
SMALL = {**SDXL_UNET, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
         "transformer_layers_per_block": (1, 2), "cross_attention_dim": 64}  # fmt: skip

FLUX = {"in_channels": 64, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 64, "pooled_projection_dim": 48, "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6)}  # fmt: skip


def unet(**keys: Any) -> SdxlPreferenceConfig:
    return SdxlPreferenceConfig.model_validate({"objective": "dpo", **keys})


def small(folder: Path, pipeline: str = "StableDiffusionXLPipeline", part: str = "unet", **keys: Any) -> str:
    kind = {"unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel"}[part]
    kind = "FluxTransformer2DModel" if pipeline == "FluxPipeline" else kind
    (folder / part).mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, part: ["diffusers", kind]}))
    (folder / part / "config.json").write_text(json.dumps({"_class_name": kind, **(keys or SMALL)}))
    return str(folder)


def test_other_backbones_are_counted_with_their_own_conditions(tmp_path: Path) -> None:
    import torch
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    plain = {**SMALL, "addition_embed_type": None, "projection_class_embeddings_input_dim": None}
    flow = {"sample_size": 32, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 64,
            "pooled_projection_dim": 48, "pos_embed_max_size": 32}  # fmt: skip
    for pipeline, part, made, keys, disk in (
        ("StableDiffusionPipeline", "unet", UNet2DConditionModel, plain, "(77 x 64 + 0 of 2)"),
        ("StableDiffusion3Pipeline", "transformer", SD3Transformer2DModel, flow, "(333 x 64 + 48 of 2)"),
        (
            "FluxPipeline",
            "transformer",
            FluxTransformer2DModel,
            FLUX,
            "(16 x 32 x 32 numbers of 4 bytes), 0.07 MB a prompt (512 x 64 + 48 of 2)",
        ),
    ):
        (tmp_path / pipeline).mkdir()
        name = small(tmp_path / pipeline, pipeline, part, **keys)
        objective = "flow_dpo" if part == "transformer" else "dpo"
        counted = count_unet(name, unet(objective=objective, resolution=256, lora=None))
        with torch.device("meta"):
            model = made.from_config(keys)
        assert counted.numbers.parameters == sum(weight.numel() for weight in model.parameters())
        assert counted.kept_bytes > 0
        assert disk in counted.on_disk


def test_a_width_of_text_for_each_block_is_counted_as_one_for_all(tmp_path: Path) -> None:
    """diffusers takes both, and trained both; the estimate was a TypeError."""
    names = [tmp_path / "one", tmp_path / "each"]
    for folder, width in zip(names, (64, [64, 64]), strict=True):
        folder.mkdir()
        small(folder, **{**SMALL, "cross_attention_dim": width})
    one, each = (count_unet(str(folder), unet(resolution=64)) for folder in names)
    assert one == each


def test_sdxl_and_its_adapter_have_the_numbers_that_diffusers_gives_them() -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(SDXL_UNET)
    assert sum(weight.numel() for weight in model.parameters()) == 2_567_463_684  # as published
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [layer for name, layer in model.named_modules() if name.endswith(targets)]
    whole, adapted = (count_unet(SDXL, unet(lora=lora)).numbers for lora in (None, {"r": 16}))
    assert whole.parameters == whole.trained == 2_567_463_684
    # A [16, in], B [out, 16], and DoRA's magnitude [out].
    assert adapted.trained == sum(
        16 * (layer.in_features + layer.out_features) + layer.out_features for layer in layers
    )
    assert adapted.parameters == whole.parameters + adapted.trained


def test_clip_has_the_numbers_that_transformers_gives_it() -> None:
    import torch
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**CLIP_L_14))
    assert clip.num_parameters() == 427_616_513  # as published
    counted = {part: count_reward(CLIP, TrainRewardConfig(trainable=part)) for part in ("all", "vision", "heads")}
    heads = counted["heads"].numbers.trained
    assert counted["all"].numbers.parameters == 427_616_513 + heads
    assert counted["all"].numbers.trained == 427_616_512 + heads  # CLIP's logit scale is frozen
    assert counted["heads"].kept_bytes < counted["vision"].kept_bytes < counted["all"].kept_bytes


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "dora"])
@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", "FluxPipeline"])
def test_activations_are_what_the_allocator_still_holds(
    tmp_path: Path, pipeline: str, lora: dict[str, int] | None
) -> None:
    import torch
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel
    from torch.profiler import ProfilerActivity, profile

    from prefmill.families.sdxl.loading import add_adapter

    flux = pipeline == "FluxPipeline"
    config = unet(precision="fp32", resolution=256, lora=lora, **({"objective": "flow_dpo"} if flux else {}))
    make, keys, part = (FluxTransformer2DModel, FLUX, "transformer") if flux else (UNet2DConditionModel, SMALL, "unet")
    model, call = add_adapter(make.from_config(keys).train(), config), BACKBONES[pipeline].calling(keys)
    words, pooled = ((2, 512, 64), (2, 48)) if flux else ((2, 77, 64), (2, 2816 - 6 * 256))
    shapes = (2, 16 if flux else 4, 32, 32), (2,), words, pooled, (2, 6)
    given = [torch.randn(shape) for shape in shapes]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = call(model, *given)
    held = sum(event.self_cpu_memory_usage for event in seen.key_averages()) - out.untyped_storage().nbytes()
    assert count_unet(small(tmp_path, pipeline, part, **keys), config).kept_bytes == pytest.approx(held, rel=0.03)


def test_memory_follows_objective_resolution_checkpointing_and_optimizer(tmp_path: Path) -> None:
    name = small(tmp_path)

    def kept(**keys: Any) -> float:
        return count_unet(name, unet(**keys)).kept_bytes

    assert kept(objective="dspo") == pytest.approx(kept() / 2, rel=0.01)  # the losers run without a gradient
    assert kept(resolution=512) == pytest.approx(kept() / 4, rel=0.05)
    assert kept(activation_checkpointing=True) < kept() / 2
    config = unet(lora=None, optim="adamw_bnb_8bit", use_ema=True)
    counted = count_unet(name, config)
    memory, trained = image_memory(counted, config, 1), counted.numbers.trained / 2**30
    parts = (memory.optimizer, memory.average, memory.gradients)
    assert parts == pytest.approx((2 * trained, 4 * trained, 4 * trained))


def test_estimate_tells_what_fits_which_card() -> None:
    command = [sys.executable, "-m", "prefmill.cli.main", "estimate", "configs/pipelines/sdxl.yaml"]
    cluster = ["--cluster", "configs/clusters/h100.yaml", "--gpu-memory", "80"]
    run = subprocess.run([*command, *cluster], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"{SDXL} (2.59B), 8 GPUs" in run.stdout
    assert f"{CLIP} (0.43B), 8 GPUs" in run.stdout
    assert "a microbatch of 1 at 1024 x 1024 pixels" in run.stdout
    assert "0.26 MB an image (4 x 128 x 128 numbers of 4 bytes)" in run.stdout
    assert run.stdout.count("24 GB: fits; 80 GB: fits") == 2
