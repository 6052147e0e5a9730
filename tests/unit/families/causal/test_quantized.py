"""Models in 8 or 4 bits, in the forms of the hub: read as the whole weights that they stand for, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from prefmill.core.errors import InputError
from prefmill.families.causal.loading import load_config, load_model
from prefmill.families.causal.quantized import require_trainable
from prefmill.training.publish import write_folder
from tests.tiny import save_tiny_qwen2
from tests.unit.training.test_adapter_start import margins, scores, train

Weights = dict[str, Tensor]
E4M3_MAX = 448.0
# The OCP microscaling formats (MX 1.0), E2M1: sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def compressed(format_: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


EIGHT = {"num_bits": 8, "type": "float", "symmetric": True}
COMPRESSED_FP8 = compressed(
    "float-quantized", {**EIGHT, "strategy": "channel"}, {**EIGHT, "strategy": "token", "dynamic": True}
)
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}


def in_blocks(key: str, weight: Tensor) -> tuple[Weights, Tensor]:
    """DeepSeek-V3's form: a scale for each block, by which the stored number is multiplied."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 16, 16, columns // 16, 16)
    scale = blocks.abs().amax((1, 3), keepdim=True) / E4M3_MAX
    stored = (blocks / scale).to(torch.float8_e4m3fn)
    whole = (stored.double() * scale.double()).reshape(weight.shape)
    return {key: stored.reshape(weight.shape), f"{key}_scale_inv": scale[:, 0, :, 0]}, whole


def by_channel(key: str, weight: Tensor) -> tuple[Weights, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {key: stored, f"{key}_scale": scale}, stored.double() * scale.double()


def packed(key: str, weight: Tensor) -> tuple[Weights, Tensor]:
    """Eight numbers of four bits, each 8 too high, in an int32 from its lowest bits on."""
    groups = weight.reshape(weight.shape[0], -1, 16)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    stored = (groups / scale).round().clamp(-8, 7)
    bits = (stored.reshape(weight.shape) + 8).long().reshape(weight.shape[0], -1, 8)
    words = (bits << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    parts = {f"{key}_packed": words, f"{key}_scale": scale[..., 0], f"{key}_shape": torch.tensor(weight.shape)}
    return parts, (stored.double() * scale.double()).reshape(weight.shape)


Form = tuple[dict[str, Any], Callable[[str, Tensor], tuple[Weights, Tensor]]]
FORMS: dict[str, Form] = {
    "fp8": (FP8, in_blocks),
    "compressed-fp8": (COMPRESSED_FP8, by_channel),
    "compressed-int4": (compressed("pack-quantized", INT4, None), packed),
}


def quantize(folder: Path, form: Form) -> Weights:
    """Store the linear layers of a model in `form`; returns all its weights as they then are, in float64."""
    said, store = form
    path = folder / "model.safetensors"
    given, stored, whole = load_file(path), {}, {}
    for key, weight in given.items():
        parts, truth = store(key, weight) if key.endswith("proj.weight") else ({key: weight}, weight.double())
        stored |= parts
        whole[key] = truth
    save_file({key: value.contiguous() for key, value in stored.items()}, path, metadata={"format": "pt"})
    say(folder, said)
    return whole


def say(folder: Path, quantization: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


def saved(folder: Path) -> Weights:
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors")


def needs_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: make vllm, which brings it")


class NoProcessor:
    def save_pretrained(self, folder: Path) -> None:
        """A model alone is saved here."""


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_eight_or_four_bits_is_read_and_saved_as_its_whole_weights(form: str, tmp_path: Path) -> None:
    """Activations are not rounded either: the forward is that of a model which only ever had these weights."""
    if form.startswith("compressed"):
        needs_compressed_tensors()
    whole = quantize(save_tiny_qwen2(tmp_path / "given"), FORMS[form])
    model = load_model(str(tmp_path / "given"), precision="fp32")
    assert {key: (value.double() - whole[key]).abs().max() < 1e-7 for key, value in model.state_dict().items()} == (
        dict.fromkeys(whole, True)
    )
    plain = AutoModelForCausalLM.from_config(model.config).eval()
    plain.load_state_dict({key: value.float() for key, value in whole.items()})
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-6)
    write_folder(model, NoProcessor(), tmp_path, "fp32", "")
    written = saved(tmp_path)
    assert written.keys() == whole.keys()
    assert all((written[key].double() - whole[key]).abs().max() < 1e-7 for key in whole)


def test_experts_in_fp8_are_read_and_saved_each_by_its_name(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).save_pretrained(tmp_path)
    whole = quantize(tmp_path, FORMS["fp8"])
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in whole
    write_folder(load_model(str(tmp_path), precision="fp32"), NoProcessor(), tmp_path / "out", "fp32", "")
    written = saved(tmp_path / "out")
    assert written.keys() == whole.keys()
    assert all((written[key].double() - whole[key]).abs().max() < 1e-7 for key in whole)


def test_the_experts_of_gpt_oss_are_multiplied_out(tmp_path: Path) -> None:
    """Blocks of 32 numbers, two in a byte from its low half on, and a power of two for each block."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    experts = {"intermediate_size": 32, "num_local_experts": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    GptOssForCausalLM(GptOssConfig(**sizes, **experts)).save_pretrained(tmp_path)
    path, torch_random = tmp_path / "model.safetensors", torch.Generator().manual_seed(5)
    stored, whole = load_file(path), {}
    for key in [key for key in stored if key.endswith(("gate_up_proj", "down_proj"))]:
        count, inner, outer = stored.pop(key).shape  # used as inputs x outputs, and stored the other way round
        blocks = torch.randint(256, (count, outer, inner // 32, 16), dtype=torch.uint8, generator=torch_random)
        scales = torch.randint(118, 126, (count, outer, inner // 32), dtype=torch.uint8, generator=torch_random)
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        numbers = torch.stack([E2M1[(blocks & 15).int()], E2M1[(blocks >> 4).int()]], -1).flatten(-2)
        scaled = numbers.double() * 2.0 ** (scales.double() - 127)[..., None]
        whole[key] = scaled.reshape(count, outer, inner).transpose(1, 2)
    save_file(stored, path, metadata={"format": "pt"})
    say(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.layers.*.self_attn"]})
    model = load_model(str(tmp_path), precision="fp32")
    write_folder(model, NoProcessor(), tmp_path / "out", "fp32", "")
    written = saved(tmp_path / "out")
    for key, value in whole.items():
        assert torch.equal(model.state_dict()[key].double(), value)
        assert torch.equal(written[key].double(), value)


@pytest.mark.slow
def test_training_on_fp8_starts_at_its_whole_weights_and_publishes_them(tmp_path: Path, pairs_file: Path) -> None:
    """The reference's scores against those of the plain folder, computed by transformers."""
    needs_compressed_tensors()
    start = save_tiny_qwen2(tmp_path / "start")
    whole = quantize(start, FORMS["compressed-fp8"])
    made = train(tmp_path / "on", pairs_file, model_name_or_path=str(start), lora=None, learning_rate=1e-9)
    plain = load_model(str(start), precision="fp32")
    write_folder(plain, NoProcessor(), start, "fp32", "")
    expected = scores(start, None, pairs_file)
    for row in margins(made):
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == pytest.approx(expected[row["pair_id"]], abs=1e-4)
    written = saved(made / "out")
    assert written.keys() == whole.keys()
    assert all((written[key].double() - whole[key]).abs().max() < 1e-6 for key in whole)


@pytest.mark.parametrize(
    ("said", "quantization", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, None, "gptq(.|\n)*before it was quantized"),
        ({"quant_method": "awq", "bits": 4}, "4bit", "awq(.|\n)*before it was quantized"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            None,
            "bitsandbytes(.|\n)*quantization=4bit",
        ),
        # Quantized already: merging and publishing need the weights before that.
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4bit", "bitsandbytes(.|\n)*before it was"),
        (FP8, "4bit", "leave quantization out"),
        ({"quant_method": "mxfp8"}, None, "mxfp8"),  # transformers reads it; held against nothing yet
        ({"bits": 4, "group_size": 64}, None, "none stated"),  # as MLX writes it
    ],
)
def test_training_refuses_what_would_stay_quantized(
    said: dict[str, Any], quantization: Any, told: str, tmp_path: Path
) -> None:
    config = configured(tmp_path, said)
    with pytest.raises(InputError, match=told):
        require_trainable(str(tmp_path), config, quantization)


def test_weights_that_are_read_whole_are_trained(tmp_path: Path) -> None:
    require_trainable("", configured(tmp_path, FP8), None)


def test_a_key_of_quantization_that_quantizes_nothing_is_left_out(tmp_path: Path) -> None:
    """compressed-tensors writes it beside whole weights: transformers fails on it with an AttributeError."""
    folder = save_tiny_qwen2(tmp_path / "m")
    whole = load_model(str(folder), precision="fp32")
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    require_trainable(str(folder), load_config(str(folder), None, False), None)
    found = load_model(str(folder), precision="fp32")
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in whole.state_dict().items())
    found.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_an_unknown_quantization_is_refused_where_transformers_skips_it(tmp_path: Path) -> None:
    configured(tmp_path, {"quant_method": "homemade"})
    with pytest.raises(InputError, match="homemade"):
        load_model(str(tmp_path), precision="fp32")


def configured(folder: Path, said: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    say(save_tiny_qwen2(folder), said)
    return AutoConfig.from_pretrained(folder)
