"""Adapters on the UNet: step 0 is the reference to the bit, gradients reach all of them, exports are the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_unet import SCHEDULE, disturb, make_batch, make_policy

from prefmill.core.errors import ConfigError
from prefmill.families.sdxl import export
from prefmill.families.sdxl.dora import ExactDora, row_norms
from prefmill.families.sdxl.family import SdxlFamily, errors, predict
from prefmill.families.sdxl.kohya import DORA_NORM, DoraNorm, original_name
from prefmill.families.sdxl.loading import SdxlFolder
from prefmill.families.sdxl.lora import LeanLinear
from prefmill.families.sdxl.reference import adapter_off
from prefmill.training.adapter import save_adapter
from prefmill.training.objectives import OBJECTIVES, Settings

DPO, BETA = OBJECTIVES["dpo"], Settings(beta=5000.0)
FAMILY = SdxlFamily(lambda *_: None, lambda *_: torch.zeros(1), SCHEDULE)
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SdxlFolder:
    from prefmill.demo.tiny_models import build

    folder = tmp_path_factory.mktemp("sdxl")
    build("sdxl", folder, 0)
    return SdxlFolder(folder)


@contextmanager
def autocast(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", LOW.get(precision, torch.bfloat16), enabled=precision != "fp32"):
        yield


def start(model: Any, precision: str) -> Any:
    """The scores of a batch against the reference, which is the model with its adapter off."""
    batch = make_batch()
    with autocast(precision):
        with torch.no_grad(), adapter_off(model):
            reference = -errors(*predict(model, batch, SCHEDULE))
        return FAMILY.pair_scores(model, batch, *reference.chunk(2))


@pytest.mark.parametrize("lora", ["lora", "dora", None])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_zero_is_the_reference(sdxl: SdxlFolder, lora: str | None, precision: str) -> None:
    scores = start(make_policy(sdxl, precision, lora), precision)
    assert scores.margin.tolist() == [0.0, 0.0]
    assert DPO.loss(scores, BETA).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-7)


def test_step_zero_of_pefts_own_dora_is_not(sdxl: SdxlFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: in bf16 under autocast, with adapters in fp32."""
    monkeypatch.setattr("prefmill.families.sdxl.dora.make_exact", lambda model: None)
    margin = start(make_policy(sdxl, "bf16"), "bf16").margin
    assert (BETA.beta / 2 * margin).abs().max() > 0.01


@pytest.mark.parametrize("lora", ["lora", "dora"])
def test_outputs_and_gradients_in_fp32_are_pefts(lora: str, sdxl: SdxlFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = disturb(make_policy(sdxl, lora=lora))
    assert sum(isinstance(module, LeanLinear) for module in ours.modules()) > 10
    assert any(isinstance(module, ExactDora) for module in ours.modules()) is (lora == "dora")
    with monkeypatch.context() as patch:
        for name in ("dora.make_exact", "lora.make_lean"):
            patch.setattr(f"prefmill.families.sdxl.{name}", lambda model: None)
        theirs = make_policy(sdxl, lora=lora)
    theirs.load_state_dict(ours.state_dict())
    outputs, gradients = [], []
    for model in (ours, theirs):
        outputs.append(predict(model, make_batch(), SCHEDULE)[0])
        (outputs[-1] ** 2).mean().backward()
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    assert torch.allclose(*outputs, atol=2e-5)
    assert not torch.allclose(outputs[0], predict(make_policy(sdxl), make_batch(), SCHEDULE)[0], atol=1e-2)
    assert all(torch.allclose(one, two, rtol=1e-3, atol=1e-6) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norms_are_those_of_the_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    a, b = (torch.randn(*shape, generator=generator) / 4 for shape in ((4, 64), (48, 4)))
    found = row_norms(weight, a, b, 4.0, weight.float().square().sum(1))
    assert torch.allclose(found, torch.linalg.norm(weight.double() + 4.0 * b.double() @ a.double(), dim=1).float())


@pytest.mark.parametrize("lora", ["lora", "dora"])
def test_every_adapter_parameter_receives_a_gradient(sdxl: SdxlFolder, lora: str) -> None:
    model = disturb(make_policy(sdxl, lora=lora))
    DPO.loss(start(model, "fp32"), BETA).sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == (3 if lora == "dora" else 2) * len(export.adapted_modules(model))
    assert [name for name, value in trained.items() if value.grad is None or not value.grad.abs().max() > 0] == []
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad and value.grad is not None]
    assert frozen == []


def test_losers_without_a_gradient_change_no_gradient_of_dspo(sdxl: SdxlFolder) -> None:
    model, batch = disturb(make_policy(sdxl)), make_batch()
    with torch.no_grad(), adapter_off(model):
        reference = predict(model, batch, SCHEDULE)[0]
        ref_scores = (-errors(reference, batch.noise)).chunk(2)
    batch = replace(batch, ref_predictions=reference[:2])
    found = []
    for alone in (False, True):
        model.zero_grad()
        family = SdxlFamily(FAMILY.encode, FAMILY.score, SCHEDULE, residuals=True, winner_alone=alone)
        scores = family.pair_scores(model, batch, *ref_scores)
        trained = [value for value in model.parameters() if value.requires_grad]
        through_losers = torch.autograd.grad(scores.rejected.sum(), trained, retain_graph=True)
        assert any(bool(gradient.any()) for gradient in through_losers) is not alone
        OBJECTIVES["dspo"].loss(scores, BETA).sum().backward()
        found.append([value.grad.clone() for value in trained])
    assert all(torch.allclose(one, two, rtol=1e-3, atol=1e-5) for one, two in zip(*found, strict=True))


def test_the_reference_is_the_same_after_training(sdxl: SdxlFolder) -> None:
    model, batch = make_policy(sdxl), make_batch()
    with torch.no_grad(), adapter_off(model):
        before = predict(model, batch, SCHEDULE)[0]
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(3):
        DPO.loss(start(model, "fp32"), BETA).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert not torch.equal(predict(model, batch, SCHEDULE)[0], before)
        with adapter_off(model):
            assert torch.equal(predict(model, batch, SCHEDULE)[0], before)
    assert all(value.requires_grad for name, value in model.named_parameters() if "lora_" in name)


def unet_of(sdxl: SdxlFolder) -> Any:
    from diffusers import UNet2DConditionModel

    return sdxl.load(UNet2DConditionModel, "unet", "fp32")


def from_diffusers(sdxl: SdxlFolder, file: Path) -> Any:
    """What a user gets: the adapter on a fresh pipeline."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl.path, add_watermarker=False)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return pipeline.unet


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return predict(model.eval(), make_batch(seed=3), SCHEDULE)[0]


@pytest.mark.parametrize("lora", ["lora", "dora"])
def test_an_adapter_comes_back_through_diffusers_at_its_scale(sdxl: SdxlFolder, lora: str, tmp_path: Path) -> None:
    model = disturb(make_policy(sdxl, lora=lora))
    file = tmp_path / export.ADAPTER_FILE
    export.save_diffusers(export.adapter_state(model), model.peft_config["default"], file)
    assert near(outputs(from_diffusers(sdxl, file)), outputs(model))
    with safe_open(file, "pt") as stored:
        assert json.loads(stored.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 16.0
    save_file(load_file(file), file, {"format": "pt"})  # the control: without the metadata alpha is the rank
    assert not torch.allclose(outputs(from_diffusers(sdxl, file)), outputs(model), atol=1e-3)


@pytest.mark.parametrize("lora", ["lora", "dora"])
def test_an_adapter_comes_back_through_peft(sdxl: SdxlFolder, lora: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = disturb(make_policy(sdxl, lora=lora))
    save_adapter(model, "sha256:0", None, tmp_path)
    assert near(outputs(PeftModel.from_pretrained(unet_of(sdxl), str(tmp_path))), outputs(model))
    from prefmill.core.config import validate
    from prefmill.families.sdxl.config import SdxlPreferenceConfig

    for keys in ({"lora": {"start": str(tmp_path)}}, {"model_name_or_path": str(tmp_path)}):
        with pytest.raises(ConfigError, match=r"PeftModel.*give model_name_or_path=FOLDER"):
            validate(SdxlPreferenceConfig, keys)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"is an adapter, not a pipeline: give model_name_or_path={tmp_path}/merged"):
        validate(SdxlPreferenceConfig, {"model_name_or_path": str(tmp_path)})
    validate(SdxlPreferenceConfig, {"model_name_or_path": f"{tmp_path}/merged"})  # the fix
    assert "/" not in json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(("lora", "norm"), [("lora", "base"), ("dora", "base"), ("dora", "merged")])
def test_a_file_by_kohyas_keys_makes_the_trained_model(
    sdxl: SdxlFolder, lora: str, norm: DoraNorm, tmp_path: Path
) -> None:
    model, file, unet = disturb(make_policy(sdxl, lora=lora)), tmp_path / "kohya.safetensors", unet_of(sdxl)
    export.save_kohya(model, 16.0, norm, file, sdxl.backbone)
    apply_as_tools_do(unet, load_file(file), norm)
    assert near(outputs(unet), outputs(model))
    assert not torch.allclose(outputs(unet_of(sdxl)), outputs(model), atol=1e-2)
    with safe_open(file, "pt") as stored:
        assert stored.metadata().get(DORA_NORM) == (norm if lora == "dora" else None)


def test_the_other_rule_makes_another_model(sdxl: SdxlFolder, tmp_path: Path) -> None:
    """Why there are two files."""
    model, unet = disturb(make_policy(sdxl)), unet_of(sdxl)
    export.save_kohya(model, 16.0, "base", tmp_path / "kohya.safetensors", sdxl.backbone)
    apply_as_tools_do(unet, load_file(tmp_path / "kohya.safetensors"), "merged")
    assert (outputs(unet) - outputs(model)).abs().max() > 100 * 1e-5


def test_a_lora_file_by_kohyas_keys_is_read_by_diffusers(sdxl: SdxlFolder, tmp_path: Path) -> None:
    model, file = disturb(make_policy(sdxl, lora="lora")), tmp_path / export.COMFYUI_FILE
    export.save_kohya(model, 16.0, "base", file, sdxl.backbone)
    assert {float(value) for name, value in load_file(file).items() if name.endswith(".alpha")} == {16.0}
    assert near(outputs(from_diffusers(sdxl, file)), outputs(model))


def near(found: torch.Tensor, trained: torch.Tensor) -> bool:
    """Within 1e-5 of the trained UNet's output, relative to its spread."""
    return bool((found - trained).abs().max() < 1e-5 * trained.std().clamp_min(1))


def apply_as_tools_do(unet: Any, tensors: dict[str, torch.Tensor], norm: DoraNorm) -> None:
    """The tools' rules, written down: W + alpha / rank up down, for DoRA its rows times dora_scale / |W| or its own."""
    names = {
        f"lora_unet_{str(original_name(name, 1)).replace('.', '_')}": module
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and original_name(name, 1)
    }
    for key in {name.split(".")[0] for name in tensors}:
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        weight = names[key].weight
        merged = weight + tensors[f"{key}.alpha"] / down.shape[0] * up @ down
        if f"{key}.dora_scale" in tensors:
            divisor = weight if norm == "base" else merged
            merged = merged * (tensors[f"{key}.dora_scale"] / divisor.norm(dim=1, keepdim=True))
        with torch.no_grad():
            weight.copy_(merged)


@pytest.mark.parametrize("lora", ["lora", "dora"])
def test_merged_weights_are_the_trained_model(sdxl: SdxlFolder, lora: str) -> None:
    model, unet = disturb(make_policy(sdxl, lora=lora)), unet_of(sdxl)
    merged = {f"{name}.weight": export.merged_weight(layer) for name, layer in export.adapted_modules(model).items()}
    unet.load_state_dict({**unet.state_dict(), **merged})
    assert near(outputs(unet), outputs(model))


@pytest.mark.parametrize(
    ("ours", "original"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.1.ff", "input_blocks.4.1.transformer_blocks.1.ff"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.attentions.0.transformer_blocks.9.attn2.to_q", "middle_block.1.transformer_blocks.9.attn2.to_q"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.attn2", "output_blocks.5.1.transformer_blocks.0.attn2"),
        ("down_blocks.0.resnets.0.time_emb_proj", "input_blocks.1.0.emb_layers.1"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("down_blocks.0.resnets.0.norm1", None),
    ],
)  # fmt: skip
def test_names_are_those_of_the_original_code(ours: str, original: str | None) -> None:
    assert original_name(ours, layers_per_block=2) == original
    assert original_name(ours, layers_per_block=[2, 2, 2]) == original


def test_names_follow_the_layers_of_each_block() -> None:
    """By the numbers of the original code: down its lists grow by a block's layers and one, up by one more."""
    names = {name: original_name(name, [1, 3]) for name in (
        "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.2.conv1",
        "up_blocks.0.resnets.3.conv1", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.0.conv1",
    )}  # fmt: skip
    assert list(names.values()) == [
        "input_blocks.1.0.in_layers.2", "input_blocks.2.0.op", "input_blocks.5.0.in_layers.2",
        "output_blocks.3.0.in_layers.2", "output_blocks.3.2.conv", "output_blocks.4.0.in_layers.2",
    ]  # fmt: skip


def test_alpha_is_four_times_the_rank_and_targets_are_checked(sdxl: SdxlFolder) -> None:
    from prefmill.core.config import validate
    from prefmill.families.sdxl.config import AdapterConfig, SdxlPreferenceConfig
    from prefmill.families.sdxl.loading import add_adapter

    assert [validate(AdapterConfig, given).alpha for given in ({}, {"r": 8}, {"r": 8, "alpha": 3.0})] == [
        64.0,
        32.0,
        3.0,
    ]
    # A word is a name; PEFT takes a text for a regular expression of whole paths.
    texts = ("to_q", "to_out.0", "all-linear", ".*attn2[.]to_q")
    assert [validate(AdapterConfig, {"target_modules": text}).target_modules for text in texts] == [
        ["to_q"], ["to_out.0"], *texts[2:],
    ]  # fmt: skip
    for targets, got in (
        (["to_nothing"], "not found in the base model"),
        (["to_q", "to_nothing"], "no layer called to_nothing"),  # trained to_q alone
        (["to_q", "conv1"], r"conv1 \(Conv2d\)"),  # a traceback once all was trained
    ):
        given = {"lora": {"target_modules": targets}, "save_merged": True}
        with pytest.raises(ConfigError, match=f"does not fit this model(.|\\n)*{got}"):
            add_adapter(unet_of(sdxl), validate(SdxlPreferenceConfig, given))


def test_a_lora_on_convolutions_is_read_by_diffusers(sdxl: SdxlFolder, tmp_path: Path) -> None:
    from prefmill.core.config import validate
    from prefmill.families.sdxl.config import SdxlPreferenceConfig
    from prefmill.families.sdxl.loading import add_adapter

    given = {"lora": {"target_modules": ["to_q", "conv1"], "use_dora": False}}
    model = disturb(add_adapter(unet_of(sdxl), validate(SdxlPreferenceConfig, given)))
    for name in ("diffusers", "kohya"):
        file = tmp_path / f"{name}.safetensors"
        if name == "kohya":
            export.save_kohya(model, 64.0, "base", file, sdxl.backbone)
        else:
            export.save_diffusers(export.adapter_state(model), model.peft_config["default"], file)
        assert near(outputs(from_diffusers(sdxl, file)), outputs(model)), name
