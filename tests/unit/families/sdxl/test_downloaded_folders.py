"""Folders of pipelines as people download them: read, or refused with the file that is missing, by both loaders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.demo.tiny_models import build
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.generator import ADAPTER_FILE, GeneratorSource, add_adapter, open_pipeline
from prefmill.families.sdxl.loading import open_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sdxl"
    build("sdxl", folder)
    return folder


def as_variant(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


def as_pickle(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def cut(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def indexed(folder: Path, **change: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def says(part: Path, **change: Any) -> None:
    path = part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def quantized(part: Path, method: str) -> None:
    says(part, quantization_config={"quant_method": method})


def scheduled(folder: Path, kind: str, *left_out: str, **change: Any) -> None:
    """With a scheduler of another class, whose file leaves some keys to it."""
    import diffusers

    indexed(folder, scheduler=["diffusers", kind])
    given = dict(getattr(diffusers, kind)().config) if hasattr(diffusers, kind) else {}
    path = folder / "scheduler" / "scheduler_config.json"
    kept = {key: value for key, value in {**given, **change}.items() if key not in left_out}
    path.write_text(json.dumps({**kept, "_class_name": kind}))


@pytest.mark.parametrize(
    ("change", "variant", "said"),
    [
        (as_variant, None, r"text_encoder\n[\s\S]*set variant: fp16"),
        (lambda folder: None, "fp16", r"no weights of this variant[\s\S]*leave variant out"),
        (lambda folder: as_variant(folder / "unet"), None, r"/unet\n[\s\S]*set variant: fp16"),
        (lambda folder: as_pickle(folder / "unet"), None, r"/unet\n[\s\S]*\.bin"),
        (lambda folder: cut(folder / "vae"), None, r"cannot load the pipeline[\s\S]*download it again"),
        *((lambda folder, part=part: shutil.rmtree(folder / part), None, rf"is missing[\s\S]*/{part}\n")
          for part in ("vae", "unet", "scheduler", "text_encoder_2")),
        # transformers would put a vocabulary of its own in the place of a tokenizer that is not there.
        (lambda folder: (folder / "tokenizer_2" / "tokenizer.json").unlink(), None, r"is missing[\s\S]*/tokenizer_2\n"),
        # Diffusers refuses some of these in a traceback, and transformers skips one that it does not know.
        (lambda folder: quantized(folder / "unet", "bitsandbytes"), None, r"quantized[\s\S]*/unet\n[\s\S]*sandbytes"),
        (lambda folder: quantized(folder / "text_encoder", "fp8"), None, r"quantized[\s\S]*/text_encoder\n"),
        (lambda folder: (folder / "model_index.json").write_text("{"), None, "not JSON"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), None, "not JSON"),
        (lambda folder: indexed(folder, _class_name=None), None, "no backbone"),
        # Each of these failed in the midst of a drawing, or trained as another model: inpainting and editing models, a
        # VAE of another family, a scheduler of flow matching.
        (lambda folder: says(folder / "unet", in_channels=9), None, r"latents alone[\s\S]*got: +in_channels: 9"),
        (lambda folder: says(folder / "vae", latent_channels=16), None, r"latents alone[\s\S]*expected: 16"),
        # These failed when latents and embeddings had been computed: SDXL's refiner, unCLIP, parts of two models.
        (lambda folder: says(folder / "unet", projection_class_embeddings_input_dim=72), None,
         r"other things than[\s\S]*input_dim: 72\n.*expected: 80\n.*refiners"),
        (lambda folder: says(folder / "unet", class_embed_type="projection"), None, r"class_embed_type: projection"),
        (lambda folder: says(folder / "unet", cross_attention_dim=[48, 48]), None, r"\[48, 48\]\n +expected: 64"),
        (lambda folder: indexed(folder, text_encoder=[None, None]), None, r"no text_encoder\n[\s\S]*SDXL's refiner"),
        (lambda folder: scheduled(folder, "FlowMatchEulerDiscreteScheduler"), None, "scheduler is of another kind"),
        (lambda folder: scheduled(folder, "OurScheduler"), None, "cannot load the"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_something_is_refused_by_name(
    model: Path, tmp_path: Path, change: Callable[[Path], object], variant: str | None, said: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    change(folder)
    with pytest.raises(InputError, match=said):
        open_pipeline(GeneratorSource(str(folder), "x", "fp32", variant=variant))
    with pytest.raises(InputError, match=said):
        open_folder(str(folder), None, variant).load_pipeline()


def test_parts_of_a_variant_and_others_go_together(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    as_variant(folder / "unet")
    opened = open_folder(str(folder), None, "fp16")
    assert [name for name, value in opened.load_denoiser("fp32").named_parameters() if value.is_meta] == []
    drawn = open_pipeline(GeneratorSource(str(folder), "x", "fp32", variant="fp16"))
    assert {parameter.dtype for parameter in drawn.unet.parameters()} == {torch.float32}


def test_an_adapter_of_other_keys_is_told_by_one_of_them(model: Path, tmp_path: Path) -> None:
    """Of another backbone or nothing: diffusers said that an adapter is not present in an empty set."""
    pipeline = open_pipeline(GeneratorSource(str(model), "x", "fp32"))
    part, file = "transformer.transformer_blocks.0.attn.to_q", tmp_path / "adapter_model.safetensors"
    save_file({f"{part}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, file)
    with pytest.raises(InputError, match=rf"does not fit the pipeline[\s\S]*keys such as {part}"):
        add_adapter(pipeline, file, 1.0)


@pytest.mark.parametrize("key", ["emb_params", "clip_g", "image_proj.proj.weight", "control_model.input_hint_block.0"])
def test_files_of_other_kinds_are_told_from_adapters(model: Path, tmp_path: Path, key: str) -> None:
    """Textual inversions, IP-Adapters, ControlNets: diffusers' words were about the substring `lora`."""
    save_file({key: torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"does not fit[\s\S]*keys such as {key}[\s\S]*textual inversions"):
        add_adapter(open_pipeline(GeneratorSource(str(model), "x", "fp32")), tmp_path / "a.safetensors", 1.0)


def test_a_stage_of_texts_refuses_a_model_of_pictures(model: Path, tmp_path: Path) -> None:
    """Pipelines and adapters of sdxl_dpo: transformers spoke of a tokenizer without sentencepiece."""
    (tmp_path / ADAPTER_FILE).touch()
    for folder in (model, tmp_path):
        for load in (load_tokenizer, partial(load_model, precision="fp32")):
            with pytest.raises(InputError, match=r"makes pictures, not text[\s\S]*sdxl_dpo"):
                load(str(folder))


def test_a_schedule_is_that_of_the_folders_own_scheduler(model: Path, tmp_path: Path) -> None:
    """LCM's betas, which its file may leave out, are not DDPM's; EDM has none, a distilled UNet hears its guidance."""
    import diffusers

    folder = Path(shutil.copytree(model, tmp_path / "m"))
    scheduled(folder, "LCMScheduler", "beta_start", "beta_end", "beta_schedule")
    theirs = diffusers.LCMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    torch.testing.assert_close(open_folder(str(folder), None, None).schedule().alphas, theirs)
    for kind in ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"):
        scheduled(folder, kind)
        with pytest.raises(ConfigError, match=rf"kind of schedule cannot be trained[\s\S]*{kind}"):
            open_folder(str(folder), None, None).schedule()
    says(folder / "unet", time_cond_proj_dim=16)
    with pytest.raises(ConfigError, match=r"learnt its guidance[\s\S]*time_cond_proj_dim: 16"):
        open_folder(str(folder), None, None).schedule()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], r"FluxTransformer2DModel\.from_single_file"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], r"SD3Transformer2DModel\.from_single_file"),
        (["cond_stage_model.transformer.weight"], r"\.StableDiffusionPipeline\.from_single_file"),
        (["edm_mean", "conditioner.embedders.0.weight"], r"start from another checkpoint[\s\S]*EDM"),
    ],
)
def test_a_single_file_is_read_by_its_own_class(tmp_path: Path, names: list[str], said: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file)
    with pytest.raises(InputError, match=said):
        open_folder(str(file), None, None)


V_FILES: list[tuple[list[str], dict[str, str], bool]] = [
    (["v_pred", "ztsnr"], {}, True),  # NoobAI
    (["v_pred"], {}, False),
    ([], {"modelspec.prediction_type": "v"}, False),  # sd-scripts, of whole models
    ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, True),
]


@pytest.mark.parametrize(("names", "head", "zero_snr"), V_FILES)
def test_the_folder_made_of_a_single_file_predicts_what_its_marks_say(
    model: Path, tmp_path: Path, names: list[str], head: dict[str, str], zero_snr: bool
) -> None:
    """diffusers passes the marks over: the command that is told writes them, and the folder is read by them."""
    import diffusers

    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in ["conditioner.embedders.0.weight", *names]}, file, head)
    with pytest.raises(InputError) as told:
        open_folder(str(file), None, None)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    command = re.sub(r"p = .*?\('.*?'\)", "", told.value.details["fix"].partition(": ")[2])
    exec(command.replace("FOLDER", str(tmp_path / "made")).removeprefix("; "), {"p": pipeline})
    schedule = open_folder(str(tmp_path / "made"), None, None).schedule()
    assert (schedule.prediction, schedule.alphas[-1].item() == 0) == ("v_prediction", zero_snr)  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_v_prediction_that_only_another_file_names_is_refused(model: Path, tmp_path: Path, place: str) -> None:
    """It was trained as a model of noise, without a word."""
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    if place.endswith(".json"):
        said = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps({**said, "prediction_type": "v_prediction"}))
    else:
        save_file(load_file(folder / place), folder / place, {"modelspec.prediction_type": "v"})
    with pytest.raises(InputError, match=r"says otherwise than the model[\s\S]*v_prediction beside epsilon"):
        open_folder(str(folder), None, None)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    assert open_folder(str(folder), None, None).schedule().prediction == "v_prediction"  # type: ignore[union-attr]


def test_a_folder_of_peft_is_told_as_its_file_is(model: Path, tmp_path: Path) -> None:
    """It was told to give the file itself, which is refused."""
    save_file({"base_model.model.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"PEFT's own keys[\s\S]*merge_and_unload"):
        add_adapter(None, tmp_path, 1.0)


@pytest.mark.parametrize("is_file", [True, False])
def test_a_single_file_is_told_how_it_becomes_a_folder(model: Path, tmp_path: Path, is_file: bool) -> None:
    file = shutil.copy(model / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "sd_xl.safetensors")
    given = str(file if is_file else tmp_path)
    for open_it in (lambda: open_folder(given, None, None), lambda: open_pipeline(GeneratorSource(given, "x", "fp32"))):
        with pytest.raises(InputError, match=r"from_single_file\('.*sd_xl\.safetensors'\)"):
            open_it()


@pytest.mark.parametrize("tool", ["kohya", "lycoris", "diffusers", "peft"])
def test_the_command_that_merges_an_adapter_given_as_a_base_makes_that_base(
    model: Path, tmp_path: Path, tool: str
) -> None:
    """A file was taken for a checkpoint, and PEFT's folder and LyCORIS' file for diffusers': neither command ran."""
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    part = model / "unet" / "diffusion_pytorch_model.safetensors"
    old = load_file(part)[f"{name}.weight"]
    draw = torch.Generator().manual_seed(0)
    up, down, more = (torch.randn(shape, generator=draw) for shape in ((len(old), 2), (2, old.shape[1]), (2, 2)))
    kohya, given, change = f"lora_unet_{name.replace('.', '_')}", tmp_path / "my.safetensors", 0.5 * up @ down
    if tool == "lycoris":
        save_file({f"{kohya}.lokr_w1": more, f"{kohya}.lokr_w2": (up @ down)[: len(old) // 2, : old.shape[1] // 2]
                   .contiguous()}, given)  # fmt: skip
        change = torch.kron(more, (up @ down)[: len(old) // 2, : old.shape[1] // 2])
    elif tool == "kohya":
        save_file(
            {f"{kohya}.lora_up.weight": up, f"{kohya}.lora_down.weight": down, f"{kohya}.alpha": torch.tensor(1.0)},
            given,
        )
    elif tool == "diffusers":
        save_file({f"unet.{name}.lora_B.weight": up, f"unet.{name}.lora_A.weight": down}, given)
        change = up @ down
    else:
        given = tmp_path / "peft"
        given.mkdir()
        keys = {f"base_model.model.{name}.lora_B.weight": up, f"base_model.model.{name}.lora_A.weight": down}
        save_file(keys, given / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": [name]}
        (given / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="an adapter, not a pipeline") as told:
        open_folder(str(given), None, None)
    command = re.search(r"in Python: (.*), and give", told.value.details["fix"])
    assert command
    exec(command[1].replace("BASE", str(model)).replace("FOLDER", str(tmp_path / "made")), {})
    made = open_folder(str(tmp_path / "made"), None, None).load_denoiser("fp32").state_dict()
    torch.testing.assert_close(made[f"{name}.weight"] - old, change, rtol=1e-4, atol=1e-5)


def test_an_adapter_may_be_a_file_of_any_name(model: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(GeneratorSource(str(model), "x", "fp32"))
    pipeline.unet.add_adapter(_lora(), "mine")
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=_weights(pipeline))
    file = (tmp_path / ADAPTER_FILE).rename(tmp_path / "my style.safetensors")
    fresh = open_pipeline(GeneratorSource(str(model), "x", "fp32"))
    with pytest.raises(InputError, match=r"my style\.safetensors[\s\S]*give the file itself"):
        add_adapter(fresh, tmp_path, 1.0)
    add_adapter(fresh, file, 1.0)
    assert any("lora_A" in name for name, _ in fresh.unet.named_parameters())


def _lora() -> Any:
    import peft

    return peft.LoraConfig(r=2, target_modules=["to_q"])


def _weights(pipeline: Any) -> Any:
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(pipeline.unet, adapter_name="mine")


def test_what_is_no_pipeline_is_not_taken_for_a_single_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of transformers and an adapter have weights too, from which no pipeline can be made."""
    build("clip", tmp_path / "clip")
    with pytest.raises(InputError, match="no diffusers pipeline here") as told:
        open_folder(str(tmp_path / "clip"), None, None)
    assert "single file" not in str(told.value)
    (tmp_path / ADAPTER_FILE).touch()
    with pytest.raises(InputError, match="an adapter, not a pipeline"):
        open_folder(str(tmp_path), None, None)
    monkeypatch.setenv("HOME", str(model.parent))
    assert open_folder(f"~/{model.name}", None, None).path == model


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"objective": "dpo", "dspo_lambda": 0.5}, "dspo_lambda: only objective dspo"),
        ({"objective": "mapo", "dspo_stop_gradient": False}, "dspo_stop_gradient: only objective dspo"),
        ({"objective": "sft", "beta": 7.0, "sft_weight": 0.1}, "beta, sft_weight: no effect with objective sft"),
        ({"objective": "dpo", "num_samples": 2}, "num_samples: no effect without sample_steps"),
        ({"ema_decay": 0.5}, "ema_decay has no effect without use_ema"),
    ],
)
def test_a_key_without_effect_is_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        validate(SdxlPreferenceConfig, keys)
    validate(SdxlPreferenceConfig, {**keys, "objective": "dspo", "use_ema": True, "sample_steps": 5})
