"""Prompts with images: tokens, positions, scores and gradients against one unpadded sequence at a time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prefmill.core.errors import InputError
from prefmill.families.causal import qwen_vision
from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.group_layout import add_images, encode_groups
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch
from prefmill.families.causal.vision import ImageReader, with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group, PreferencePair, group_by_prompt
from tests.tiny import sentence

SIZES = ((90, 40), (30, 120), (64, 64), (200, 80))


@pytest.fixture(scope="module")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prefmill.demo.tiny_models import build

    return build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, (width, height) in enumerate(SIZES):
        noise = random.Random(number).randbytes(width * height * 3)
        paths.append(str(folder / f"{number}.png"))
        Image.frombytes("RGB", (width, height), noise).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def reader(tiny_vl: Path) -> ImageReader:
    found = open_reader(str(tiny_vl), load_tokenizer(str(tiny_vl)), ImageLimits())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def groups(reader: ImageReader, pictures: list[str]) -> list[Group]:
    """Two images, none, one; three pairs of each prompt share responses."""
    images = [tuple(pictures[:2]), (), (pictures[2],)]
    pairs = [
        PreferencePair(
            f"g{n}p{index}", f"g{n}",
            with_images([{"role": "user", "content": sentence(n, 4) + "<image>" * len(paths) + sentence(9, 3)}], paths),
            sentence(50 + n, 5), sentence(70 + 10 * n + index, 3 + index), paths,
        )
        for n, paths in enumerate(images)
        for index in range(3)
    ]  # fmt: skip
    return group_by_prompt(pairs, reader.encode)


@pytest.fixture(autouse=True)
def norms_in_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers normalises in float32 whatever the model's dtype, which would hide what is compared here."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", forward)


def load(folder: Path, dtype: torch.dtype, layout: str | None = None) -> Any:
    model = load_model(str(folder), precision="fp32").to(dtype)
    if layout == "group":
        use_group_attention(model)
    return model if layout is None else patch_forward(model)


def one_at_a_time(model: Any, group: Group, response: list[int], reader: ImageReader) -> torch.Tensor:
    """The sum of log p over a response by transformers' own forward, which finds the positions itself."""
    ids = torch.tensor([group.prompt + response])
    given: dict[str, Any] = {"input_ids": ids}
    if group.images:
        given |= reader.inputs(group.images, ids)
    logits = model(**given).logits[0, len(group.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


def encoded(groups: list[Group], layout: str, reader: ImageReader) -> Any:
    parts = [GroupPart(index, tuple(range(len(group.pairs)))) for index, group in enumerate(groups)]
    if layout == "group":
        return add_images(encode_groups(groups, parts), groups, reader)
    return add_images(encode_pairwise(groups, parts, 0), [group for group in groups for _ in range(6)], reader)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("layout", ["group", "pairwise"])
def test_scores_and_gradients_equal_one_sequence_at_a_time(
    layout: str, dtype: torch.dtype, tolerance: float, tiny_vl: Path, groups: list[Group], reader: ImageReader
) -> None:
    plain = load(tiny_vl, dtype)
    sides = [
        group.responses[place] for group in groups for pair in group.pairs for place in (pair.chosen, pair.rejected)
    ]
    owners = [group for group in groups for _ in range(6)]
    expected = torch.stack([one_at_a_time(plain, *item, reader) for item in zip(owners, sides, strict=True)])
    (expected / 10).square().sum().backward()
    scored = load(tiny_vl, dtype, layout)
    batch = encoded(groups, layout, reader)
    scores = score_batch(scored, batch)
    found = torch.stack([scores[batch.chosen], scores[batch.rejected]], 1).flatten()
    (found / 10).square().sum().backward()
    assert (found - expected).abs().max() < tolerance * (1 if dtype == torch.float64 else expected.abs().max())
    for (name, left), right in zip(plain.named_parameters(), scored.parameters(), strict=True):
        if left.grad is None and name.startswith("model.visual"):
            continue
        assert (left.grad - right.grad).abs().max() <= tolerance * max(1.0, left.grad.abs().max()), name
        assert left.grad.abs().max() > 0 or "k_proj.bias" in name, name


def test_an_image_counts_in_the_scores(tiny_vl: Path, groups: list[Group], reader: ImageReader) -> None:
    model = load(tiny_vl, torch.float32, "group")
    batch = encoded(groups, "group", reader)
    before = score_batch(model, batch)
    batch.images["pixel_values"][: int(batch.images["image_grid_thw"][0].prod())] *= -1
    after = score_batch(model, batch)
    count = len(groups[0].responses)
    assert (before[:count] - after[:count]).abs().min() > 1e-4
    assert torch.equal(before[count:], after[count:])


def test_images_are_encoded_once_a_prompt(
    tiny_vl: Path, groups: list[Group], reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = qwen_vision._features

    def count(model: Any, images: dict[str, torch.Tensor]) -> Any:
        seen.append(len(images["image_grid_thw"]))
        return original(model, images)

    monkeypatch.setattr(qwen_vision, "_features", count)
    score_batch(load(tiny_vl, torch.float32, "group"), encoded(groups, "group", reader))
    assert seen == [3], "two images, none, one, whatever the number of responses"


def test_positions_are_those_of_transformers(tiny_vl: Path, groups: list[Group], reader: ImageReader) -> None:
    model = load(tiny_vl, torch.float32)
    for group in (groups[0], groups[2]):
        ids = torch.tensor([group.prompt + group.responses[0]])
        grids = torch.tensor([reader.grid(path) for path in group.images])
        expected, _ = model.model.get_rope_index(ids, (ids == reader.image_token).int(), image_grid_thw=grids)
        batch = encoded([group], "group", reader)
        end = len(group.prompt) + len(group.responses[0])
        assert torch.equal(batch.position_ids[:, :, :end], expected)


def test_grids_from_sizes_are_those_of_the_processor(reader: ImageReader, pictures: list[str]) -> None:
    assert [list(reader.grid(path)) for path in pictures] == reader.pixels(pictures)["image_grid_thw"].tolist()


def test_scores_of_pictures_read_by_an_earlier_decoder_are_not_taken(
    pictures: list[str], reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, without = reader.digest([pictures]), reader.digest([[]])
    monkeypatch.setattr("prefmill.families.causal.vision.DECODER", 0)
    assert reader.digest([pictures]) != before
    assert reader.digest([[]]) == without


def test_limits_replace_the_processors(tiny_vl: Path, pictures: list[str], reader: ImageReader, tmp_path: Path) -> None:
    small = open_reader(str(tiny_vl), load_tokenizer(str(tiny_vl)), ImageLimits(max_pixels=4 * 784))
    assert small is not None
    for path in pictures:
        assert small.num_tokens(small.grid(path)) <= 4
        assert list(small.grid(path)) == small.pixels([path])["image_grid_thw"][0].tolist()
    assert small.digest([pictures]) != reader.digest([pictures])
    small.save_pretrained(tmp_path)
    again = open_reader(str(tiny_vl), load_tokenizer(str(tiny_vl)), ImageLimits())
    assert again is not None
    assert again.grid(pictures[3]) == reader.grid(pictures[3])
    from transformers import AutoImageProcessor

    assert AutoImageProcessor.from_pretrained(tmp_path).size["longest_edge"] == 4 * 784


def test_prompts_have_as_many_tokens_as_transformers_processor_gives(
    tiny_vl: Path, groups: list[Group], reader: ImageReader, pictures: list[str]
) -> None:
    from prefmill.families.causal.vllm_loading import ImageTextProcessor

    text = f"{sentence(0, 4)}<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
    prompt = f"<|im_start|>user\n{text}{sentence(9, 3)}<|im_end|>\n<|im_start|>assistant\n"
    images = [Image.open(path) for path in pictures[:2]]
    assert (
        ImageTextProcessor.from_pretrained(str(tiny_vl))(text=[prompt], images=images)["input_ids"][0]
        == groups[0].prompt
    )


def test_without_images_the_vision_part_still_runs(tiny_vl: Path, groups: list[Group], reader: ImageReader) -> None:
    model = load(tiny_vl, torch.float32, "group")
    score_batch(model, encoded([groups[1]], "group", reader)).sum().backward()
    for name, parameter in model.model.visual.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


def test_activation_checkpointing_changes_nothing(tiny_vl: Path, groups: list[Group], reader: ImageReader) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(tiny_vl, torch.float64, "group")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        score_batch(model, encoded(groups, "group", reader)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert (left - right).abs().max() <= 1e-9 * max(1.0, left.abs().max())


def test_markers_and_images_must_agree(reader: ImageReader, pictures: list[str]) -> None:
    turns = [{"role": "user", "content": "a<image>b"}]
    assert with_images(turns, []) == turns
    with pytest.raises(InputError, match="more images than"):
        with_images(turns, pictures[:2])
    with pytest.raises(InputError, match="more image markers than"):
        with_images([{"role": "user", "content": "<image><image>"}], pictures[:1])
    with pytest.raises(InputError, match="the text contains image tokens"):
        reader.encode([{"role": "user", "content": "<|image_pad|>"}], "answer")
    with pytest.raises(InputError, match=r"missing image|not an image|damaged image"):
        reader.grid(str(Path(pictures[0]).parent / "none.png"))


def test_every_turn_of_a_chat_with_images_can_be_trained(reader: ImageReader, pictures: list[str]) -> None:
    said = [("user", "<image>Which?"), ("assistant", "a cat"), ("user", "And <image>?"), ("assistant", "a dog")]
    messages = with_images([{"role": role, "content": text} for role, text in said], pictures[:2])
    ids, trained = reader.encode_turns(messages, [1, 3])
    prompt, completion = reader.encode(messages[:-1], "a dog")
    assert ids == prompt + completion
    learnt = reader.tokenizer.decode([token for token, wanted in zip(ids, trained, strict=True) if wanted])
    assert learnt == "a cat<|im_end|>\na dog<|im_end|>\n"
    token = reader.tokenizer.decode([reader.image_token])
    with pytest.raises(InputError, match="the text contains image tokens"):
        reader.encode_turns([messages[0], {"role": "assistant", "content": token}], [1])
