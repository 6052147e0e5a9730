"""Token counts with a tokenizer of words, whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.datasets.examples import Answered, CheckedRow
from prefmill.datasets.registry import DatasetKey
from prefmill.datasets.token_lengths import TokenCounter


class WordTokenizer:
    """A token a word; a turn costs one before and one after."""

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        turns = [f"<{turn['role']}> {turn['content']} <end>" for turn in messages]
        return " ".join([*turns, *(["<assistant>"] if add_generation_prompt else [])])

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [0] * len(text.split())}


class Patches:
    merge_size = 2

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        return height * width // 14**2


def example(prompt: str, *completions: str, images: tuple[str, ...] = ()) -> CheckedRow:
    key = DatasetKey("dpo", "vision" if images else "clean", "train")
    answers = tuple(Answered(text, text, 5.0) for text in completions)
    return CheckedRow(key, 1, "r", "p", prompt, answers, (), images, None, None)


def test_prompt_longest_completion_and_template(tmp_path: Path) -> None:
    counter = TokenCounter(WordTokenizer(), None, tmp_path)
    assert not counter.counts_images
    assert counter.count(example("one two three", "a", "a b c d")) == (1 + 3 + 1) + 1 + 4 + 1


def test_images_count_merged_patches_and_their_frame(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (56, 28)).save(tmp_path / "x.png")
    counter: Any = TokenCounter(WordTokenizer(), Patches(), tmp_path)
    assert counter.counts_images
    text = counter.count(example("one two", "a"))
    assert counter.count(example("one two <image>", "a", images=("x.png",))) == text + 8 // 4 + 2


@pytest.mark.parametrize("size", [(700, 1000), (100, 100), (2000, 50)])
@pytest.mark.slow
def test_image_tokens_are_those_of_the_real_processor(tmp_path: Path, size: tuple[int, int]) -> None:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 196, "longest_edge": 250880})
    image = Image.new("RGB", size)
    image.save(tmp_path / "x.png")
    counter = TokenCounter(WordTokenizer(), processor, tmp_path)
    plain, shown = example("one", "a"), example("one", "a", images=("x.png",))
    grid = processor(images=[image])["image_grid_thw"][0]
    assert counter.count(shown) - counter.count(plain) == int(grid[0] * grid[1] * grid[2]) // 4 + 2
