"""Images of Gemma 3 and 4, whose tokens see each other both ways: against the model's own forward, row by row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal import group_attention
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.load_check import as_scorer
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.scorer import score_batch
from prefmill.families.causal.vision import ImageReader, open_reader, with_images
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
    return save_gemma(model_type, tmp_path_factory.mktemp("gemma"), **keys)


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
        for index in range(2)
    ]  # fmt: skip
    return group_by_prompt(pairs, reader.encode)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prompts are cut into several blocks of queries, some in the midst of an image."""
    monkeypatch.setattr(group_attention, "_QUERIES_AT_ONCE", 4)
    yield


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


@pytest.mark.parametrize("layout", ["group", "pairwise"])
def test_scores_and_gradients_equal_the_models_own(
    layout: str, folder: Path, groups: list[Group], reader: ImageReader
) -> None:
    with InFloat64():
        plain = in_float64(folder)
        scorer = as_scorer(copy.deepcopy(plain), layout, "tiny").train()
        batch = encoded_of(groups, layout, reader)
        scores = score_batch(scorer, batch)
        found = torch.stack([scores[batch.chosen], scores[batch.rejected]], 1).flatten()
        expected = expected_of(plain, groups, reader)
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
        found.sum().backward()
        expected.sum().backward()
        assert_same_gradients(plain, scorer, 1e-8)


def encoded_of(groups: list[Group], layout: str, reader: ImageReader) -> Any:
    from prefmill.families.causal.group_layout import encode_groups
    from prefmill.families.causal.image_batches import add_images
    from prefmill.families.causal.scorer import encode_pairwise
    from prefmill.training.batches import GroupPart

    parts = [GroupPart(index, tuple(range(len(group.pairs)))) for index, group in enumerate(groups)]
    if layout == "group":
        return add_images(encode_groups(groups, parts), groups, reader)
    return add_images(encode_pairwise(groups, parts, 0), [group for group in groups for _ in range(4)], reader)
