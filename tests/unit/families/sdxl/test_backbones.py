"""SD 1.5 and SD 3 behind the same scorer: each against its pipeline's own calls, and Flow-DPO against its equation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
from prefmill.families.sdxl.generator import GeneratorSource, decode, open_pipeline
from prefmill.families.sdxl.loading import SdxlFolder, load_policy, open_folder
from prefmill.families.sdxl.noise import FlowSchedule, draw, load_schedule, logit_normal
from prefmill.training.objectives import Settings, flow_dpo

PROMPT = "a red square on the left"
SETTINGS = Settings(beta=700.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(name, tmp_path_factory.mktemp("models") / name) for name in ("sd15", "sd3")}


def opened(folder: Path) -> tuple[SdxlFolder, Any]:
    return open_folder(str(folder), None, None), open_pipeline(GeneratorSource(str(folder), "tiny", "fp32"))


def batch_of(noise: Tensor, timesteps: Tensor, embeddings: Tensor, pooled: Tensor, latents: Tensor) -> SdxlBatch:
    return SdxlBatch(latents, noise, timesteps, embeddings, pooled, torch.zeros(len(noise), 6), torch.ones(1))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_model_is_called_as_its_pipeline_calls_it(folders: dict[str, Path], name: str) -> None:
    """At every step of a drawing: the same latents and prompt, told the same time, give what the call gave."""
    folder, pipeline = opened(folders[name])
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Tensor]) -> None:
        given = [*args, *(kwargs[key] for key in ("hidden_states", "timestep") if key in kwargs)]
        calls.append((given[0], given[1], result[0]))

    hook = denoiser(pipeline).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        pipeline(PROMPT, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    hook.remove()
    embeddings, pooled = encode_prompt(load_encoders(folder, "fp32"), [PROMPT], torch.device("cpu"))
    own = load_schedule(folder.path, None, folder.backbone.conditions)
    assert len(calls) >= 3
    for number, (latents, time, expected) in enumerate(calls):
        schedule, place = own, time.reshape(1)
        if isinstance(own, FlowSchedule):
            # A drawing's times lie between those of training: this is one of them.
            schedule, place = FlowSchedule(time.expand(1000) / 1000, own.conditions), torch.tensor([number])
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
    times = schedule.times(places)
    torch.testing.assert_close(times, scheduler.timesteps[places])
    torch.testing.assert_close(noised, scheduler.scale_noise(latents, scheduler.timesteps[places], noise))
    velocity = schedule.target(latents, noise, places)
    torch.testing.assert_close(noised - (times / 1000)[:, None, None, None] * velocity, latents, atol=1e-5, rtol=1e-5)


def test_timesteps_are_logit_normal() -> None:
    """Against the distribution itself: the logit of the share is N(0, 1)."""
    drawn = [draw(0, str(number), 0, (1, 1, 1), 1000, sample=logit_normal).timestep for number in range(4000)]
    share = (torch.tensor(drawn).double() + 0.5) / 1000
    logits = torch.log(share / (1 - share))
    assert logits.mean().item() == pytest.approx(0, abs=0.05)
    assert logits.std().item() == pytest.approx(1, abs=0.05)
    assert min(drawn) >= 0
    assert max(drawn) < 1000


def test_flow_dpo_is_its_equation_down_to_the_weights(folders: dict[str, Path]) -> None:
    """The paper's formula in float64, from latents and the transformer's own forward: loss and gradients, 1e-9."""
    folder, _ = opened(folders["sd3"])
    schedule = load_schedule(folder.path, None, folder.backbone.conditions)
    assert isinstance(schedule, FlowSchedule)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    policy, reference = (folder.load_denoiser("fp32").double() for _ in range(2))
    with torch.no_grad():
        for value in policy.parameters():
            value += 0.01 * normal(*value.shape)
    winner, loser, noise, text, pooled = (
        normal(1, 16, 16, 16), normal(1, 16, 16, 16), normal(1, 16, 16, 16), normal(1, 7, 64), normal(1, 64),
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

    sigma = schedule.sigmas[300].double()

    def square(model: Any, image: Tensor) -> Tensor:
        """The mean of |v - v_theta(x_t, t)|^2."""
        moved = model(hidden_states=(1 - sigma) * image + sigma * noise, timestep=1000 * sigma[None],
                      encoder_hidden_states=text, pooled_projections=pooled).sample  # fmt: skip
        return ((noise - image) - moved).pow(2).mean()

    with torch.no_grad():
        kept = [square(reference, image) for image in (winner, loser)]
    inner = (square(policy, winner) - kept[0]) - (square(policy, loser) - kept[1])
    expected = torch.log1p(torch.exp(SETTINGS.beta / 2 * inner))  # -log s(-x) = log(1 + e^x)
    assert abs(inner.item()) > 1e-4
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    for one, other in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_latents_are_shifted_and_scaled_and_come_back(folders: dict[str, Path]) -> None:
    """As SD 3's pipeline decodes, z / scaling_factor + shift_factor, turned round."""
    _, pipeline = opened(folders["sd3"])
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = encode_pixels(pipeline.vae, pixels)
    with torch.no_grad():
        plain = pipeline.vae.encode(pixels).latent_dist.mode()
        shown = pipeline.vae.decode(latents / 1.5305 + 0.0609, return_dict=False)[0]
    torch.testing.assert_close(latents, (plain - 0.0609) * 1.5305)
    expected = pipeline.image_processor.postprocess(shown, output_type="pil")[0]
    assert decode(pipeline, latents[0]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_diffusers_reads_the_adapter_as_it_was_trained(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Its own form for both; for SD 1.5 kohya's too, whose names come from diffusers there."""
    folder, pipeline = opened(folders[name])
    config = validate(SdxlPreferenceConfig, {"precision": "fp32", "lora": {"r": 4, "use_dora": False}})
    model = disturb(load_policy(folder, config))
    save_diffusers(
        adapter_state(model), model.peft_config["default"], tmp_path / "own.safetensors", folder.backbone.part
    )
    files = ["own"]
    if folder.backbone.kohya:
        save_kohya(model, 16.0, "base", tmp_path / "kohya.safetensors", folder.backbone.original_names)
        files.append("kohya")
    expected = {layer: merged_weight(given) for layer, given in adapted_modules(model).items()}
    for file in files:
        pipeline.load_lora_weights(tmp_path, weight_name=f"{file}.safetensors", adapter_name=file)
        pipeline.set_adapters(file)
        layers = dict(denoiser(pipeline).named_modules())
        for layer, weight in expected.items():
            torch.testing.assert_close(merged_weight(layers[layer], file), weight, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_trained_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(ConfigError, match="min-SNR weighs errors of noise"):
        load_schedule(folders["sd3"], 5.0)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ConfigError, match="depends on the picture's size"):
        load_schedule(tmp_path, None)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(InputError, match=r"no backbone for this kind of pipeline[\s\S]*StableDiffusion3Pipeline"):
        open_folder(str(tmp_path), None, None)
