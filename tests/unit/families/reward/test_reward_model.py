"""The reward model: a plain pretrained model whose rewards depend on the image and its prompt, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prefmill.core.errors import InputError
from prefmill.core.image_rows import HEADS
from prefmill.demo.tiny_models import build
from prefmill.families.causal.loading import loading
from prefmill.families.reward.data import PixelReader
from prefmill.families.reward.model import MultiHeadReward, create_reward
from prefmill.families.reward.scoring import score_images
from prefmill.families.reward.train import check_reward
from tests.threads import same_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learnt nothing, as train_reward would save it."""
    from transformers import CLIPModel, CLIPProcessor

    clip = build("clip", tmp_path_factory.mktemp("clip") / "clip")
    target = clip.parent / "reward"
    create_reward(CLIPModel.from_pretrained(clip), 16, 0).save_pretrained(target)
    CLIPProcessor.from_pretrained(clip).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of sizes and modes that files come in."""
    generator, paths = np.random.default_rng(0), []
    for number, (height, width, mode) in enumerate([(40, 60, "RGB"), (33, 33, "L"), (90, 20, "RGBA"), (8, 8, "RGB")]):
        image = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)
        paths.append(tmp_path_factory.mktemp("pictures") / f"{number}.png")
        image.save(paths[-1])
    return paths


def test_pictures_read_together_are_those_read_alone(folder: Path, pictures: list[Path]) -> None:
    from transformers import CLIPProcessor

    reader = PixelReader(CLIPProcessor.from_pretrained(folder))
    parts = [(path, box) for path in pictures for box in (None, (0.1, 0.2, 0.9, 1.0))]
    together = reader.read(parts)
    assert not torch.equal(together[0], together[1])
    for number, part in enumerate(parts):
        assert torch.equal(together[number], reader.read([part])[0])


@pytest.mark.parametrize("fault", [None, "dropout", "one prompt for all"])
def test_it_is_held_against_clips_own_forward(
    fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(build("clip", tmp_path / "clip"))
    clip.config.vision_config.attention_dropout = clip.config.text_config.attention_dropout = 0.5
    model = create_reward(clip, 16, 0)
    if fault == "dropout":
        monkeypatch.setattr("prefmill.families.reward.train.turn_off_dropout", lambda _: None)
    if fault == "one prompt for all":
        own = MultiHeadReward.forward
        monkeypatch.setattr(MultiHeadReward, "forward", lambda self, *given: own(self, *given[:3], given[3] * 0))
    if fault is None:
        check_reward(model, clip, "clip")
    else:
        with pytest.raises(InputError, match="does not compute what its CLIP says"):
            check_reward(model, clip, "clip")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_what_runs(attention: str, tmp_path: Path) -> None:
    """It was the library's own choice, whatever `attn_implementation` said."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(build("clip", tmp_path / "clip"), attn_implementation=attention)
    layers = [part for part in create_reward(clip, 16, 0).modules() if type(part).__name__ == "CLIPAttention"]
    assert layers
    assert {part.config._attn_implementation for part in layers} == {attention}


def test_it_is_saved_and_loaded_as_any_pretrained_model(folder: Path) -> None:
    from transformers import AutoModel

    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    model: Any = AutoModel.from_pretrained(folder)
    assert isinstance(model, MultiHeadReward)
    assert list(model.heads) == list(HEADS)
    again = MultiHeadReward.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert str(folder.parent) not in (folder / "config.json").read_text()


def test_the_backbone_is_the_one_given_and_the_heads_follow_from_the_seed(folder: Path) -> None:
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(folder.parent / "clip")
    one, same, other = (create_reward(clip, 16, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, one[f"clip.{name}"]) for name, value in clip.state_dict().items())
    assert all(torch.equal(one[name], same[name]) for name in one)
    heads = [name for name in one if name.startswith("heads") and name.endswith("weight")]
    assert len(heads) == 2 * len(HEADS)
    assert not any(torch.equal(one[name], other[name]) for name in heads)


def test_a_score_depends_on_image_and_prompt_and_not_on_the_batch(folder: Path, pictures: list[Path]) -> None:
    prompts = ["a boat", "a much longer prompt about boats in a harbour", "a boat", "a kite"]
    together = score_images(folder, prompts, pictures)
    assert together.shape == (4, len(HEADS))
    assert together.dtype == np.float32
    alone = np.concatenate([score_images(folder, [a], [b]) for a, b in zip(prompts, pictures, strict=True)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 1e-4
    assert np.abs(score_images(folder, ["a kite"], pictures[:1]) - together[:1]).max() > 1e-4
    assert score_images(folder, [], []).shape == (0, len(HEADS))


def test_temperatures_divide_the_scores(folder: Path, pictures: list[Path]) -> None:
    model: Any = MultiHeadReward.from_pretrained(folder)
    model.config.temperatures = [2.0, 1.0, 1.0, 1.0, 4.0]
    target = folder.parent / "calibrated"
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    plain, divided = (score_images(path, ["a boat"] * 4, pictures) for path in (folder, target))
    np.testing.assert_allclose(divided * [2.0, 1.0, 1.0, 1.0, 4.0], plain, rtol=1e-5)


def test_what_cannot_be_scored_is_named(folder: Path, tmp_path: Path, pictures: list[Path]) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(pictures[0].read_bytes()[:200])
    with pytest.raises(InputError, match=r"(damaged|not an) image[\s\S]*cut\.png"):
        score_images(folder, ["a boat"], [cut])
    with pytest.raises(InputError, match=r"missing image|not an image|damaged image"):
        score_images(folder, ["a boat"], [tmp_path / "absent.png"])
    with pytest.raises(InputError, match="no scorer of images here"):
        score_images(tmp_path, ["a boat"], pictures[:1])


@pytest.mark.parametrize("attention", ["nonesuch", "flash_attention_2"])
def test_an_attention_that_cannot_be_had_is_no_damaged_folder(tmp_path: Path, attention: str) -> None:
    """The advice was to download the model again, or to install with pip what the error does not call a package."""
    from transformers import CLIPConfig, CLIPModel

    with pytest.raises(InputError, match=r"fix: +leave attn_implementation out, or set"), loading("a model", tmp_path):
        CLIPModel._from_config(CLIPConfig(), attn_implementation=attention)


def test_gradients_are_the_same_bits_every_time_on_several_threads(tmp_path: Path) -> None:
    """The images of a prompt share its embedding, to which threads added their gradients in any order."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(build("clip", tmp_path / "clip"))
    model = create_reward(clip, 16, 0).train()
    prompts = torch.tensor([0] * 500 + [1] * 400 + [2] * 300 + [3] * 80)
    ids = torch.arange(4)[:, None] + torch.arange(5)
    side = clip.config.vision_config.image_size
    pixels = torch.randn(len(prompts), 3, side, side, generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(pixels, ids, torch.ones_like(ids), prompts).square().sum().backward()
        found: torch.Tensor = model.clip.text_projection.weight.grad
        return found

    assert same_bits(gradient, times=5)
