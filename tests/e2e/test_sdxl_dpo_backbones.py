"""sdxl_dpo and generate_images on SD 1.5, SD 3 and FLUX.1: start, files, samples, drawings, and what does not fit."""

from __future__ import annotations

import inspect
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from image_pair_artifacts import make_pairs
from mdlm_artifacts import run_stage
from safetensors.torch import load_file
from training_artifacts import content, executed_steps, kill_after, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.errors import ConfigError
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl.backbone import denoiser
from prefmill.families.sdxl.generator import GeneratorSource, open_pipeline
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve

KEYS: dict[str, Any] = {
    "resolution": 32, "precision": "fp32", "lora": {"r": 4}, "learning_rate": 1e-2, "max_steps": 2,
    "per_device_train_batch_size": 2, "effective_batch_size": 4, "logging_steps": 1, "save_steps": 1, "report_to": [],
    "sample_steps": 2, "num_samples": 1, "sample_inference_steps": 2,
}  # fmt: skip
OBJECTIVE = {"sd15": "dpo", "sd3": "flow_dpo", "flux_dev": "flow_dpo", "flux_schnell": "flow_dpo"}
PART = {"sd15": "unet", "sd3": "transformer", "flux_dev": "transformer", "flux_schnell": "transformer"}
SIZE = {"height": 32, "width": 32}  # FLUX's own is 256 even with a tiny VAE


@pytest.fixture(scope="module", params=OBJECTIVE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return publish_as(build(request.param, tmp_path_factory.mktemp("model") / request.param), "checkpoint")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_pairs(tmp_path_factory.mktemp("pairs"), train=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, model: Artifact, pairs: Artifact, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    keys = {"objective": OBJECTIVE[model.path.name], "save_merged": True, "cache_dir": str(cache)}
    run_stage("sdxl_dpo", folder, {**KEYS, **keys}, model=model, pairs=pairs)
    return folder


@pytest.mark.slow
def test_it_starts_at_the_reference_and_learns(tuned: Path, model: Artifact) -> None:
    first, second = (row for row in read_curve(tuned / "logs" / STEPS) if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["margin"], first["accuracy"]) == (0.0, 0.5)
    assert first["grad_norm"] > 0
    assert second["loss"] != first["loss"]
    assert (tuned / "logs" / "samples" / "step_00002.png").is_file()
    kohya = {path.name for path in (tuned / "out").glob("*.safetensors")} - {"pytorch_lora_weights.safetensors"}
    assert kohya == {"comfyui.safetensors"} | ({"lycoris.safetensors"} if model.path.name == "sd15" else set())


@pytest.mark.timing
@pytest.mark.slow
def test_killed_and_rerun_it_ends_with_the_same_bytes(
    tuned: Path, model: Artifact, pairs: Artifact, cache: Path, tmp_path: Path
) -> None:
    if model.path.name != "flux_dev":
        return  # test_sdxl_dpo does so with SDXL: what resumes knows no backbone
    keys = {"objective": OBJECTIVE[model.path.name], "save_merged": True, "cache_dir": str(cache)}
    run = partial(run_stage, "sdxl_dpo", tmp_path, {**KEYS, **keys}, model=model, pairs=pairs)
    kill_after(1, tmp_path, run)
    run()
    assert content(tmp_path) == content(tuned)
    assert sorted(set(executed_steps(tmp_path))) == [1, 2]


@pytest.mark.slow
def test_adapter_and_merged_pipeline_are_one_model_in_diffusers(tuned: Path, model: Artifact) -> None:
    """And not the base: the adapter was read, magnitudes and alpha included."""
    source = GeneratorSource(str(model.path), "tiny", "fp32")
    drawn = []
    for given in (
        source,
        GeneratorSource(str(model.path), "tiny", "fp32", adapter=tuned / "out"),
        GeneratorSource(str(tuned / "out" / "merged"), "tiny", "fp32"),
    ):
        pipeline = open_pipeline(given)
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 2, "output_type": "latent", **SIZE}
        drawn.append(pipeline("a red square", generator=generator, **given).images)
    torch.testing.assert_close(drawn[1], drawn[2], atol=1e-4, rtol=1e-4)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_images_are_drawn_from_it(tuned: Path, model: Artifact, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text(f"prompt\na red square\n{'very ' * 400}long\n")
    keys = {"prompts": str(tmp_path / "prompts.csv"), "num_inference_steps": 2, "precision": "fp32", **SIZE}
    adapter = publish_as(tuned / "out", "image_checkpoint")
    told = run_stage("generate_images", tmp_path, {**keys, "seeds": [0]}, model=model, tuned=adapter)
    assert (told["num_images"], told["num_cut_prompts"]) == (2, 1)
    assert [(row["width"], row["height"]) for row in read_jsonl(tmp_path / "out" / "images.jsonl")] == [(32, 32)] * 2


@pytest.mark.slow
def test_it_is_evaluated_by_its_own_guidance(tuned: Path, model: Artifact, pairs: Artifact, tmp_path: Path) -> None:
    adapter, clip = publish_as(tuned / "out", "image_checkpoint"), build("clip", tmp_path / "clip")
    keys = {"published_scorer": str(clip), "num_inference_steps": 2, "precision": "fp32", "seeds": [0], **SIZE}
    keys |= {"num_resamples": 1000, "drift_draws": 1, "resolution": 32}
    run_stage("evaluate_images", tmp_path, keys, model=model, tuned=adapter, pairs=pairs)
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    theirs = {"sd15": 7.5, "sd3": 7.0, "flux_dev": 3.5, "flux_schnell": 0.0}
    assert measured["guidance_scale"] == theirs[model.path.name]
    assert measured["num_images"] == 4
    assert measured["drift"]["winner"]["value"] != 0
    sides = [sorted((tmp_path / "out" / side).rglob("*.png")) for side in ("base", "tuned")]
    assert all(base.read_bytes() != own.read_bytes() for base, own in zip(*sides, strict=True))


@pytest.mark.parametrize(
    ("size", "guidance"), [(SIZE, {"guidance_scale": 2.0}), ({"height": 32, "width": 48}, {}), (SIZE, {})]
)
def test_an_image_is_diffusers_own(
    model: Artifact, tmp_path: Path, size: dict[str, int], guidance: dict[str, float]
) -> None:
    """Of the plain pipeline with the same seed and settings, decoded by itself, to a level of 255."""
    import numpy as np
    from diffusers import DiffusionPipeline
    from PIL import Image

    (tmp_path / "prompts.csv").write_text("prompt\na red square\n")
    asked = {"num_inference_steps": 3, **guidance, **size}
    keys = {"prompts": str(tmp_path / "prompts.csv"), "seeds": [7], "precision": "fp32", **asked}
    run_stage("generate_images", tmp_path, keys, model=model)
    (file,) = (tmp_path / "out" / "images").rglob("*.png")
    drawn = Image.open(file)
    pipeline = DiffusionPipeline.from_pretrained(model.path)
    card = {"max_sequence_length": 256} if model.path.name == "flux_schnell" else {}  # as its authors draw
    theirs = pipeline("a red square", generator=torch.Generator().manual_seed(7), **asked, **card).images[0]
    difference = np.asarray(drawn).astype(int) - np.asarray(theirs).astype(int)
    assert np.abs(difference).max() <= 1
    assert np.asarray(theirs).std() > 1
    said = json.loads((tmp_path / "out" / "summary.json").read_text())["guidance_scale"]
    own = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
    assert said == (0 if model.path.name == "flux_schnell" else guidance.get("guidance_scale", own))


def test_flux_refuses_what_it_cannot_draw(model: Artifact, tmp_path: Path) -> None:
    """A negative prompt would have no effect, and diffusers would round a size down with a warning."""
    (tmp_path / "prompts.csv").write_text("prompt\na red square\n")
    keys = {"prompts": str(tmp_path / "prompts.csv"), "num_inference_steps": 1, "precision": "fp32", **SIZE}
    if model.path.name.startswith("flux"):
        with pytest.raises(ConfigError, match=r"leads away from no prompt[\s\S]*leave out negative_prompt"):
            run_stage("generate_images", tmp_path, {**keys, "negative_prompt": "dull"}, model=model)


@pytest.mark.slow
def test_the_whole_model_is_a_pipeline_again(model: Artifact, pairs: Artifact, cache: Path, tmp_path: Path) -> None:
    name = model.path.name
    keys = {"objective": OBJECTIVE[name], "lora": None, "activation_checkpointing": True, "cache_dir": str(cache)}
    run_stage("sdxl_dpo", tmp_path, {**KEYS, **keys}, model=model, pairs=pairs)
    first = next(row for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    file = Path(PART[name]) / "diffusion_pytorch_model.safetensors"
    after, before = load_file(tmp_path / "out" / file), load_file(model.path / file)
    assert set(after) == set(before)
    assert any(not torch.equal(after[key], before[key]) for key in after)
    loaded = denoiser(open_pipeline(GeneratorSource(str(tmp_path / "out"), "tiny", "fp32"))).state_dict()
    assert all(torch.equal(loaded[key], after[key]) for key in after)


def test_objectives_that_do_not_fit_are_refused_in_words(model: Artifact, pairs: Artifact, tmp_path: Path) -> None:
    flow = OBJECTIVE[model.path.name] == "flow_dpo"
    for objective in ("mapo", "dspo", "dspo_official_sdxl", "dpo") if flow else ("flow_dpo",):
        with pytest.raises(ConfigError, match=f"'{objective}' does not fit this model family") as refused:
            run_stage("sdxl_dpo", tmp_path, {**KEYS, "objective": objective}, model=model, pairs=pairs)
        assert f"it needs {'noise' if flow else 'velocity'}_errors" in str(refused.value)
        assert "flow_dpo" in str(refused.value)


def test_pictures_that_do_not_divide_into_patches_are_refused(model: Artifact, pairs: Artifact, tmp_path: Path) -> None:
    """16 pixels for SD 3 and FLUX, whose patches are two latents wide."""
    if PART[model.path.name] == "transformer":
        with pytest.raises(ConfigError, match=r"does not divide into patches[\s\S]*a multiple of 16"):
            run_stage(
                "sdxl_dpo", tmp_path, {**KEYS, "objective": "flow_dpo", "resolution": 40}, model=model, pairs=pairs
            )
