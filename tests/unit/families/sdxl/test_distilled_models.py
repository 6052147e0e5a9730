"""Distilled models: how many steps, tokens and prompts they take, and a scheduler of a package that is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionXLPipeline

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.statistics import Resampling
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl.backbone import denoiser
from prefmill.families.sdxl.callbacks import SampleGrid
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.denoising_error_shift import denoising_drift
from prefmill.families.sdxl.encoding import encode_texts, text_keys
from prefmill.families.sdxl.generator import GeneratorSource, open_pipeline
from prefmill.families.sdxl.loading import open_folder, require_made_for
from prefmill.images.generation import ImageJob, cut_prompts, draw_latents, followed, make_images
from prefmill.images.sampling import ImageSampling
from prefmill.store.tensor_cache import TensorCache

PROMPT = "a red square"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("distilled")
    made = {name: build(name, root / name) for name in ("sdxl", "flux_dev", "flux_schnell")}
    for part in made["flux_dev"].glob("t*_encoder*"):  # published with the same encoders
        shutil.copytree(part, made["flux_schnell"] / part.name, dirs_exist_ok=True)
    return made


def with_scheduler(model: Path, folder: Path, name: str, **settings: Any) -> Path:
    shutil.copytree(model, folder)
    for file, changed in (
        ("scheduler/scheduler_config.json", {"_class_name": name, **settings}),
        ("model_index.json", {"scheduler": ["diffusers", name]}),
    ):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_more_steps_than_a_distilled_schedule_has_are_refused(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """Their `original_inference_steps` of 50: diffusers raised in the midst of a drawing."""
    model = open_pipeline(GeneratorSource(str(with_scheduler(folders["sdxl"], tmp_path / "m", name)), "m", "fp32"))
    assert followed(model, ImageSampling(num_inference_steps=50, guidance_scale=1.0)).num_inference_steps == 50
    with pytest.raises(ConfigError, match=rf"num_inference_steps[\s\S]*at most 50, of {name}"):
        followed(model, ImageSampling(num_inference_steps=51))


TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "settings", "label", "says"),
    [
        ("EulerAncestralDiscreteScheduler", TRAILING, "m", "EulerAncestralDiscreteScheduler, timestep_spacing: trail"),
        ("LCMScheduler", {}, "m", "LCMScheduler"),
        ("EulerDiscreteScheduler", {}, "base + sdxl_lightning_4step_lora", "lightning in its name"),
        ("DDIMScheduler", {**TRAILING, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "m", None),
        ("EulerDiscreteScheduler", {}, "hyperreal-turbos", None),
    ],
)
def test_models_of_few_steps_have_no_default_guidance(
    folders: dict[str, Path], name: str, settings: dict[str, Any], label: str, says: str | None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """They were drawn and evaluated at SDXL's 5, and burnt out. What the error advises is accepted."""
    model = open_pipeline(
        GeneratorSource(str(with_scheduler(folders["sdxl"], tmp_path / "m", name, **settings)), "m", "fp32")
    )
    if says is None:
        assert followed(model, ImageSampling(), label).guidance_scale == 5
        return
    with pytest.raises(ConfigError, match=rf"few steps without guidance[\s\S]*{says}[\s\S]*set guidance_scale: 0"):
        followed(model, ImageSampling(), label)
    caplog.clear()
    assert followed(model, ImageSampling(guidance_scale=0, num_inference_steps=4), label).guidance_scale == 0
    assert not caplog.records
    followed(model, ImageSampling(guidance_scale=0), label)
    assert "made for 1 to 8 steps" in caplog.text


def test_samples_of_a_distilled_model_are_drawn_as_it_was_made(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With guidance 5 before; and 60 steps of LCM's 50 ended the training at its first sample."""
    folder = open_folder(str(with_scheduler(folders["sdxl"], tmp_path / "m", "LCMScheduler")), None, None)
    with pytest.raises(ConfigError, match=r"sample_inference_steps[\s\S]*at most 50, of LCMScheduler"):
        require_made_for(folder, SdxlPreferenceConfig(sample_steps=1, sample_inference_steps=60))
    config = SdxlPreferenceConfig(sample_steps=1, sample_inference_steps=1, resolution=32, precision="fp32")
    require_made_for(folder, config)
    assert "distilled to few steps (LCMScheduler)" in caplog.text
    cache, texts = TensorCache(tmp_path / "cache"), text_keys(folder, "fp32")
    encode_texts([None, PROMPT], folder, texts, cache, torch.device("cpu"))
    told = list[float]()
    call = StableDiffusionXLPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionXLPipeline, "__call__",
        lambda self, **given: told.append(given["guidance_scale"]) or call(self, **given),
    )  # fmt: skip
    with torch.no_grad():
        SampleGrid([PROMPT], config, folder, cache, texts, tmp_path).draw(
            folder.load_denoiser("fp32"), torch.device("cpu")
        )
    assert told == [1]


def test_ends_that_encoders_do_not_read_are_told(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a negative prompt nobody told of, nor evaluate_images of any."""
    model = open_pipeline(GeneratorSource(str(folders["sdxl"]), "m", "fp32"))
    jobs = [ImageJob("p", "word " * 200, 0)]
    asked = ImageSampling(num_inference_steps=1, negative_prompt="bad hands, " * 60)
    make_images(lambda: model, jobs, asked, "m", tmp_path, tmp_path, 1)
    assert "1 of 1 prompts are longer than the text encoders read" in caplog.text
    assert "negative_prompt is longer than the text encoders read" in caplog.text


def test_a_model_that_is_told_its_guidance_is_led_away_from_nothing(folders: dict[str, Path]) -> None:
    """LCM's UNet: diffusers passes a negative prompt over."""
    model = open_pipeline(GeneratorSource(str(folders["sdxl"]), "m", "fp32"))
    assert followed(model, ImageSampling(negative_prompt="dull")).negative_prompt == "dull"
    model.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ConfigError, match="leads away from no prompt"):
        followed(model, ImageSampling(negative_prompt="dull"))


def test_a_package_that_a_scheduler_needs_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """torchsde, whose error begins with an empty line; the fix was to download the folder again."""
    folder = with_scheduler(folders["sdxl"], tmp_path / "m", "DPMSolverSDEScheduler")
    with pytest.raises(InputError, match=r"requires the torchsde library[\s\S]*install that package"):
        open_pipeline(GeneratorSource(str(folder), "m", "fp32"))


@pytest.mark.parametrize(("name", "tokens"), [("flux_schnell", 256), ("flux_dev", 512)])
def test_t5_reads_as_many_tokens_as_the_model_was_made_with(
    folders: dict[str, Path], name: str, tokens: int, tmp_path: Path
) -> None:
    """In training and in drawing, by what diffusers' own pipeline makes of the number on the model's card."""
    folder, cache = open_folder(str(folders[name]), None, None), TensorCache(tmp_path)
    keys = text_keys(folder, "fp32")
    encode_texts([PROMPT], folder, keys, cache, torch.device("cpu"))
    model: Any = open_pipeline(GeneratorSource(str(folders[name]), "m", "fp32"))
    theirs, _, _ = model.encode_prompt(PROMPT, None, max_sequence_length=tokens)
    torch.testing.assert_close(cache.load(keys.of(PROMPT))["embeddings"], theirs[0])
    assert len(theirs[0]) == tokens
    seen = list[int]()
    hook = denoiser(model).register_forward_pre_hook(
        lambda module, args, given: seen.append(given["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    asked = ImageSampling(num_inference_steps=1, height=32, width=32)
    draw_latents(model, [ImageJob("p", PROMPT, 0)], followed(model, asked))
    hook.remove()
    assert seen == [tokens]
    assert cut_prompts(model, ["a" * (tokens - 3), "a" * tokens]) == ["a" * tokens]


def test_drift_is_measured_at_the_guidance_that_pictures_are_drawn_with(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX.1-dev's; it was 3.5 whatever the key said. A model that reads none is told none."""
    from image_pair_artifacts import make_pairs

    told = list[Any]()
    forward = FluxTransformer2DModel.forward

    def seen(self: Any, *args: Any, **given: Any) -> Any:
        told.append(None if given["guidance"] is None else given["guidance"].unique().tolist())
        return forward(self, *args, **given)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", seen)
    pairs, resampling = make_pairs(tmp_path / "pairs", train=1, val=1), Resampling(1000, 0, 0.95)
    for name, asked, expected in (("flux_dev", 1.5, [1.5]), ("flux_dev", None, [3.5]), ("flux_schnell", 1.5, None)):
        source = GeneratorSource(str(folders[name]), "m", "fp32")
        denoising_drift(source, source, pairs, ["val"], 1, 32, asked, tmp_path, resampling)
        assert told == [expected] * 2
        told.clear()


def test_embeddings_of_one_flux_are_not_the_others(folders: dict[str, Path]) -> None:
    """Of the same encoders they read different lengths."""
    schnell, dev = (open_folder(str(folders[name]), None, None) for name in ("flux_schnell", "flux_dev"))
    assert schnell.digest(*schnell.encoders) == dev.digest(*dev.encoders)
    assert text_keys(schnell, "fp32") != text_keys(dev, "fp32")
