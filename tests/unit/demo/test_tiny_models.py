"""Tiny models: plain folders of the real architectures, reproducible, with tokenizers that lose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, CLIPProcessor

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.demo.text import Shape
from prefmill.demo.tiny_models import build, build_all
from prefmill.demo.tokenizer import learn_merges

NAMES = ["qwen2", "qwen2_5_vl", "masked_diffusion", "clip", "sdxl", "sd15", "sd3", "flux_dev", "flux_schnell"]
HOSTILE = "Ünïcode \U0001f600 <|im_start|> tabs\tand\x00nulls, \u202eright to left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert [path.name for path in build_all(folder, seed=0)] == NAMES
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_every_byte(folder: Path, tmp_path: Path, name: str) -> None:
    again = files(build(name, tmp_path / "again", seed=0))
    assert again == files(folder / name)
    assert any(key.endswith(".safetensors") for key in again)
    assert not any(key.endswith((".bin", ".pt", ".pkl")) for key in again)
    assert files(build(name, tmp_path / "other", seed=1)) != again


@pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl", "masked_diffusion"])
def test_a_chat_tokenizer_gives_every_text_back(folder: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    assert tokenizer.decode(tokenizer(HOSTILE)["input_ids"]) == HOSTILE
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.index("user\na") < text.index("assistant\nb") < text.rindex("<|im_end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_causal_model_is_causal_and_the_masked_one_looks_both_ways(folder: Path) -> None:
    for name, changes in (("qwen2", False), ("masked_diffusion", True)):
        model = AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="sdpa").eval()
        ids = torch.arange(10, 20)[None]
        later = ids.clone()
        later[0, -1] = 30
        with torch.no_grad():
            moved = (model(ids).logits[0, 0] - model(later).logits[0, 0]).abs().max().item()
        assert (moved > 1e-6) is changes, name


def test_the_vision_model_places_its_images(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig.from_pretrained(folder / "qwen2_5_vl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2_5_vl")
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    section = config.text_config.rope_parameters["mrope_section"]
    head = config.text_config.hidden_size // config.text_config.num_attention_heads
    assert 2 * sum(section) == head


def test_clip_scores_a_picture_and_a_caption(folder: Path) -> None:
    from PIL import Image

    processor, model = CLIPProcessor.from_pretrained(folder / "clip"), CLIPModel.from_pretrained(folder / "clip")
    given = processor(text=["a red square"], images=Image.new("RGB", (40, 30), "red"), return_tensors="pt")
    assert model(**given).logits_per_image.shape == (1, 1)


def test_merges_take_the_commonest_pair_and_ties_the_first_in_order() -> None:
    # "aab" x 3: aa (3), ab</w> (3): the tie goes to ('a', 'a'), then ('aa', 'b</w>').
    assert learn_merges({"aab": 3}, 5) == [("a", "a"), ("aa", "b</w>")]
    assert learn_merges({"ab": 1, "cb": 5}, 1) == [("c", "b</w>")]


def test_heads_must_divide() -> None:
    with pytest.raises(ConfigError, match="multiple of 2 x num_attention_heads"):
        validate(Shape, {"hidden_size": 36, "num_attention_heads": 4})
