"""An adapter's folder where a model is asked for: on its base, merged in fp32, as PEFT says; or refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.loading import load_config, load_model, load_tokenizer
from prefmill.families.causal.other_reference import reference_parts
from prefmill.families.causal.vllm_loading import open_vllm
from prefmill.training.preference_config import PreferenceConfig
from tests.unit.training.test_adapter_start import adapter

__all__ = ["adapter"]  # a fixture


def change(adapter: Path, folder: Path, **said: Any) -> Path:
    """A copy of the adapter with these keys in its configuration."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **said}))
    return folder


def peft_merged(base: Path, adapter: Path) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()


@pytest.mark.parametrize("said", [{}, {"auto_mapping": {"unsloth_fixed": True}, "peft_version": "0.15.2"}])
def test_an_adapter_is_loaded_on_its_base_and_merged_in_full_precision(
    said: dict[str, Any], adapter: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    import torch

    folder = change(adapter, tmp_path / "a", **said)
    expected = peft_merged(tiny_qwen2, adapter).eval()
    loaded = load_model(str(folder), precision="fp32", attn_implementation="eager").eval()
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(loaded(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5)
    half = load_model(str(folder), precision="bf16", attn_implementation="eager")
    rounded = {name: value.to(torch.bfloat16) for name, value in expected.state_dict().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in half.state_dict().items())
    assert half.config._attn_implementation == loaded.config._attn_implementation == "eager"
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32, "as transformers loads it"
    assert load_config(str(folder), None, False).model_type == "qwen2"


def test_its_chats_are_written_in_its_own_template(adapter: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = change(adapter, tmp_path / "a")
    assert load_tokenizer(str(folder)).chat_template == load_tokenizer(str(tiny_qwen2)).chat_template
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert load_tokenizer(str(folder)).chat_template == template
    more = load_tokenizer(str(tiny_qwen2))
    more.add_tokens(["<|tool|>"], special_tokens=True)
    more.save_pretrained(folder)
    with pytest.raises(InputError, match=r"other tokens than its base's(.|\n)*<\|tool\|>"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"peft_type": "IA3"}, "only plain LoRA"),
        ({"alora_invocation_tokens": [5]}, "only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "a base that was changed as its training began"),
        ({"base_model_name_or_path": "sha256:abc"}, "the folder above `adapter`"),
        ({"base_model_name_or_path": "/nowhere/model"}, "the base of this adapter is not here"),
        ({"base_model_name_or_path": None}, "not named"),
        ({"pickled": True}, "nothing else is loaded"),
        ({"base_model_name_or_path": "ANOTHER"}, "an adapter itself"),
    ],
)
def test_an_adapter_that_cannot_be_merged_here_is_refused(
    said: dict[str, Any], why: str, adapter: Path, tmp_path: Path
) -> None:
    other = {"base_model_name_or_path": str(adapter)} if "ANOTHER" in said.values() else {}
    folder = change(adapter, tmp_path / "a", **{**said, **other})
    if "pickled" in said:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for load in (load_tokenizer, load_config_of, load_fp32):
        with pytest.raises(InputError, match=why):
            load(str(folder))


def load_config_of(name: str) -> Any:
    return load_config(name, None, False)


def load_fp32(name: str) -> Any:
    return load_model(name, precision="fp32")


def test_a_reference_in_a_pickle_is_refused(adapter: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = change(adapter, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    config = validate(PreferenceConfig, {"model_name_or_path": str(tiny_qwen2), "ref_name": str(folder)})
    with pytest.raises(ConfigError, match="nothing else is loaded"):
        reference_parts(config)


@pytest.mark.slow
def test_vllm_is_told_the_command_that_merges(adapter: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    import torch

    folder = change(adapter, tmp_path / "an adapter")
    with pytest.raises(InputError, match="vLLM needs a whole model") as refused:
        open_vllm(
            str(folder), precision="fp32", revision=None, trust_remote_code=False, tensor_parallel_size=1,
            kv_cache_gb=None, enforce_eager=True,
        )  # fmt: skip
    fix = str(refused.value.details["fix"])
    command = shlex.split(fix.split(" and give it")[0])
    subprocess.run([sys.executable, *command[1:]], check=True, cwd=tmp_path)
    whole = load_model(str(tmp_path / "an adapter-merged"), precision="fp32")
    expected = load_model(str(folder), precision="fp32").state_dict()
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in whole.state_dict().items())
    load_tokenizer(str(tmp_path / "an adapter-merged"))
