"""A pipeline whose files lack a weight, and an adapter that is not read whole, are refused where they are loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl import export
from prefmill.families.sdxl.generator import ADAPTER_FILE, GeneratorSource, open_pipeline
from prefmill.families.sdxl.loading import open_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sdxl"
    build("sdxl", folder)
    return folder


@pytest.mark.parametrize(
    ("part", "key"), [("text_encoder", "layers.0"), ("unet", "conv_in"), ("vae", "decoder.conv_in")]
)
def test_a_part_that_lacks_a_weight_is_named(model: Path, tmp_path: Path, part: str, key: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    (file,) = (folder / part).glob("*.safetensors")
    save_file({name: value for name, value in load_file(file).items() if key not in name}, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"{part}(.|\\n)*not in the files"):
        open_pipeline(GeneratorSource(str(folder), "x", "fp32"))
    with pytest.raises(InputError, match=f"{part}(.|\\n)*not in the files"):
        open_folder(str(folder), None, None).load_pipeline()


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda key: key.replace("attn1", "attnX"), r"(\d+) pairs of factors and \1 magnitudes, places for (?!\1)"),
        (lambda key: None if "lora_B" in key else key, "that the file lacks"),
        (lambda key: key.replace("lora_magnitude_vector", "dora_scale"), "that the file lacks|places for"),
    ],
)
def test_an_adapter_that_finds_no_place_is_refused(
    model: Path, tmp_path: Path, rename: Callable[[str], str | None], named: str
) -> None:
    import peft

    unet = open_folder(str(model), None, None).load_denoiser("fp32")
    adapted = peft.get_peft_model(unet, peft.LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    state = export.adapter_state(adapted)
    for weights in (state, renamed(state, rename)):
        export.save_diffusers(weights, adapted.peft_config["default"], tmp_path / ADAPTER_FILE)
        source = GeneratorSource(str(model), "x", "fp32", adapter=tmp_path)
        if weights is state:
            open_pipeline(source)
            continue
        with pytest.raises(InputError, match=named):
            open_pipeline(source)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5])
def test_a_doras_scale_is_that_of_all_that_it_changes(model: Path, tmp_path: Path, scale: float) -> None:
    """Against W + scale (W' - W) of what diffusers merges: at 0 the magnitudes stayed, and with them another model."""
    import diffusers
    import peft

    unet = open_folder(str(model), None, None).load_denoiser("fp32")
    adapted = peft.get_peft_model(unet, peft.LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in filter(lambda value: value.requires_grad, adapted.parameters()):
            value += 0.1 * torch.randn_like(value)
    export.save_diffusers(export.adapter_state(adapted), adapted.peft_config["default"], tmp_path / ADAPTER_FILE)
    merged = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    before = {name: value.clone() for name, value in merged.unet.state_dict().items()}
    merged.load_lora_weights(tmp_path)
    merged.fuse_lora()
    merged.unload_lora_weights()
    after = merged.unet.state_dict()
    found = open_pipeline(GeneratorSource(str(model), "x", "fp32", adapter=tmp_path, adapter_scale=scale)).unet
    assert found.state_dict().keys() == before.keys()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, before[name] + scale * (after[name] - before[name]), rtol=0, atol=1e-6)
    assert max((after[name] - before[name]).abs().max() for name in before) > 0.1


def renamed(state: dict[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    return {name: value for key, value in state.items() if (name := rename(key))}
