"""Token counts with a tokenizer of words, whose answers are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.core.errors import InputError
from prefmill.datasets.examples import Answered, CheckedRow
from prefmill.datasets.registry import DatasetKey
from prefmill.datasets.token_lengths import TokenCounter, open_counter


class WordTokenizer:
    """A token a word; a turn costs one before and one after."""

    is_fast = False

    def __len__(self) -> int:
        return 1

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        turns = [f"<{turn['role']}> {turn['content']} <end>" for turn in messages]
        return " ".join([*turns, *(["<assistant>"] if add_generation_prompt else [])])

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [0] * len(text.split())}


def example(prompt: str, *completions: str, images: tuple[str, ...] = ()) -> CheckedRow:
    key = DatasetKey("dpo", "vision" if images else "clean", "train")
    answers = tuple(Answered(text, text, 5.0) for text in completions)
    return CheckedRow(key, 1, "r", "p", prompt, answers, (), images, None, None)


def test_prompt_longest_completion_and_template(tmp_path: Path) -> None:
    counter = TokenCounter(WordTokenizer(), None, tmp_path)
    assert not counter.counts_images
    assert counter.count(example("one two three", "a", "a b c d")) == (1 + 3 + 1) + 1 + 4 + 1


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen2_5_vl"])
@pytest.mark.slow
def test_images_count_as_in_training(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    from prefmill.demo.tiny_models import build
    from prefmill.families.causal.image_limits import ImageLimits
    from prefmill.families.causal.loading import load_tokenizer
    from prefmill.families.causal.vision import with_images
    from prefmill.families.causal.vision_families import open_reader
    from tests.models.gemma import save_gemma

    model = str(build(kind, tmp_path / "m") if kind.startswith("qwen") else save_gemma(kind, tmp_path / "m"))
    Image.effect_noise((70, 40), 80).convert("RGB").save(tmp_path / "x.png")
    reader = open_reader(model, load_tokenizer(model), ImageLimits())
    assert reader is not None
    for asked, images in (("the data <image><image> of it", ("x.png", "x.png")), ("the data", ())):
        turns = with_images([{"role": "user", "content": asked}], [str(tmp_path / name) for name in images])
        prompt, completion = reader.encode(turns, "a good result")
        found = open_counter(model, tmp_path).count(example(asked, "bad", "a good result", images=images))
        assert found == len(prompt) + len(completion)


@pytest.mark.slow
def test_a_text_with_the_models_image_token_is_the_rows_fault(tmp_path: Path) -> None:
    from PIL import Image

    from tests.models.gemma import MARKS, save_gemma

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    counter = open_counter(str(save_gemma("gemma3", tmp_path / "m")), tmp_path)
    with pytest.raises(InputError, match="image tokens"):
        counter.count(example(f"<image> {MARKS['gemma3'][0]}", "a", images=("x.png",)))
