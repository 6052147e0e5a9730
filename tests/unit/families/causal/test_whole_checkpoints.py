"""A model whose files lack a weight, or mean other numbers than they hold, is refused where it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.layout import choose_layout
from prefmill.families.causal.loading import load_model, load_tokenizer, say_untied
from prefmill.families.causal.start_checks import check_start
from prefmill.training.finished import stored_precision
from stages.dpo import DpoConfig
from stages.sft import SftConfig
from tests.tiny import TEMPLATE, save_tiny_qwen2

Weights = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def another_layer(weights: Weights) -> Weights:
    """The last layer's weights as those of one more."""
    return {k.replace(".1.", ".2."): v.clone() for k, v in weights.items() if "layers.1." in k}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}, "layers.1.mlp.down_proj.weight: not in"),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "lm_head.weight: not in"),
        (lambda w: {f"renamed.{k}": v for k, v in w.items()}, "embed_tokens.weight: not in"),
        (lambda w: {**w, "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}, "weight_scale_inv: not read"),
        (lambda w: {**w, "lm_head.weight": torch.ones(3, 32)}, r"of shape \[3, 32\]"),
        # transformers lists these two in a table that people scroll past, and goes on without them.
        (lambda w: {**w, **another_layer(w)}, "layers.2.input_layernorm.weight: in the files, and config.json has no"),
        (lambda w: {**w, "model.layers.0.mlp.up_proj.bias": torch.ones(64)}, "up_proj.bias: in the files, and config"),
    ],
)
def test_weights_that_are_not_there_are_named(tmp_path: Path, change: Callable[[Weights], Weights], named: str) -> None:
    rewrite(save_tiny_qwen2(tmp_path), change)
    with pytest.raises(InputError, match=named):
        load_model(str(tmp_path), precision="fp32")


@pytest.fixture
def parted(tmp_path: Path) -> tuple[Path, Any]:
    """A model in several files, and itself."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_qwen2(tmp_path / "plain"))
    model.save_pretrained(tmp_path / "parted", max_shard_size="30KB")
    return tmp_path / "parted", model


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_weight_in_two_files_is_refused_where_they_differ(change: float, parted: tuple[Path, Any]) -> None:
    folder, model = parted
    extra = {"model.norm.weight": model.state_dict()["model.norm.weight"] + change}
    for file in folder.glob("model-*.safetensors"):
        save_file({**extra, **load_file(file)}, file, metadata={"format": "pt"})
    if change == 0.0:
        load_model(str(folder), precision="fp32")
        return
    with pytest.raises(InputError, match=r"different numbers for one weight(.|\n)*model.norm.weight"):
        load_model(str(folder), precision="fp32")


def test_a_model_saved_over_one_of_several_files_is_read(
    parted: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """transformers takes the older files away, and leaves their index."""
    folder, model = parted
    older = {file: file.read_bytes() for file in folder.glob("model-*.safetensors")}
    model.bfloat16().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    load_model(str(folder), precision="fp32")
    assert stored_precision(str(folder), None) == "bf16"
    assert "none of the files" not in caplog.text
    for file, content in older.items():
        file.write_bytes(content)
    load_model(str(folder), precision="fp32")
    assert "none of the files that model.safetensors.index.json names" in caplog.text


def test_a_tied_head_and_weights_that_nothing_reads_are_no_fault(tmp_path: Path) -> None:
    rewrite(save_tiny_qwen2(tmp_path), lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})
    rewrite(tmp_path, lambda w: {**w, "v_head.weight": torch.ones(1)})  # TRL's value head
    rewrite(tmp_path, lambda w: {**w, **another_layer(w)})
    configure(tmp_path, tie_word_embeddings=True, num_nextn_predict_layers=1)  # as GLM's, which guess further tokens
    model = load_model(str(tmp_path), precision="fp32")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", 7, None])
def test_weights_are_read_whatever_dtype_is_stated(tmp_path: Path, dtype: object) -> None:
    """`layout: auto` and the check of an attention built the model in it: a TypeError."""
    configure(save_tiny_qwen2(tmp_path), dtype=dtype)
    given = {"model_name_or_path": str(tmp_path), "dataset_file": "pairs.jsonl", "learning_rate": 1e-6}
    config = validate(DpoConfig, {**given, "attn_implementation": "eager"})
    check_start(str(tmp_path), config)
    assert choose_layout(validate(DpoConfig, given), str(tmp_path))[0].layout == "group"
    assert load_model(str(tmp_path), precision="bf16").dtype == torch.bfloat16


def test_files_that_cannot_be_read_name_what_to_do(tmp_path: Path) -> None:
    path = save_tiny_qwen2(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="folder is whole"):
        load_model(str(tmp_path), precision="fp32")
    for name, said in {
        "pytorch_model.bin": "model.safetensors; pytorch_model.bin is not read: pickles",
        "consolidated.safetensors": "consolidated.safetensors is not read",  # as Mistral has it
        "weights-q4.gguf": "weights-q4.gguf is not read",
    }.items():
        path = path.rename(tmp_path / name)
        with pytest.raises(InputError, match=said):
            load_model(str(tmp_path), precision="fp32")
    configure(tmp_path, num_hidden_layers=5)
    with pytest.raises(InputError, match="layer_types"):
        load_model(str(tmp_path), precision="fp32")


def read_all(folder: Path) -> None:
    """As sft does, in its order."""
    validate(SftConfig, {"model_name_or_path": str(folder), "dataset_file": "chats.jsonl"})
    load_tokenizer(str(folder))
    load_model(str(folder), precision="fp32")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        # transformers passes over the first two, and over the ends of answers in them.
        ("generation_config.json", '{"eos_token_id": [3, ', "generation_config.json again"),
        ("generation_config.json", "", "generation_config.json again"),
        ("generation_config.json", "[]", "generation_config.json again"),
        ("generation_config.json", '{"max_new_tokens": -5}', "cannot load generation_config.json"),
        ("generation_config.json", '{"eos_token_id": "<|im_end|>"}', "cannot load generation_config.json"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature is 'hot', expected 0 to"),
        ("generation_config.json", '{"do_sample": true, "temperature": NaN}', "temperature is nan"),
        ("generation_config.json", '{"top_p": 5}', "top_p is 5, expected 0 to 1"),
        ("generation_config.json", '{"top_k": "5"}', "top_k is '5'"),
        ("generation_config.json", '{"do_sample": "yes"}', "do_sample is 'yes', expected False to True"),
        ("config.json", "[]", "config.json again"),
        ("config.json", '{"model_type": "qwen2", "dtype": ["a"]}', "cannot load the tokenizer"),
        ("config.json", '{"model_type": "qwen2", "dtype": "float99"}', r"cannot load the (.|\n)*float99"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json again"),
        # transformers goes on without any word: sft trained on nothing but special tokens.
        ("tokenizer.json", None, "a tokenizer without words"),
        ("model.safetensors.index.json", "{}", "weight_map"),
        ("adapter_config.json", "[]", "no adapter"),
    ],
)
def test_a_file_of_a_folder_that_makes_no_sense_is_named(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    file = save_tiny_qwen2(tmp_path) / name
    file.unlink(missing_ok=True) if text is None else file.write_text(text)
    if name in ("model.safetensors.index.json", "adapter_config.json"):
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises((InputError, ConfigError), match=said):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"chat_template": TEMPLATE}, TEMPLATE),
        (
            {"chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "{{ 1 }}"}]},
            {"default": TEMPLATE, "rag": "{{ 1 }}"},
        ),
        ({"chat_template": [TEMPLATE]}, None),
        ([{"name": "default", "template": TEMPLATE}], None),
    ],
)  # fmt: skip
def test_a_template_that_processors_alone_look_for_is_read(said: object, read: object, tmp_path: Path) -> None:
    (save_tiny_qwen2(tmp_path) / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps(said))
    if read is not None:
        assert load_tokenizer(str(tmp_path)).chat_template == read
        return
    with pytest.raises(InputError, match=r"cannot load chat_template\.json(.|\n)*no chat_template that can be read"):
        load_tokenizer(str(tmp_path))


def test_an_attention_that_is_not_there_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    for attention in ("nonesuch", "flash_attention_2"):
        with pytest.raises(InputError, match=r"fix: +leave attn_implementation out"):
            load_model(str(save_tiny_qwen2(tmp_path)), precision="fp32", attn_implementation=attention)


def test_a_head_in_the_files_of_a_tied_model_is_published_as_its_own(tmp_path: Path) -> None:
    """transformers goes by the files, others by `tie_word_embeddings`: vLLM leaves such a head out (Qwen2's loader)."""
    configure(save_tiny_qwen2(tmp_path), tie_word_embeddings=True)
    model = load_model(str(tmp_path), precision="fp32")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.config.tie_word_embeddings is False
    rewrite(tmp_path, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})
    assert load_model(str(tmp_path), precision="fp32").config.tie_word_embeddings is True
    model.config = SimpleNamespace()
    say_untied(model)
    assert model.config == SimpleNamespace()  # mllama's has no such key


def test_a_folder_without_safetensors_has_no_precision_to_read_it_in(tmp_path: Path) -> None:
    """Where ranks share weights it is asked before loading says what is missing: that was a traceback."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert stored_precision(str(tmp_path), None) == "fp32"
