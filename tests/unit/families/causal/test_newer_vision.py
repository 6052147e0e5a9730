"""Images of Qwen3-VL, whose early layers take features too, and Qwen3.5, a hybrid: against one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.load_check import as_scorer
from prefmill.families.causal.loading import load_tokenizer
from prefmill.families.causal.scorer import score_batch
from prefmill.families.causal.vision import with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.training.data import PreferencePair, group_by_prompt
from tests.models.tiny_configs import tiny_config
from tests.tiny import sentence
from tests.unit.families.causal.test_kinds_of_layers import InFloat64, assert_same_gradients
from tests.unit.families.causal.test_vision import encoded, one_at_a_time

TYPES = ("qwen3_vl", "qwen3_5", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prefmill.demo.tiny_models import build

    return build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))


def model_of(model_type: str, tokenizer: Any, folder: Path, **text_keys: Any) -> Any:
    """A tiny model in float64, its folder with all that a reader needs."""
    config = tiny_config(model_type)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = (
        tokenizer.convert_tokens_to_ids(list(names))
    )
    for key, value in {"vocab_size": len(tokenizer), **text_keys}.items():
        setattr(config.text_config, key, value)
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = [0, 1]
    config.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 2048}).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).double().eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("layout", ["group", "pairwise"])
@pytest.mark.parametrize("model_type", TYPES)
def test_scores_and_gradients_with_images_equal_the_models_own(
    model_type: str, layout: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    import copy

    tokenizer = load_tokenizer(str(tokenizer_folder))
    plain = model_of(model_type, tokenizer, tmp_path)
    reader = open_reader(str(tmp_path), tokenizer, ImageLimits())
    assert reader is not None
    picture = str(tmp_path / "picture.png")
    Image.effect_noise((24, 40), 80).convert("RGB").save(picture)
    images = [(picture,), (), (picture, picture)]
    pairs = [
        PreferencePair(
            f"g{n}p{index}", f"g{n}",
            with_images([{"role": "user", "content": sentence(n, 3) + "<image>" * len(paths)}], paths),
            sentence(50 + n, 5), sentence(70 + 10 * n + index, 3 + index), paths,
        )
        for n, paths in enumerate(images)
        for index in range(3)
    ]  # fmt: skip
    groups = group_by_prompt(pairs, reader.encode)
    with InFloat64():
        scorer = as_scorer(copy.deepcopy(plain), layout, "tiny").train()
        batch = encoded(groups, layout, reader)
        scores = score_batch(scorer, batch)
        found = torch.stack([scores[batch.chosen], scores[batch.rejected]], 1).flatten()
        expected = torch.stack([
            one_at_a_time(plain, group, group.responses[place], reader)
            for group in groups for pair in group.pairs for place in (pair.chosen, pair.rejected)
        ])  # fmt: skip
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
        found.sum().backward()
        expected.sum().backward()
        assert_same_gradients(plain, scorer, 1e-8)
