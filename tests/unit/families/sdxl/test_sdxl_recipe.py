"""The recipe's parts: dropped captions, buckets, noise offset, schedules, samples and pictures in trackers."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from prefmill.core.errors import ConfigError
from prefmill.core.graceful_stop import Stopped
from prefmill.core.image_rows import ImagePrompt
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl.callbacks import SampleGrid, log_picture
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.data import PairImages
from prefmill.families.sdxl.encoding import (
    ImageKeys,
    TextKeys,
    bucket,
    encode_images,
    encode_texts,
    load_pixels,
    tell_cut,
    tell_mirrored,
    text_keys,
)
from prefmill.families.sdxl.family import PairReader
from prefmill.families.sdxl.generator import GeneratorSource, open_pipeline
from prefmill.families.sdxl.loading import SdxlFolder
from prefmill.families.sdxl.noise import draw, load_schedule
from prefmill.families.sdxl.reference import ReferenceErrors
from prefmill.images.generation import make_images, plan_jobs
from prefmill.images.sampling import ImageSampling
from prefmill.store.pictures import cut_share
from prefmill.store.tensor_cache import TensorCache
from prefmill.training.trainer import work_of

CPU = torch.device("cpu")
# Published with SDXL (Podell et al. 2023, appendix I), those that users train at most.
SDXL_SIZES = ((1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344), (1536, 640),
              (640, 1536))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> SdxlFolder:
    """A tiny SDXL whose latents have a mean and a spread, as some VAEs' have."""
    path = tmp_path_factory.mktemp("model")
    build("sdxl", path)
    settings = path / "vae" / "config.json"
    said = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [0.7, 1.3, 0.9, 1.1]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **said}))
    return SdxlFolder(path)


@pytest.fixture
def pair(tmp_path: Path) -> PairImages:
    files = (tmp_path / "w.png", tmp_path / "l.png")
    for seed, file in enumerate(files):
        noise = np.random.default_rng(seed).integers(0, 255, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    return PairImages("a", "p", "a red square", files, ("w", "l"))


def reader_of(folder: SdxlFolder, tmp_path: Path, pair: PairImages, bucket_step: int | None = None) -> PairReader:
    """A reader whose cache holds all that the pair may ask for."""
    images, texts = ImageKeys("vae", 32, "fp32", bucket_step), TextKeys("text", "fp32", zeros=True)
    reader = PairReader(TensorCache(tmp_path / "cache"), images, texts, load_schedule(folder.path, None), seed=0)
    files = [(path, sha, False, reader.size(pair)) for path, sha in zip(pair.images, pair.digests, strict=True)]
    encode_images(files, folder, images, reader.cache, 4, CPU)
    encode_texts([None, pair.prompt], folder, texts, reader.cache, CPU)
    return reader


def test_encoding_tells_how_far_it_is_and_goes_on_after_a_stop(
    folder: SdxlFolder, tmp_path: Path, pair: PairImages
) -> None:
    """`status` showed nothing of hours, and a stop that was asked for waited for the last picture."""
    images, texts = ImageKeys("vae", 32, "fp32"), TextKeys("text", "fp32", zeros=True)
    reader = PairReader(TensorCache(tmp_path / "cache"), images, texts, load_schedule(folder.path, None), seed=0)
    heard: list[str] = []

    def stop_after_one(done: int, total: int | None, unit: str) -> None:
        heard.append(f"{done}/{total} {unit}")
        if done == 1 and total != 1:
            raise Stopped

    for _ in range(3):
        with contextlib.suppress(Stopped):
            reader.encode(folder, [(pair, 0)], 1, CPU, stop_after_one)
    pictures, prompts = ["0/2 images encoded", "1/2 images encoded"], ["0/2 prompts encoded", "1/2 prompts encoded"]
    left = ["0/1 images encoded", "1/1 images encoded", "0/1 prompts encoded", "1/1 prompts encoded"]
    assert heard == [*pictures, *left[:2], *prompts, *left[2:]]


def test_captions_are_dropped_in_their_share_and_the_same_ones_each_time(
    folder: SdxlFolder, tmp_path: Path, pair: PairImages
) -> None:
    reader = replace(reader_of(folder, tmp_path, pair), caption_dropout=0.2)
    dropped = [epoch for epoch in range(2000) if reader.prompt(pair, epoch) is None]
    assert len(dropped) / 2000 == pytest.approx(0.2, abs=0.03)
    assert dropped == [epoch for epoch in range(2000) if reader.prompt(pair, epoch) is None]
    kept = next(epoch for epoch in range(2000) if epoch not in dropped)
    batch = reader.batch([pair, pair], [dropped[0], kept])
    assert (batch.embeddings[0] == 0).all()  # what SDXL's guidance leads away from
    assert (batch.pooled[2] == 0).all()
    assert (batch.embeddings[1] != 0).any()
    assert torch.equal(batch.embeddings[1], batch.embeddings[3])
    assert all(replace(reader, caption_dropout=0.0).prompt(pair, epoch) for epoch in range(100))


@pytest.mark.parametrize("zeros", [True, False, None])
def test_no_prompt_is_what_the_pipelines_own_guidance_leads_away_from(
    folder: SdxlFolder, tmp_path: Path, zeros: bool | None
) -> None:
    """Against diffusers; two pipelines with the same encoders took each other's from the cache."""
    other = Path(shutil.copytree(folder.path, tmp_path / "other"))
    index = {**json.loads((other / "model_index.json").read_text()), "force_zeros_for_empty_prompt": zeros}
    said = {name: value for name, value in index.items() if value is not None}
    (other / "model_index.json").write_text(json.dumps(said))
    cache = TensorCache(tmp_path / "cache")
    for one in (folder, SdxlFolder(other)):
        keys = text_keys(one, "fp32")
        encode_texts([None], one, keys, cache, CPU)
    pipeline = StableDiffusionXLPipeline.from_pretrained(other)
    _, theirs, _, pooled = pipeline.encode_prompt("a red square", device=CPU, do_classifier_free_guidance=True)
    kept = cache.load(keys.of(None))
    assert torch.allclose(kept["embeddings"], theirs[0], atol=1e-6)
    assert torch.allclose(kept["pooled"], pooled[0], atol=1e-6)


def test_held_out_pairs_are_seen_as_they_are(folder: SdxlFolder, tmp_path: Path, pair: PairImages) -> None:
    """Runs of other recipes were measured on other pictures and prompts, and a sweep compared them."""
    plain, held = reader_of(folder, tmp_path, pair), replace(pair, held_out=True)
    changing = replace(plain, caption_dropout=0.99, random_flip=True, noise_offset=0.5)
    assert changing.flipped(replace(pair, pair_id="b"), 0)
    for kept, found in zip(vars(plain.batch([pair], [0])).values(), vars(changing.batch([held], [0])).values()):  # noqa: B905
        assert kept is found or torch.equal(kept, found)
    keys = [ReferenceErrors([held], reader, {}, 1, torch.float32).key((0, 0)) for reader in (plain, changing)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("key", [{"caption_dropout": 0.99}, {"noise_offset": 0.1}])
def test_references_of_another_recipe_are_not_taken(
    key: dict[str, float], folder: SdxlFolder, tmp_path: Path, pair: PairImages
) -> None:
    readers = [reader_of(folder, tmp_path, pair), replace(reader_of(folder, tmp_path, pair), **key)]  # type: ignore[arg-type]
    names = [ReferenceErrors([pair], reader, {}, 1, torch.float32).key((0, 0)) for reader in readers]
    assert names[0] != names[1]


def test_a_noise_offset_moves_whole_channels_and_nothing_else() -> None:
    plain, moved = draw(0, "a", 3, (4, 64, 64), 1000), draw(0, "a", 3, (4, 64, 64), 1000, offset=0.5)
    assert moved.timestep == plain.timestep
    shift = moved.noise - plain.noise
    assert shift.flatten(1).std(1).max() < 1e-6
    shifts = torch.stack([draw(seed, "a", 0, (4, 8, 8), 1000, 0.5).noise - draw(seed, "a", 0, (4, 8, 8), 1000).noise
                          for seed in range(400)]).mean((2, 3))  # fmt: skip
    assert shifts.std().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_and_zero_snr_are_diffusers(zero_snr: bool, tmp_path: Path) -> None:
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    scheduler.save_pretrained(tmp_path / "scheduler")
    schedule = load_schedule(tmp_path, 5.0)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps))
    torch.testing.assert_close(
        schedule.target(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps)
    )
    weights = schedule.weights(timesteps)
    assert weights is not None
    assert torch.isfinite(weights).all()
    assert (weights[-1] == 0) == zero_snr


def test_pure_noise_is_not_learnt_by_predicting_it(tmp_path: Path) -> None:
    DDPMScheduler(rescale_betas_zero_snr=True).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ConfigError, match=r"ends in pure noise[\s\S]*rescale_betas_zero_snr[\s\S]*v_prediction"):
        load_schedule(tmp_path, None)


@pytest.mark.parametrize("size", SDXL_SIZES)
def test_sdxls_own_sizes_are_their_own_buckets(size: tuple[int, int]) -> None:
    assert bucket(*size, 1024, 64) == size
    assert cut_share(*size, size) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("width", "height"), [(4000, 3000), (640, 960), (1920, 1080), (1040, 1000)])
def test_a_bucket_keeps_an_image_whole_and_is_no_larger_than_the_square(width: int, height: int) -> None:
    found = bucket(width, height, 1024, 64)
    assert found[0] * found[1] <= 1024**2
    assert found[0] % 64 == found[1] % 64 == 0
    assert cut_share(width, height, found) < 0.06
    assert bucket(height, width, 1024, 64) == found[::-1]


def test_a_wide_pair_is_trained_whole_in_its_bucket_and_its_cut_is_told_without_one(
    folder: SdxlFolder, tmp_path: Path, pair: PairImages, caplog: pytest.LogCaptureFixture
) -> None:
    whole = reader_of(folder, tmp_path, pair, bucket_step=8)
    assert whole.size(pair) == (40, 24)
    batch = whole.batch([pair], [0])
    assert batch.latents.shape == (2, 4, 12, 20)
    assert batch.time_ids[0].tolist() == [32, 64, 0, 4, 24, 40]  # scaled to 48 x 24, four columns cut on either side
    square = reader_of(folder, tmp_path, pair)
    assert square.keys(pair, 0) != whole.keys(pair, 0)
    told = tell_cut([pair, replace(pair, prompt="word " * 100)], folder, square.images)
    assert told == {"num_cut_prompts": 1, "num_cut_images": 2, "num_enlarged_images": 0}
    assert "draws" not in caplog.text
    larger = tell_cut([pair], folder, replace(square.images, resolution=64))
    assert larger["num_enlarged_images"] == 2
    assert "2 of 2 images are smaller than they are trained at and blown up, by up to 2, such as l.png" in caplog.text
    assert "resolution is 64, this model draws 32 pixels" in caplog.text
    assert "2 of 2 images are cut, by up to 50 %" in caplog.text
    assert "1 prompts are longer than the text encoders read" in caplog.text


def test_pixels_of_a_bucket_are_the_images_own(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels, _ = load_pixels(tmp_path / "ramp.png", (64, 32), False)
    assert torch.allclose(pixels, torch.from_numpy(ramp).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)
    flipped, _ = load_pixels(tmp_path / "ramp.png", (64, 32), True)
    assert torch.equal(flipped, pixels.flip(2))


def test_samples_are_those_of_generate_images(folder: SdxlFolder, tmp_path: Path) -> None:
    """Pixel for pixel: guidance away from the same nothing, the latents' mean and spread, the folder's scheduler."""
    prompts = ["a red square on the left", "a blue circle"]
    cache, texts = TensorCache(tmp_path / "cache"), TextKeys("text", "fp32", zeros=True)
    encode_texts([None, *prompts], folder, texts, cache, CPU)
    config = SdxlPreferenceConfig(sample_steps=1, sample_inference_steps=3, resolution=32, precision="fp32")
    grid = SampleGrid(prompts, config, folder, cache, texts, tmp_path)
    with torch.no_grad():
        drawn = grid.draw(folder.load(UNet2DConditionModel, "unet", "fp32"), CPU)
    model = open_pipeline(GeneratorSource(str(folder.path), "tiny", "fp32"))
    for seed, (prompt, ours) in enumerate(zip(prompts, drawn, strict=True)):
        jobs = plan_jobs([ImagePrompt(prompt_id="p", prompt=prompt)], [seed])
        sampling = ImageSampling(num_inference_steps=3)
        (tmp_path / str(seed)).mkdir()
        make_images(lambda: model, jobs, sampling, "tiny", tmp_path / str(seed), tmp_path, 1)
        theirs = Image.open(tmp_path / str(seed) / jobs[0].file)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_samples_that_never_come_and_prompts_of_a_side_are_told(
    folder: SdxlFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, texts = SdxlPreferenceConfig(sample_steps=100), TextKeys("text", "fp32", zeros=True)
    grid = SampleGrid(["a"], config, folder, TensorCache(tmp_path), texts, tmp_path)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    for steps in (100, 99):
        grid.on_train_begin(arguments, TrainerState(max_steps=steps), TrainerControl())
    tell_mirrored(["a cat leftover from Bright", "the right cat", "a dog on the LEFT, to the right", "leftmost"])
    assert [record.getMessage() for record in caplog.records] == [
        "sample_steps is 100, this training has 99: no sample is drawn",
        "3 prompts say left or right, and random_flip trains them with mirrored pictures too: a dog on the LEFT, to "
        "the right",
    ]


@pytest.mark.slow
def test_pictures_go_to_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: make vllm, which brings it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "grid.png")
    log_picture(["tensorboard"], tmp_path, "samples", tmp_path / "grid.png", 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (7, 8, 4)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with wandb.init(project="p", dir=tmp_path, settings=wandb.Settings(console="off")):
        log_picture(["wandb", "none"], tmp_path, "samples", tmp_path / "grid.png", 7)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))


def test_work_is_counted_in_images(folder: SdxlFolder, tmp_path: Path, pair: PairImages) -> None:
    assert work_of(reader_of(folder, tmp_path, pair).batch([pair, pair], [0, 1])) == (4, "images")
