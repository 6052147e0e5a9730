"""sdxl_dpo: its start, its caches, what it leaves, resuming, samples, and other objectives."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from image_pair_artifacts import make_pairs, make_sdxl
from mdlm_artifacts import run_stage
from safetensors.torch import load_file, save_file
from training_artifacts import content, executed_steps, kill_after

from prefmill.core.artifact import Artifact
from prefmill.core.config import identity, load, validate
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.sdxl_dpo import STAGE, SdxlDpoConfig
from tests.conftest import REPOSITORY

KEYS: dict[str, Any] = {
    "objective": "dpo", "resolution": 32, "precision": "fp32", "lora": {"r": 4}, "learning_rate": 1e-3,
    "num_train_epochs": 2, "per_device_train_batch_size": 2, "effective_batch_size": 4, "logging_steps": 1,
    "save_steps": 2, "report_to": [], "use_ema": True, "random_flip": True,
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Artifact, pairs: Artifact, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    keys = {"save_merged": True, "sample_steps": 3, "num_samples": 2, "sample_inference_steps": 2}
    keys |= {"report_to": ["tensorboard"]}  # the default
    run_stage("sdxl_dpo", folder, {**KEYS, **keys, "cache_dir": str(cache)}, model=model, pairs=pairs)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


def test_the_shipped_dspo_is_the_issues() -> None:
    config = load(SdxlDpoConfig, REPOSITORY / "configs" / "sdxl_dpo" / "dspo.yaml")
    assert (config.objective, config.max_steps, config.effective_batch_size) == ("dspo", 2000, 8)
    assert (config.logging_steps, config.resolution, config.model_name_or_path) == (
        500, 1024, "stabilityai/stable-diffusion-xl-base-1.0",
    )  # fmt: skip
    assert config.lora is not None
    assert (config.lora.use_dora, config.lora.alpha) == (True, 4.0 * config.lora.r)
    assert STAGE.reads["pairs"].stage == "build_image_pairs"


def test_mapo_has_its_authors_numbers_and_they_count() -> None:
    config = validate(SdxlDpoConfig, {"objective": "mapo"})
    assert (config.beta, config.mapo_snr) == (0.1, 0.5)
    assert identity(config)["mapo_snr"] == 0.5  # so that what the earlier loss made is stale
    assert "mapo_snr" not in identity(validate(SdxlDpoConfig, {}))
    assert validate(SdxlDpoConfig, {"objective": "mapo", "beta": 0.2, "mapo_snr": 1.0}).beta == 0.2


@pytest.mark.slow
def test_it_starts_at_the_reference_and_leaves_what_it_says(undisturbed: Path) -> None:
    from PIL import Image

    first = rows_of(undisturbed)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["margin"], first["accuracy"], first["winner_error_change"]) == (0.0, 0.5, 0.0)
    files = set(content(undisturbed))
    assert {"pytorch_lora_weights.safetensors", "comfyui.safetensors", "lycoris.safetensors", "README.md"} <= files
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files
    assert {"merged/model_index.json", "merged/unet/config.json", "merged/vae/config.json"} <= files
    assert not any(b"/tmp" in data for name, data in content(undisturbed).items() if name.endswith((".json", ".md")))
    grids = sorted((undisturbed / "logs" / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step_00003.png", "step_00006.png"]
    assert Image.open(grids[0]).size == (64, 32)


@pytest.mark.slow
def test_its_curves_and_samples_are_in_tensorboard(undisturbed: Path) -> None:
    """A training with the default trackers ended before its first step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "logs" / "tensorboard"))
    events.Reload()
    shown = [(point.step, pytest.approx(point.value, abs=1e-4)) for point in events.Scalars("train/loss")]
    assert [(row["step"], row["loss"]) for row in rows_of(undisturbed)] == shown
    assert [image.step for image in events.Images("samples")] == [3, 6]


@pytest.mark.slow
def test_the_merged_pipeline_loads_and_draws(undisturbed: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(undisturbed / "out" / "merged", add_watermarker=False)
    pipeline.load_lora_weights(undisturbed / "out", weight_name="pytorch_lora_weights.safetensors")
    image = pipeline("a red square", height=32, width=32, num_inference_steps=1, output_type="pil").images[0]
    assert image.size == (32, 32)


@pytest.mark.slow
def test_cached_references_are_those_computed_anew(
    undisturbed: Path, model: Artifact, pairs: Artifact, cache: Path
) -> None:
    """Every reference error of every step: anew, one pair at a time, from the checkpoint, the image and the prompt."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from prefmill.families.sdxl.data import read_image_pairs
    from prefmill.families.sdxl.encoding import encode_pixels, encode_prompt, load_encoders, load_pixels
    from prefmill.families.sdxl.family import SdxlBatch, errors, predict
    from prefmill.families.sdxl.loading import SdxlFolder
    from prefmill.families.sdxl.noise import draw, load_schedule

    folder, device = SdxlFolder(model.path), torch.device("cpu")
    schedule, encoder = load_schedule(model.path, None), load_encoders(folder, "fp32")
    vae, unet = folder.load(AutoencoderKL, "vae", "fp32"), folder.load(UNet2DConditionModel, "unet", "fp32")
    by_id = {pair.pair_id: pair for pair in read_image_pairs(pairs, "train")}
    rows = list(read_jsonl(undisturbed / "logs" / "margins" / "margins_log.jsonl"))
    assert len(rows) == 24
    flips = set()
    for row in rows:
        pair, epoch = by_id[row["pair_id"]], row["epoch"]
        flip = bool(draw(43, pair.pair_id, epoch, (1,), 2).timestep)
        flips.add(flip)
        read = [load_pixels(path, (32, 32), flip) for path in pair.images]
        noise = draw(42, pair.pair_id, epoch, (4, 16, 16), 1000)
        text, pooled = encode_prompt(encoder, [pair.prompt] * 2, device)
        batch = SdxlBatch(
            encode_pixels(vae, torch.stack([pixels for pixels, _ in read])), torch.stack([noise.noise] * 2),
            torch.tensor([noise.timestep] * 2), text, pooled, torch.stack([ids for _, ids in read]), torch.ones(1),
        )  # fmt: skip
        with torch.no_grad():
            found = errors(*predict(unet, batch, schedule))
        logged = (-row["ref_chosen_logps"], -row["ref_rejected_logps"])
        assert found.tolist() == pytest.approx(logged, abs=1e-5)
    assert flips == {True, False}


@pytest.mark.slow
def test_a_second_trial_computes_no_reference(
    tmp_path: Path, undisturbed: Path, model: Artifact, pairs: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rate and rank, the same cache; and no VAE or text encoder is loaded."""
    monkeypatch.setattr(
        "prefmill.families.sdxl.reference.ReferenceErrors._values", lambda *_: pytest.fail("computed again")
    )
    monkeypatch.setattr("prefmill.families.sdxl.encoding.load_encoders", lambda *_: pytest.fail("encoded again"))
    keys = {**KEYS, "learning_rate": 3e-3, "lora": {"r": 2, "use_dora": False}, "cache_dir": str(cache)}
    run_stage("sdxl_dpo", tmp_path, keys, model=model, pairs=pairs)
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_checkpointing_and_accumulation_change_no_loss(
    tmp_path: Path, undisturbed: Path, model: Artifact, pairs: Artifact
) -> None:
    keys = {
        **KEYS,
        "activation_checkpointing": True,
        "per_device_train_batch_size": 4,
        "cache_dir": str(tmp_path / "c"),
    }
    run_stage("sdxl_dpo", tmp_path, keys, model=model, pairs=pairs)
    expected = [row["loss"] for row in rows_of(undisturbed)]
    assert [row["loss"] for row in rows_of(tmp_path)] == pytest.approx(expected, abs=2e-3)
    norms = [rows_of(folder)[0]["grad_norm"] for folder in (tmp_path, undisturbed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.slow
def test_a_cache_of_another_reference_is_computed_again(tmp_path: Path, model: Artifact, pairs: Artifact) -> None:
    from safetensors.torch import save_file

    keys = {**KEYS, "max_steps": 1, "cache_dir": str(tmp_path / "c")}
    run_stage("sdxl_dpo", tmp_path / "a", keys, model=model, pairs=pairs)
    for path in (tmp_path / "c").rglob("*-reference.safetensors"):
        save_file({name: value * 1.1 for name, value in load_file(path).items()}, path)
    run_stage("sdxl_dpo", tmp_path / "b", keys, model=model, pairs=pairs)
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")


@pytest.mark.slow
def test_half_of_the_prompts_are_left_to_the_judge(
    tmp_path: Path, model: Artifact, pairs: Artifact, cache: Path
) -> None:
    from prefmill.families.reward.data import in_half

    keys = {**KEYS, "prompt_half": "policy", "num_train_epochs": 1, "cache_dir": str(cache)}
    run_stage("sdxl_dpo", tmp_path, keys, model=model, pairs=pairs)
    seen = {row["pair_id"] for row in read_jsonl(tmp_path / "logs" / "margins" / "margins_log.jsonl")}
    assert seen == {f"pair{number}" for number in range(12) if in_half(f"p{number}", "policy")}
    assert 0 < len(seen) < 12


@pytest.mark.timing
@pytest.mark.slow
def test_killed_and_rerun_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, model: Artifact, pairs: Artifact, cache: Path
) -> None:
    """Adapter, average and samples included."""
    keys = {"save_merged": True, "sample_steps": 3, "num_samples": 2, "sample_inference_steps": 2}
    given = {**KEYS, **keys, "cache_dir": str(cache)}
    kill_after(3, tmp_path, lambda: run_stage("sdxl_dpo", tmp_path, given, model=model, pairs=pairs))
    run_stage("sdxl_dpo", tmp_path, given, model=model, pairs=pairs)
    assert content(tmp_path) == content(undisturbed)
    assert [row["loss"] for row in rows_of(tmp_path)] == [row["loss"] for row in rows_of(undisturbed)]
    assert sorted(set(executed_steps(tmp_path))) == list(range(1, 7))


@pytest.mark.slow
def test_wide_pairs_are_trained_whole_without_some_captions(tmp_path: Path, model: Artifact) -> None:
    """The start is the reference still: it has seen the same buckets, offsets and dropped captions."""
    keys = {**KEYS, "bucket_step": 8, "caption_dropout": 0.5, "noise_offset": 0.1, "per_device_train_batch_size": 1}
    keys |= {"max_steps": 2, "use_ema": False, "cache_dir": str(tmp_path / "c")}
    pairs = make_pairs(tmp_path / "pairs", train=4, val=2, sizes=((64, 32),))
    told = run_stage("sdxl_dpo", tmp_path, keys, model=model, pairs=pairs)
    assert (told["num_cut_images"], told["num_cut_prompts"]) == (12, 0)  # by a twelfth: the nearest is 40 x 24
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    speeds = list(read_jsonl(tmp_path / "logs" / "speed" / "rank0.jsonl"))
    assert all(row["images_per_second"] > 0 for row in speeds)


@pytest.mark.slow
def test_the_average_is_what_is_saved(undisturbed: Path) -> None:
    last = undisturbed / "out" / "checkpoint-6"
    average, weights = load_file(last / "ema.safetensors"), load_file(last / "adapter_model.safetensors")
    saved = load_file(undisturbed / "out" / "pytorch_lora_weights.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("lora_B.weight"))
    key = f"unet.{name.removeprefix('base_model.model.')}"
    assert torch.equal(saved[key], average[name.replace("lora_B", "lora_B.default")])
    assert not torch.equal(saved[key], weights[name])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dspo", "dspo_official_sdxl", "mapo"])
def test_the_whole_unet_and_the_other_objectives(
    objective: str, tmp_path: Path, model: Artifact, pairs: Artifact, cache: Path
) -> None:
    keys = {**KEYS, "objective": objective, "lora": None, "max_steps": 2, "use_ema": False, "min_snr_gamma": 5.0}
    keys |= {"cache_dir": str(cache), "activation_checkpointing": True}
    keys |= {"sample_steps": 2, "num_samples": 1, "sample_inference_steps": 1}
    run_stage("sdxl_dpo", tmp_path, {**keys, "precision": "bf16"}, model=model, pairs=pairs)
    first = rows_of(tmp_path)[0]
    if objective == "dspo_official_sdxl":
        assert first["loss"] == 0.25  # (1 - s(0))^2
    if objective == "dspo":
        assert (first["margin"], first["sft_cosine"]) == (0.0, pytest.approx(1.0))
    assert (tmp_path / "logs" / "samples" / "step_00002.png").is_file()
    unet = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(model.path / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(unet) == set(before)
    assert {value.dtype for value in unet.values()} == {torch.float32}  # as the base's files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "asked", "expected"), [(1e-8, "auto", "F32"), (1e-2, "auto", "BF16"), (1e-8, "bf16", "BF16")]
)
def test_the_whole_unet_is_saved_in_its_bases_precision_unless_that_loses_the_training(
    rate: float, asked: str, expected: str, tmp_path: Path, model: Artifact, pairs: Artifact, cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What was trained is in the Trainer's own checkpoint, in fp32."""
    base = shutil.copytree(model.path, tmp_path / "base")
    (file,) = (base / "unet").glob("*.safetensors")
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    keys = {**KEYS, "model_name_or_path": str(base), "cache_dir": str(cache), "lora": None, "use_ema": False}
    keys |= {"learning_rate": rate, "save_dtype": asked, "precision": "bf16"}
    run_stage("sdxl_dpo", tmp_path, keys, pairs=pairs)
    saved = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    trained = load_file(max((tmp_path / "out").glob("checkpoint-*")) / "model.safetensors")
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[expected]
    assert all(torch.equal(value, trained[name].to(dtype)) for name, value in saved.items())
    assert {value.dtype for value in saved.values()} == {dtype}
    assert ("rounding to bf16 loses" in caplog.text) == (rate == 1e-8)
