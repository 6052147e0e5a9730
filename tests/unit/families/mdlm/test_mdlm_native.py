"""Published masked-diffusion models through transformers' own modules: the published code's logits, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefmill.core.errors import InputError
from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of, predicts_next
from prefmill.families.mdlm.native import MODELS, LladaConfig
from tests.conftest import REPOSITORY
from tests.tiny import save_tiny_qwen2
from tests.unit.families.mdlm.test_mdlm_kin import check_adapter

PUBLISHED = REPOSITORY.parent / "shared" / "data" / "mdlm"
NAMES = ("llada-tiny", "dream-tiny")


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    path = PUBLISHED / request.param
    if not path.is_dir():
        pytest.skip("needs the tiny models in published form beside the checkout (shared/data/mdlm)")
    return path


def test_logits_are_the_published_codes(folder: Path) -> None:
    model, oracle = load_diffusion_model(str(folder), precision="fp32"), load_file(folder / "oracle.safetensors")
    with torch.no_grad():
        logits = model.double()(input_ids=oracle["input_ids"], use_cache=False).logits
    assert (logits - oracle["logits"]).abs().max() < 1e-9


def test_an_adapter_is_put_on_whole_and_merged(folder: Path, tmp_path: Path) -> None:
    check_adapter(folder, tmp_path)


def test_the_saved_folder_has_the_published_names_weights_and_keys(folder: Path, tmp_path: Path) -> None:
    load_diffusion_model(str(folder), precision="fp32").save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    keys, saved = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    differing = {key for key in keys.keys() | saved.keys() if keys.get(key) != saved.get(key)}
    assert differing <= {"dtype", "transformers_version"}
    again = load_diffusion_model(str(tmp_path), precision="fp32")
    assert all(torch.equal(value, before[name]) for name, value in _published(again).items())


def test_eight_bits_are_read_whole_and_saved_under_the_published_names_or_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    copy.chmod(0o755)  # the original is closed to all but root
    # DeepSeek's form, scales of blocks; 1 x 1, as the tiny layers divide by nothing else.
    before = {key: value.float() for key, value in load_file(copy / "model.safetensors").items()}
    scaled = {key: value for key, value in before.items() if value.ndim == 2 and "proj" in key}
    eight = {key: (value / 2).to(torch.float8_e4m3fn) for key, value in scaled.items()}
    scales = {f"{key}_scale_inv": torch.full(value.shape, 2.0) for key, value in scaled.items()}
    save_file({**before, **eight, **scales}, copy / "model.safetensors", metadata={"format": "pt"})
    keys = json.loads((copy / "config.json").read_text())
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [1, 1]}
    (copy / "config.json").write_text(json.dumps({**keys, "quantization_config": said}))
    if folder.name == "llada-tiny":  # transformers renames its weights, and not their scales
        with pytest.raises(InputError, match="weights that are not quantized"):
            load_diffusion_model(str(copy), precision="fp32")
        return
    load_diffusion_model(str(copy), precision="fp32").save_pretrained(tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert scaled
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], eight[key].float() * 2 if key in eight else before[key]) for key in before)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def _published(model: Any) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    weights: dict[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    return weights


def test_mask_and_shift_are_known(folder: Path) -> None:
    model, tokenizer = load_diffusion_model(str(folder), precision="fp32"), load_diffusion_tokenizer(str(folder))
    assert mask_token_of(model, tokenizer) == model.config.mask_token_id
    assert predicts_next(model) == (folder.name == "dream-tiny")


@pytest.mark.parametrize("model_type", ["a2d-qwen2", "a2d-qwen3"])
def test_converted_models_attend_both_ways_and_come_back_under_their_name(model_type: str, tmp_path: Path) -> None:
    ((config, model),) = ((config, model) for config, model in MODELS if config.model_type == model_type)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    keys = {**small, "model_type": model_type, "vocab_size": 32, "num_key_value_heads": 2, "mask_token_id": 5}
    model(config.from_dict(keys)).save_pretrained(tmp_path)
    loaded = load_diffusion_model(str(tmp_path), precision="fp32")
    assert loaded.config.model_type == model_type
    assert json.loads((tmp_path / "config.json").read_text()).items() >= keys.items()


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "phi3", "gpt2"])
def test_a_causal_model_is_refused_whatever_its_family(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    size = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    own = {"intermediate_size": 16, "num_key_value_heads": 2} if model_type != "gpt2" else {}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **size, **own)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="earlier tokens only"):
        load_diffusion_model(str(tmp_path), precision="fp32")


def test_a_llada_of_another_build_is_refused_by_its_key() -> None:
    with pytest.raises(InputError, match="alibi: True"):
        LladaConfig.from_dict({"model_type": "llada", "alibi": True})


CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own_code"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(16, 8)
        self.head = torch.nn.Linear(8, 16)
        BUFFER
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        hidden = self.embed(input_ids)
        return CausalLMOutput(logits=self.head(hidden + hidden.mean(1, keepdim=True)))
"""


@pytest.mark.parametrize("buffer", ["", 'self.register_buffer("scale", torch.ones(4), persistent=False)'])
def test_a_buffer_that_nothing_sets_is_found(buffer: str, tmp_path: Path) -> None:
    """transformers builds a model without memory: what its own code computed into a buffer is gone."""
    from safetensors.torch import save_file

    (tmp_path / "modeling_own.py").write_text(CODE.replace("BUFFER", buffer or "pass"))
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own_code", "auto_map": auto}))
    torch.manual_seed(0)
    weights = {"embed.weight": torch.randn(16, 8), "head.weight": torch.randn(16, 8), "head.bias": torch.zeros(16)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if not buffer:
        assert (
            load_diffusion_model(str(tmp_path), precision="fp32", trust_remote_code=True).config.model_type
            == "own_code"
        )
        return
    with pytest.raises(InputError, match="not whole after loading") as caught:
        load_diffusion_model(str(tmp_path), precision="fp32", trust_remote_code=True)
    assert "scale" in str(caught.value)


@pytest.mark.parametrize("fault", ["cut off", "of shape"])
def test_weights_that_cannot_be_read_name_the_folder(fault: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save_tiny_qwen2(tmp_path / "m")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(
        {**weights, "model.norm.weight": weights["model.norm.weight"][:7].clone()}, file, metadata={"format": "pt"}
    )
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-999])
    with pytest.raises(InputError, match=str(folder)):
        load_diffusion_model(str(folder), precision="fp32")


def test_a_weight_that_the_files_lack_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = PUBLISHED / "llada-tiny"
    if not source.is_dir():
        pytest.skip("needs the tiny models in published form beside the checkout (shared/data/mdlm)")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    del weights["model.transformer.ln_f.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_diffusion_model(str(tmp_path), precision="fp32")
