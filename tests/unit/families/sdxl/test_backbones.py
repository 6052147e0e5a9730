"""SD 1.5, SD 3 and FLUX.1 behind one scorer: each as its pipeline calls it, and Flow-DPO against its equation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from tiny_unet import disturb
from torch import Tensor

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl.backbone import denoiser
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.encoding import encode_pixels, encode_prompt, load_encoders
from prefmill.families.sdxl.export import adapted_modules, adapter_state, merged_weight, save_diffusers, save_kohya
from prefmill.families.sdxl.family import SdxlBatch, SdxlFamily, errors, predict
from prefmill.families.sdxl.generator import GeneratorSource, add_adapter, decode, open_pipeline
from prefmill.families.sdxl.loading import SdxlFolder, load_policy, open_folder
from prefmill.families.sdxl.noise import FlowSchedule, draw, load_schedule, logit_normal, shift_by_size
from prefmill.training.objectives import Settings, flow_dpo

PROMPT = "a red square on the left"
SETTINGS = Settings(beta=700.0)
NAMES = ["sd15", "sd3", "flux_dev", "flux_schnell"]
SIZE = {"height": 32, "width": 48}  # pixels: rows and columns are no square


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(name, tmp_path_factory.mktemp("models") / name) for name in NAMES}


def opened(folder: Path) -> tuple[SdxlFolder, Any]:
    return open_folder(str(folder), None, None), open_pipeline(GeneratorSource(str(folder), "tiny", "fp32"))


def batch_of(noise: Tensor, timesteps: Tensor, embeddings: Tensor, pooled: Tensor, latents: Tensor) -> SdxlBatch:
    return SdxlBatch(latents, noise, timesteps, embeddings, pooled, torch.zeros(len(noise), 6), torch.ones(1))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_called_as_its_pipeline_calls_it(folders: dict[str, Path], name: str) -> None:
    """At every step of a drawing: the same latents and prompt, told the same time, give what the call gave."""
    folder, pipeline = opened(folders[name])
    guidance = 2.5 if name == "flux_dev" else None  # of SDXL's kind none: one call a step
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Tensor]) -> None:
        given = [*args, *(kwargs[key] for key in ("hidden_states", "timestep") if key in kwargs)]
        latents, time, found = given[0], given[1], result[0]
        if "img_ids" in kwargs:
            size = (SIZE["height"], SIZE["width"], pipeline.vae_scale_factor)
            latents, found = (pipeline._unpack_latents(tokens, *size) for tokens in (latents, found))
            time = 1000 * time
        calls.append((latents, time, found))

    hook = denoiser(pipeline).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        pipeline(PROMPT, num_inference_steps=3, guidance_scale=guidance or 1.0, output_type="latent", **SIZE)
    hook.remove()
    embeddings, pooled = encode_prompt(load_encoders(folder, "fp32"), [PROMPT], torch.device("cpu"))
    own = folder.schedule(guidance=guidance)
    assert len(calls) >= 3
    for number, (latents, time, expected) in enumerate(calls):
        schedule, place = own, time.reshape(1)
        if isinstance(own, FlowSchedule):
            # A drawing's times lie between those of training: this is one of them.
            schedule, place = FlowSchedule(time.expand(1000) / 1000, own.call), torch.tensor([number])
            noise, clean = latents / schedule.sigmas[0], torch.zeros_like(latents)
        else:
            a = own.alphas[place].view(1, 1, 1, 1)
            noise, clean = torch.zeros_like(latents), latents / a.sqrt()
        with torch.no_grad():
            found, _ = predict(denoiser(pipeline), batch_of(noise, place, embeddings, pooled, clean), schedule)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_flow_is_the_schedulers(folders: dict[str, Path]) -> None:
    """Noised and timed as diffusers' scheduler does it, shift included; the velocity leads from noise to image."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folders["sd3"], subfolder="scheduler")
    schedule = load_schedule(folders["sd3"], None)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 16, 4, 4, generator=generator) for _ in range(2))
    places = torch.tensor([0, 400, 999])
    noised = schedule.add(latents, noise, places)
    times = schedule.times(places, latents)
    torch.testing.assert_close(times, scheduler.timesteps[places])
    torch.testing.assert_close(noised, scheduler.scale_noise(latents, scheduler.timesteps[places], noise))
    velocity = schedule.target(latents, noise, places)
    torch.testing.assert_close(noised - (times / 1000)[:, None, None, None] * velocity, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "sd3 by size", "flux_dev", "flux_schnell"])
@pytest.mark.parametrize("height", [32, 64])
def test_sigmas_are_those_that_the_pipeline_draws_with(folders: dict[str, Path], name: str, height: int) -> None:
    """Where the shift follows the picture's size, by the pipeline's own rule for that size."""
    folder, pipeline = opened(folders[name.partition(" ")[0]])
    schedule = folder.schedule()
    if "by size" in name:
        pipeline.scheduler = type(pipeline.scheduler)(use_dynamic_shifting=True)
        schedule = FlowSchedule(pipeline.scheduler.sigmas, schedule.call, shift_by_size(pipeline.scheduler, 2))
    with torch.no_grad():
        pipeline(PROMPT, sigmas=[1.0, 0.7, 0.25], num_inference_steps=3, output_type="latent", height=height, width=48)
    latents = torch.zeros(3, 16, height // pipeline.vae_scale_factor, 48 // pipeline.vae_scale_factor)
    found = schedule.times(torch.tensor([0, 300, 750]), latents)
    torch.testing.assert_close(found, pipeline.scheduler.timesteps, atol=1e-3, rtol=1e-6)
    tokens = latents.shape[2] * latents.shape[3] / 4
    if name == "flux_dev":  # and in numbers: e^mu / (e^mu + 1 / t - 1), mu from 0.5 at 256 tokens to 1.15 at 4096
        mu = 0.5 + 0.65 * (tokens - 256) / 3840
        expected = [1000 * math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in (1.0, 0.7, 0.25)]
        assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_timesteps_are_logit_normal() -> None:
    """Against the distribution itself: the logit of the share is N(0, 1)."""
    drawn = [draw(0, str(number), 0, (1, 1, 1), 1000, sample=logit_normal).timestep for number in range(4000)]
    share = (torch.tensor(drawn).double() + 0.5) / 1000
    logits = torch.log(share / (1 - share))
    assert logits.mean().item() == pytest.approx(0, abs=0.05)
    assert logits.std().item() == pytest.approx(1, abs=0.05)
    assert min(drawn) >= 0
    assert max(drawn) < 1000


def plainly(model: Any, noised: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """The prediction by the transformer's own forward and, for FLUX, diffusers' packing."""
    given = {"encoder_hidden_states": text, "pooled_projections": pooled}
    if isinstance(model, SD3Transformer2DModel):
        return model(hidden_states=noised, timestep=1000 * sigma[None], **given).sample
    from diffusers import FluxPipeline

    count, channels, height, width = noised.shape
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float64)
    packed = FluxPipeline._pack_latents(noised, count, channels, height, width)
    moved = model(
        hidden_states=packed, timestep=(1000 * sigma[None]) / 1000, img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3).double(), guidance=torch.tensor([3.5]), **given,
    ).sample  # fmt: skip
    return FluxPipeline._unpack_latents(moved, height, width, 1)


@pytest.mark.parametrize("name", ["sd3", "flux_dev"])
def test_flow_dpo_is_its_equation_down_to_the_weights(folders: dict[str, Path], name: str) -> None:
    """The paper's formula in float64, from latents and the transformer's own forward: loss and gradients, 1e-9."""
    folder = open_folder(str(folders[name]), None, None)
    schedule, said = folder.schedule(), folder.denoiser_settings
    assert isinstance(schedule, FlowSchedule)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    policy, reference = (folder.load_denoiser("fp32").double() for _ in range(2))
    with torch.no_grad():
        for value in policy.parameters():
            value += 0.01 * normal(*value.shape)
    winner, loser, noise, text, pooled = (
        normal(1, 16, 16, 16), normal(1, 16, 16, 16), normal(1, 16, 16, 16),
        normal(1, 7, said["joint_attention_dim"]), normal(1, said["pooled_projection_dim"]),
    )  # fmt: skip
    place = torch.tensor([300])
    batch = batch_of(noise.repeat(2, 1, 1, 1), place.repeat(2), text.repeat(2, 1, 1), pooled.repeat(2, 1),
                     torch.cat([winner, loser]))  # fmt: skip
    with torch.no_grad():
        before = -errors(*predict(reference, batch, schedule))
    family = SdxlFamily(lambda *_: None, lambda *_: torch.zeros(()), schedule)
    found = flow_dpo(family.pair_scores(policy, batch, *before.chunk(2)), SETTINGS).mean()
    weights = [value for value in policy.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(found, weights)

    # As the model is told it, in fp32; another test holds it.
    sigma = (schedule.times(place, winner) / 1000)[0]

    def square(model: Any, image: Tensor) -> Tensor:
        """The mean of |v - v_theta(x_t, t)|^2."""
        share = schedule.shift(schedule.sigmas[place], (16, 16))[0] if schedule.shift else schedule.sigmas[300]
        moved = plainly(model, (1 - share) * image + share * noise, sigma, text, pooled)
        return ((noise - image) - moved).pow(2).mean()

    with torch.no_grad():
        kept = [square(reference, image) for image in (winner, loser)]
    inner = (square(policy, winner) - kept[0]) - (square(policy, loser) - kept[1])
    expected = torch.log1p(torch.exp(SETTINGS.beta / 2 * inner))  # -log s(-x) = log(1 + e^x)
    assert abs(inner.item()) > 1e-4
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    for one, other in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "scale", "shift"), [("sd3", 1.5305, 0.0609), ("flux_dev", 0.3611, 0.1159)])
def test_latents_are_shifted_and_scaled_and_come_back(
    folders: dict[str, Path], name: str, scale: float, shift: float
) -> None:
    """As the pipeline decodes, z / scaling_factor + shift_factor, turned round."""
    _, pipeline = opened(folders[name])
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = encode_pixels(pipeline.vae, pixels)
    with torch.no_grad():
        plain = pipeline.vae.encode(pixels).latent_dist.mode()
        shown = pipeline.vae.decode(latents / scale + shift, return_dict=False)[0]
    torch.testing.assert_close(latents, (plain - shift) * scale)
    expected = pipeline.image_processor.postprocess(shown, output_type="pil")[0]
    assert decode(pipeline, latents[0]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_dev"])
def test_diffusers_reads_the_adapter_as_it_was_trained(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Its own form for all; for SD 1.5 kohya's too, whose names come from diffusers there."""
    folder, pipeline = opened(folders[name])
    config = validate(SdxlPreferenceConfig, {"precision": "fp32", "lora": {"r": 4, "use_dora": False}})
    model = disturb(load_policy(folder, config))
    save_diffusers(
        adapter_state(model), model.peft_config["default"], tmp_path / "own.safetensors", folder.backbone.part
    )
    files = ["own"]
    if name == "sd15":
        save_kohya(model, 16.0, "base", tmp_path / "kohya.safetensors", folder.backbone)
        files.append("kohya")
    expected = {layer: merged_weight(given) for layer, given in adapted_modules(model).items()}
    for file in files:
        pipeline.load_lora_weights(tmp_path, weight_name=f"{file}.safetensors", adapter_name=file)
        pipeline.set_adapters(file)
        layers = dict(denoiser(pipeline).named_modules())
        for layer, weight in expected.items():
            torch.testing.assert_close(merged_weight(layers[layer], file), weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["sd3", "flux_dev"])
def test_comfyuis_file_makes_the_trained_transformer(
    folders: dict[str, Path], name: str, dora: bool, tmp_path: Path
) -> None:
    """By ComfyUI's rule: alpha from the keys alone, queries in rows of one matrix. generate_images reads it as well."""
    folder, pipeline = opened(folders[name])
    config = validate(SdxlPreferenceConfig, {"precision": "fp32", "lora": {"r": 4, "use_dora": dora}})
    model, file = disturb(load_policy(folder, config)), tmp_path / "comfyui.safetensors"
    save_kohya(model, 16.0, "base", file, folder.backbone)
    given, expected = load_file(file), {one: merged_weight(layer) for one, layer in adapted_modules(model).items()}
    assert {key.split(".")[0] for key in given} == {f"lora_transformer_{one.replace('.', '_')}" for one in expected}
    layers = dict(denoiser(pipeline).named_modules())
    for one, weight in expected.items():
        part = {key.split(".", 1)[1]: value for key, value in given.items() if key.startswith(
            f"lora_transformer_{one.replace('.', '_')}.")}  # fmt: skip
        joined = torch.cat([torch.ones_like(layers[one].weight), layers[one].weight.detach().clone()])
        rows = joined.narrow(0, len(weight), len(weight))
        merged = rows + part["alpha"] / 4 * part["lora_up.weight"] @ part["lora_down.weight"]
        merged = merged * (part["dora_scale"] / rows.norm(dim=1, keepdim=True)) if dora else merged
        torch.testing.assert_close(merged, weight, atol=1e-6, rtol=1e-5)
    add_adapter(pipeline, file, 1.0)
    for one, weight in expected.items():
        torch.testing.assert_close(layers[one].weight.detach(), weight, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_trained_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min-SNR weighs errors of noise"):
        load_schedule(folders["sd3"], 5.0)
    for name in ("sd3", "flux_schnell"):
        with pytest.raises(ConfigError, match=r"told no guidance[\s\S]*leave out guidance_scale"):
            open_folder(str(folders[name]), None, None).schedule(guidance=3.5)
    for name, part in (("flux_dev", "text_encoder_2"), ("sd3", "text_encoder_2"), ("sd15", "vae")):
        folder = Path(shutil.copytree(folders[name], tmp_path / name))
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, part: [None, None]}))
        with pytest.raises(InputError, match=rf"part of the pipeline is missing[\s\S]*no {part}\n[\s\S]*download"):
            open_folder(str(folder), None, None)
    for kind in ("KandinskyPipeline", "FluxKontextPipeline", "FluxFillPipeline"):
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
        with pytest.raises(InputError, match=r"no backbone for this kind of pipeline[\s\S]*FluxPipeline"):
            open_folder(str(tmp_path), None, None)
