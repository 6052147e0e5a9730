"""Images of Gemma 3 and 4, whose tokens see each other both ways: against the model's own forward, row by row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal import group_attention
from prefmill.families.causal.chat import end_token_ids, prompt_text
from prefmill.families.causal.generation import Sampling, encode_prompts, generate_batch
from prefmill.families.causal.image_limits import FrozenParts, ImageLimits
from prefmill.families.causal.load_check import as_scorer
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.scorer import score_batch
from prefmill.families.causal.vision import ImageReader, with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.families.causal.vision_parts import freeze
from prefmill.training.data import Group, PreferencePair, group_by_prompt
from tests.models.gemma import save_gemma
from tests.tiny import sentence
from tests.unit.families.causal.test_kinds_of_layers import InFloat64, assert_same_gradients
from tests.unit.families.causal.test_vision import encoded, one_at_a_time

# A window shorter than the prompts; Gemma 4's large models look both ways, its small ones embed by layer.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {"sliding_window": 12}),
    "gemma4": ("gemma4", {"sliding_window": 12, "use_bidirectional_attention": "vision"}),
    "gemma4 small": ("gemma4", {"sliding_window": 12, "hidden_size_per_layer_input": 8}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, keys = KINDS[request.param]
    return save_gemma(model_type, tmp_path_factory.mktemp(request.param.replace(" ", "_")), **keys)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = []
    for number, size in enumerate([(24, 40), (50, 20)]):
        paths.append(str(tmp_path_factory.mktemp("pictures") / f"{number}.png"))
        Image.effect_noise(size, 80).convert("RGB").save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def reader(folder: Path) -> ImageReader:
    found = open_reader(str(folder), load_tokenizer(str(folder)), ImageLimits())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def groups(reader: ImageReader, pictures: list[str]) -> list[Group]:
    pairs = [
        PreferencePair(
            f"g{n}p{index}", f"g{n}",
            with_images([{"role": "user", "content": sentence(n, 3) + "<image>" * len(paths) + sentence(9, 2)}], paths),
            sentence(50 + n, 5), sentence(70 + 10 * n + index, 9 + index), paths,
        )
        for n, paths in enumerate([(pictures[0],), (), tuple(pictures)])
        for index in range(3)
    ]  # fmt: skip
    return group_by_prompt(pairs, reader.encode)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are cut into several blocks of queries, some in the midst of an image."""
    monkeypatch.setattr(group_attention, "_QUERIES_AT_ONCE", 4)


def in_float64(folder: Path) -> Any:
    model = load_model(str(folder), precision="fp32").double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.double()
    return model


def expected_of(model: Any, groups: list[Group], reader: ImageReader) -> torch.Tensor:
    return torch.stack([
        one_at_a_time(model, group, group.responses[place], reader)
        for group in groups for pair in group.pairs for place in (pair.chosen, pair.rejected)
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["group", "pairwise"])
def test_scores_and_gradients_equal_the_models_own(
    layout: str, folder: Path, groups: list[Group], reader: ImageReader
) -> None:
    with InFloat64():
        plain = in_float64(folder)
        scorer = as_scorer(copy.deepcopy(plain), layout, "tiny").train()
        batch = encoded(groups, layout, reader)
        scores = score_batch(scorer, batch)
        found = torch.stack([scores[batch.chosen], scores[batch.rejected]], 1).flatten()
        expected = expected_of(plain, groups, reader)
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
        found.sum().backward()
        expected.sum().backward()
        assert_same_gradients(plain, scorer, 1e-8)


def test_prompts_and_pixels_are_those_of_the_models_processor(
    folder: Path, reader: ImageReader, pictures: list[str]
) -> None:
    said = f"<image>{sentence(1, 2)}<image>"
    messages = with_images([{"role": "user", "content": said}], pictures)
    images = [Image.open(path) for path in pictures]
    if reader.config.model_type == "gemma3":
        processor = Gemma3Processor.from_pretrained(folder)
        text = prompt_text(reader.tokenizer, messages)
        given = processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
        assert given["input_ids"][0].tolist() == reader.encode_prompt(messages)
        assert "\n\n\n" in reader.tokenizer.convert_ids_to_tokens(given["input_ids"][0]), "the case that needs the text"
        assert given["token_type_ids"][0].sum() == 2 * reader.config.mm_tokens_per_image
    else:  # its own needs torchvision, for videos
        given = reader.processor(images, return_tensors="pt")
        counts = [reader.written(path).count("<|image|>") for path in pictures]
        assert counts == list(given["num_soft_tokens_per_image"])
    assert torch.equal(reader.pixels(pictures)["pixel_values"], given["pixel_values"])


def greedy(model: Any, reader: ImageReader, ids: list[int], images: Sequence[str], count: int) -> str:
    """The likeliest tokens by the model's own forward on the whole row, without a cache."""
    start, ends = len(ids), end_token_ids(model.generation_config, reader.tokenizer)
    for _ in range(count):
        row = torch.tensor([ids])
        with torch.no_grad():
            ids.append(int(model(input_ids=row, **reader.inputs(images, row)).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    answered = [token for token in ids[start:] if token not in ends]
    return str(reader.tokenizer.decode(answered, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_answers_are_generated_as_one_at_a_time(folder: Path, reader: ImageReader, pictures: list[str]) -> None:
    chats = {
        str(n): with_images([{"role": "user", "content": sentence(n, 3 + n) + "<image>" * n}], pictures[:n])
        for n in range(3)
    }
    model = load_model(str(folder), precision="fp32")
    requests = encode_prompts(reader.tokenizer, chats, 1, reader)
    found = generate_batch(model, reader.tokenizer, requests, Sampling(6, 0.0, 1.0, 0), reader)
    for request, answer in zip(requests, found, strict=True):
        assert answer["text"] == greedy(model, reader, list(request.prompt_ids), request.images, 6)


def test_image_tokens_in_texts_are_refused(reader: ImageReader, pictures: list[str]) -> None:
    for token in {reader.placeholder, reader.tokenizer.convert_ids_to_tokens(reader.image_token)}:
        with pytest.raises(InputError, match="the text contains image tokens"):
            reader.encode_prompt(with_images([{"role": "user", "content": f"<image>{token}"}], pictures[:1]))


def test_bounds_and_vllm_and_flash_are_refused(folder: Path, reader: ImageReader) -> None:
    with pytest.raises(ConfigError, match="size of their own"):
        open_reader(str(folder), reader.tokenizer, ImageLimits(max_pixels=784))
    with pytest.raises(ConfigError, match="not given to vLLM"):
        _ = reader.vllm_options
    model = load_model(str(folder), precision="fp32")
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    if "small" not in folder.name:
        with pytest.raises(ConfigError, match="only those before them"):
            freeze(model, FrozenParts(), with_images=True)
    else:  # causal throughout
        freeze(model, FrozenParts(), with_images=True)
    freeze(model, FrozenParts(), with_images=False)
