"""Published scorers in their real forms, tiny and random, against transformers' own forward or plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_open_clip as open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.demo.tiny_models import build
from prefmill.families.reward.data import LabelledPair
from prefmill.families.reward.model import _say_cut
from prefmill.families.reward.open_clip import CONFIG_FILE
from prefmill.families.reward.published import MED_CONFIG, middle, open_published, whole
from prefmill.families.reward.scoring import open_scorer
from prefmill.families.reward.train import _count_cut, load_clip, load_processor
from stages.train_reward import TrainRewardConfig

PROMPTS = ["a red square on the left", "two green lines", "a blue circle"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its processor."""
    return build("clip", tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 40, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def seen(clip: Path, images: Sequence[Path], side: int | None = None) -> Tensor:
    """The pictures as CLIP's processor shows them; their middle is torchvision's where a `side` is given."""
    from transformers import CLIPProcessor

    shown = [Image.open(path).convert("RGB") for path in images]
    shown = shown if side is None else [middle(image, side) for image in shown]
    pixels: Tensor = CLIPProcessor.from_pretrained(clip).image_processor(images=shown, return_tensors="pt").pixel_values
    return pixels


def agrees(folder: Path, images: list[Path], expected: Tensor) -> None:
    """One column, in one batch or several, and no two scores alike."""
    for batch_size in (2, 16):
        found = open_scorer(folder, batch_size)(PROMPTS, images)
        assert found.shape == (len(PROMPTS), 1)
        np.testing.assert_allclose(found[:, 0], expected.numpy(), rtol=2e-5, atol=2e-6)
    assert len({round(value, 6) for value in expected.tolist()}) == len(PROMPTS)


def test_pickscore_is_clips_own_logit(clip: Path, images: list[Path]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    shown = [Image.open(path).convert("RGB") for path in images]
    given = CLIPProcessor.from_pretrained(clip)(text=PROMPTS, images=shown, padding=True, return_tensors="pt")
    with torch.no_grad():
        agrees(clip, images, CLIPModel.from_pretrained(clip).eval()(**given).logits_per_image.diagonal())


def whole_seen(clip: Path, path: Path, side: int) -> Tensor:
    """A picture as HPSv2's code shows it; `whole` is held to that code's numbers in test_scorers_inputs.py."""
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(clip).image_processor
    mean, std = (torch.tensor(of)[:, None, None] for of in (processor.image_mean, processor.image_std))
    return (whole(Image.open(path).convert("RGB"), side) - mean) / std


def test_hpsv2_is_open_clips_cosine(
    clip: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole picture: of those that are not square only the middle was scored."""
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(clip)
    for name, value in {"SIZE": 32, "CONTEXT": 77, "VOCAB": len(processor.tokenizer)}.items():
        monkeypatch.setattr(open_clip, name, value)
    config = json.loads(json.dumps(open_clip.CONFIG))
    config["vision_cfg"]["image_size"] = 32
    config["text_cfg"] |= {"context_length": 77, "vocab_size": len(processor.tokenizer)}
    state = open_clip.make_state()
    processor.save_pretrained(open_clip.write(tmp_path, config, state))
    tokens = processor.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    image, text = open_clip.by_hand(state, torch.stack([whole_seen(clip, path, 32) for path in images]), tokens)
    agrees(tmp_path, images, (normalize(image) * normalize(text)).sum(1))


def test_a_prompt_that_a_scorer_reads_in_part_is_told_once(
    clip: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    score = open_scorer(clip)
    _say_cut.cache_clear()
    for prompts, times in ((PROMPTS, 0), ([*PROMPTS[:2], "a red square " * 30], 1), (["a blue circle " * 30] * 3, 1)):
        score(prompts, images)
        assert caplog.text.count("prompts of more than 77 tokens") == times


def test_images_of_which_clip_sees_the_middle_alone_are_told(
    clip: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """40 x 32 pixels, of which people saw all: a fifth is left out."""
    Image.new("RGB", (32, 32)).save(images[0].parent / "square.png")
    pair = LabelledPair("a", "p", PROMPTS[0], images[0], images[0].parent / "square.png", (1.0,), 1.0, "train")
    assert _count_cut(load_processor(str(clip), None), [pair]) == {"num_cut_prompts": 0, "num_cut_images": 1}
    assert "1 of 2 images are not square, and CLIP sees their middle alone, by up to 20 %" in caplog.text
    (images[0].parent / "square.png").unlink()


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "AestheticsPredictorV1": lambda width: nn.Linear(width, 1),
    "AestheticsPredictorV2Linear": lambda width: nn.Sequential(
        nn.Linear(width, 12), nn.Dropout(0.2), nn.Linear(12, 6), nn.Dropout(0.2), nn.Linear(6, 1)
    ),
    "AestheticsPredictorV2ReLU": lambda width: nn.Sequential(
        nn.Linear(width, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_laions_aesthetics_predictors(name: str, clip: Path, images: list[Path], tmp_path: Path) -> None:
    """Of the middle as CLIP's own package cuts it, by torchvision: transformers' is a pixel aside where 11 are left."""
    from transformers import CLIPModel, CLIPProcessor, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    whole = CLIPModel.from_pretrained(clip)
    model = CLIPVisionModelWithProjection(whole.config.vision_config).eval()
    head = HEADS[name](whole.config.vision_config.projection_dim).eval()
    below = "predictor" if name.endswith("V1") else "layers"
    model.save_pretrained(tmp_path)
    state = {**model.state_dict(), **{f"{below}.{key}": value for key, value in head.state_dict().items()}}
    save_file(
        {key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    CLIPProcessor.from_pretrained(clip).image_processor.save_pretrained(tmp_path)
    with torch.no_grad():
        odd = [tmp_path / f"{number}.png" for number in range(len(images))]
        for path, file in zip(images, odd, strict=True):
            Image.open(path).resize((43, 32)).save(file)
        embeds = model(pixel_values=seen(clip, odd, 32)).image_embeds
        agrees(tmp_path, odd, head(embeds / embeds.norm(dim=-1, keepdim=True))[:, 0])


def blip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of a BLIP's towers turned back into those of ImageReward's file."""
    found = {}
    for name, value in state.items():
        if name.startswith("vision_model."):
            new = name.removeprefix("vision_model.")
            for ours, theirs in (
                ("encoder.layers.", "blocks."), ("self_attn.projection", "attn.proj"), ("self_attn.qkv", "attn.qkv"),
                ("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("post_layernorm", "norm"),
                ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
                ("embeddings.patch_embedding", "patch_embed.proj"),
            ):  # fmt: skip
                new = new.replace(ours, theirs)
            found[f"blip.visual_encoder.{new}"] = value
        elif name.startswith("text_encoder."):
            found[f"blip.{name}"] = value
    return found


def test_image_reward_is_blips_own_forward(clip: Path, images: list[Path], tmp_path: Path) -> None:
    """Its file has BLIP's names; transformers' BlipForImageTextRetrieval is the oracle."""
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocab = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = BertTokenizer(vocab=vocab)
    tokenizer.save_pretrained(tmp_path)
    med = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": len(vocab), "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "encoder_width": 128,
        "hidden_act": "gelu", "add_cross_attention": True, "type_vocab_size": 2, "pad_token_id": 0,
    }  # fmt: skip
    (tmp_path / MED_CONFIG).write_text(json.dumps(med))
    vision = {
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    torch.manual_seed(0)
    text = {**{key: value for key, value in med.items() if key != "encoder_width"}, "encoder_hidden_size": 128}
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape)
    mlp = nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 1)).eval()
    state = {
        **blip_names(model.state_dict()),
        **{f"mlp.layers.{key}": value for key, value in mlp.state_dict().items()},
    }
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "ImageReward.safetensors")
    given = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        out: Any = model(
            input_ids=given.input_ids, attention_mask=given.attention_mask, pixel_values=seen(clip, images)
        )
        made = mlp(out.question_embeds[:, 0])[:, 0]
    agrees(tmp_path, images, (made - 0.16717362830052426) / 1.0333394966054072)


def test_laions_clip_in_hugging_faces_form_starts_a_reward_model(clip: Path, tmp_path: Path) -> None:
    """LAION's folders hold both forms: transformers' own is read, and OpenCLIP's file need not be there."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip)
    model.save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": open_clip.CONFIG, "preprocess_cfg": {}}))
    loaded = load_clip(str(tmp_path), validate(TrainRewardConfig, {})).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda state: {k: v for k, v in state.items() if name not in k})


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def wordless(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def headless(folder: Path) -> None:
    """A vision tower as such, which is what an aesthetics predictor reads with."""
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection(CLIPModel.from_pretrained(folder).config.vision_config).save_pretrained(folder)


def legacy(folder: Path, **more: Any) -> None:
    """The image processor's settings in the form of OpenAI's own folders."""
    said = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    del said["image_processor_type"]
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps({**said, **old, **more}))
    (folder / "processor_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # transformers draws what is missing, or reads a prompt as unknown words: other scores at every call.
        (without("text_projection"), "text_projection.weight: not in the files"),
        (without("text_model"), "not in the files"),
        (lambda folder: rewritten(folder, lambda s: {f"model.{k}": v for k, v in s.items()}), "not in the files"),
        (lambda folder: rewritten(folder, lambda s: {k: v[:-1] if v.dim() else v for k, v in s.items()}), "of shape"),
        (wordless, "a tokenizer without words"),
        # The embedding's first number was the score.
        (headless, r"no scorer of images here[\s\S]*no layers to one score"),
        (cut, "cannot load the scorer"),
        # Compared, NaN lost every time.
        (lambda folder: rewritten(folder, lambda s: {k: v / 0 * 0 if "scale" in k else v for k, v in s.items()}),
         "a score that is no number"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load the scorer"),
        # Of a CLIP that sees 64 pixels, and one that lets pictures keep their shape: tracebacks at the first picture.
        (lambda folder: legacy(folder, size=64, crop_size=64), r"another model[\s\S]*64 x 64[\s\S]*: 32 x 32"),
        (lambda folder: legacy(folder, do_center_crop=False), r"another model[\s\S]*64 x 32[\s\S]*: 32 x 32"),
    ],
)  # fmt: skip
def test_a_scorer_that_is_not_whole_never_scores(
    change: Callable[[Path], object], said: str, clip: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "scorer"))
    open_scorer(folder)(PROMPTS, images)
    change(folder)
    with pytest.raises(InputError, match=said):
        open_scorer(folder)(PROMPTS, images)


def test_settings_of_older_transformers_are_read(clip: Path, images: list[Path], tmp_path: Path) -> None:
    """Sizes as numbers, a class that is gone, a tokenizer that does not say its length."""
    folder = Path(shutil.copytree(clip, tmp_path / "scorer"))
    legacy(folder, image_processor_type="CLIPFeatureExtractor")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "model_max_length": None}))
    agrees(folder, images, torch.from_numpy(open_scorer(clip)(PROMPTS, images)[:, 0]))


def test_a_reward_model_is_not_trained_with_a_tokenizer_that_knows_no_word(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    wordless(folder)
    with pytest.raises(InputError, match="a tokenizer without words"):
        load_processor(str(folder), None)


def test_what_is_no_scorer_is_said(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    with pytest.raises(InputError, match=r"no scorer of images here[\s\S]*no config.json"):
        open_published(tmp_path, "cpu")
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="no image processor beside the scorer"):
        open_published(tmp_path / "bare", "cpu")
    (tmp_path / "image_reward").mkdir()
    (tmp_path / "image_reward" / MED_CONFIG).write_text("{}")
    with pytest.raises(InputError, match=r"no safetensors of this scorer[\s\S]*ImageReward.safetensors"):
        open_published(tmp_path / "image_reward", "cpu")
    # As they are published, by their own names.
    for name, said in (("HPS_v2.1_compressed.pt", ""), ("pytorch_model.bin", '{"model_type": "clip"}')):
        made = tmp_path / name.partition(".")[0]
        made.mkdir()
        (made / name).write_bytes(b"")
        if said:
            (made / "config.json").write_text(said)
        with pytest.raises(InputError, match=r"expected: model.safetensors" if said else name):
            open_published(made, "cpu")
