"""Published scorers by folder, one score per image and prompt: PickScore, HPSv2, ImageReward, LAION's aesthetics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from prefmill.core.errors import InputError
from prefmill.families.causal.loading import loading
from prefmill.families.causal.whole import read_whole, require_vocabulary
from prefmill.families.reward.model import encode, open_processor, require_size, tell_cut
from prefmill.families.reward.open_clip import as_open_clip_reads, is_open_clip, load_open_clip

Scorer = Callable[[Sequence[str], Sequence[Image]], Tensor]
"""From B prompts and images to their scores, [B] fp32."""

WEIGHTS, IMAGE_REWARD, MED_CONFIG = "model.safetensors", "ImageReward.safetensors", "med_config.json"
# The mean and spread of its raw scores, by which ImageReward.py brings them to about N(0, 1).
_MEAN, _SPREAD = 0.16717362830052426, 1.0333394966054072
_MAX_TOKENS = 35  # ImageReward's
_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}  # as they are published; none is opened
_VISION = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
           "patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}  # fmt: skip
_OF_A_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv",
               "attn.proj": "self_attn.projection"}  # fmt: skip


def open_published(folder: Path, device: str) -> Scorer:
    """The scorer in `folder`, found from its files; raises InputError where it is none of those above, or not whole."""
    with loading("the scorer", folder):
        return _opened(folder, device)


def _opened(folder: Path, device: str) -> Scorer:
    if (folder / MED_CONFIG).is_file():
        return _image_reward(folder, device)
    if is_open_clip(str(folder)):
        return _hps(folder, device)
    said = json.loads((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}
    opened = {"clip": _pick_score, "clip_vision_model": _aesthetics}.get(said.get("model_type", ""))
    if opened is None:
        files = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
        raise InputError(
            "no scorer of images here", where=folder,
            got=", ".join([said.get("model_type", "no config.json"), *files]),
            expected="train_reward's output, or PickScore, HPSv2, ImageReward or an aesthetics predictor",
            fix="give such a folder with the files that docs/stages/evaluate_images.md lists under Published scorers; "
            "weights in a pickle are converted once, with save_file of safetensors.torch",
        )  # fmt: skip
    return opened(folder, device)


def _pick_score(folder: Path, device: str) -> Scorer:
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569, eq. 1) and any CLIP: e^T cos(image, text)."""
    from transformers import CLIPModel

    if not any(folder.glob("*.safetensors")):
        _weights(folder, WEIGHTS)
    model = read_whole(CLIPModel, str(folder), dtype=torch.float32)
    return _clip(model, folder, device, model.logit_scale.exp().item())


def _hps(folder: Path, device: str) -> Scorer:
    """HPSv2 (Wu et al. 2023, arXiv 2306.09341): OpenCLIP's cos(image, text), the image whole on a black square."""
    model = load_open_clip(folder)
    score, side = _clip(model, folder, device, 1.0, pixels_are_made=True), model.config.vision_config.image_size

    def shown_whole(prompts: Sequence[str], images: Sequence[Image]) -> Tensor:
        return score([*map(as_open_clip_reads, prompts)], [whole(image, side) for image in images])

    return shown_whole


def _clip(
    model: Any, folder: Path, device: str, scale: float, pixels_are_made: bool = False
) -> Callable[[Sequence[str], Sequence[Any]], Tensor]:  # fmt: skip
    processor, model = open_processor(_require_processor(folder)), model.to(device).eval()
    images_of = processor.image_processor
    require_size(images_of, model.config, folder)
    if pixels_are_made:
        images_of.do_resize = images_of.do_center_crop = images_of.do_rescale = False

    def score(prompts: Sequence[str], images: Sequence[Any]) -> Tensor:
        batch = {name: value.to(device) for name, value in encode(processor, prompts, images).items()}
        seen = model.get_image_features(pixel_values=batch.pop("pixel_values")).pooler_output
        return scale * (normalize(seen) * normalize(model.get_text_features(**batch).pooler_output)).sum(1)

    return score


def _aesthetics(folder: Path, device: str) -> Scorer:
    """LAION's aesthetics predictors in Hugging Face's form: linear layers on CLIP's unit embedding; prompts are unread.

    Version 1 has one (`predictor`), version 2 several (`layers`), with a ReLU between them where its class says so.
    """
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = read_whole(CLIPVisionModelWithProjection, str(folder), dtype=torch.float32)
    state, said = load_file(_weights(folder, WEIGHTS)), json.loads((folder / "config.json").read_bytes())
    relu = any("ReLU" in name for name in said.get("architectures") or ())
    name = "predictor" if "predictor.weight" in state else "layers"
    head, model = linear_layers(state, name, relu).to(device), model.to(device).eval()
    images_of = CLIPImageProcessorPil.from_pretrained(_require_processor(folder))
    require_size(images_of, model.config, folder)

    def score(prompts: Sequence[str], images: Sequence[Image]) -> Tensor:
        shown = [middle(image, model.config.image_size) for image in images]  # CLIP's own package cuts as torchvision
        pixels = images_of(images=shown, return_tensors="pt")["pixel_values"].to(device)
        found: Tensor = head(normalize(model(pixel_values=pixels).image_embeds))[:, 0]
        return found

    return score


def _image_reward(folder: Path, device: str) -> Scorer:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): an MLP on BLIP's reading of the prompt."""
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    state = load_file(_weights(folder, IMAGE_REWARD))
    seen, read = blip_vision(_below(state, "blip.visual_encoder.")), _below(state, "blip.text_encoder.")
    width, patch = seen["embeddings.class_embedding"].shape[-1], seen["embeddings.patch_embedding.weight"].shape[-1]
    side = patch * round((seen["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    blocks = 1 + max(int(name.split(".")[2]) for name in seen if name.startswith("encoder.layers."))
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=width, intermediate_size=seen["encoder.layers.0.mlp.fc1.weight"].shape[0], num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64), image_size=side, patch_size=patch, layer_norm_eps=1e-6,  # as in BLIP
    ))  # fmt: skip
    med = json.loads((folder / MED_CONFIG).read_bytes())
    text = BlipTextModel(
        BlipTextConfig(**{**med, "encoder_hidden_size": width, "is_decoder": True}), add_pooling_layer=False
    )
    vision.load_state_dict(seen)
    text.load_state_dict({name: value for name, value in read.items() if not name.endswith("position_ids")})
    head = linear_layers(state, "mlp.layers", relu=False)
    for part in (vision, text, head):
        part.to(device).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    require_vocabulary(tokenizer, str(folder))
    images_of = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)

    def score(prompts: Sequence[str], images: Sequence[Image]) -> Tensor:
        tell_cut(tokenizer, prompts, _MAX_TOKENS)
        given = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(device)
        shown = [middle(image, side) for image in images]
        pixels = images_of(images=shown, return_tensors="pt")["pixel_values"].to(device)
        looked = vision(pixel_values=pixels).last_hidden_state
        made = text(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], encoder_hidden_states=looked,
            encoder_attention_mask=torch.ones(looked.shape[:2], device=device),
        ).last_hidden_state[:, 0]  # fmt: skip
        found: Tensor = (head(made)[:, 0] - _MEAN) / _SPREAD
        return found

    return score


def whole(image: Image, side: int) -> Tensor:
    """HPSv2's ResizeMaxSize: [3, side, side] in about [0, 1], scaled as numbers without rounding, on black."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    scale = side / max(image.size)
    size = (round(image.height * scale), round(image.width * scale))
    pixels = interpolate(pixels, size, mode="bicubic", antialias=True)[0]
    down, across = side - size[0], side - size[1]
    return pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))


def middle(image: Image, side: int) -> Image:
    """torchvision's Resize and CenterCrop; transformers' crop of an odd rest may be a pixel further left."""
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    scaled = image.resize((width, height), Resampling.BICUBIC)
    return scaled.crop((left, top, left + side, top + side))


def linear_layers(state: Mapping[str, Tensor], prefix: str, relu: bool) -> nn.Sequential:
    """The linear layers below `prefix`, by their places; what stands between them is dropout, or a ReLU too."""
    names = sorted(
        (name.removesuffix(".weight") for name in state if name.startswith(prefix) and name.endswith(".weight")),
        key=lambda name: int(name.rpartition(".")[2]) if name != prefix else 0,
    )
    if not names or len(state[f"{names[-1]}.weight"]) != 1:  # the embedding itself would be taken for a score
        raise InputError(
            "no scorer of images here", got=f"no layers to one score, {prefix}.*", expected="the scorer's own head",
            fix="give the whole scorer: this folder holds what it reads with",
        )  # fmt: skip
    parts: list[nn.Module] = []
    for name in names:
        weight = state[f"{name}.weight"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"].float()})
        parts += [nn.ReLU(), layer] if relu and parts else [layer]
    return nn.Sequential(*parts)


def blip_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's weights in BLIP's own names under transformers'."""
    found = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("blocks."):
            _, block, part = stem.split(".", 2)
            found[f"encoder.layers.{block}.{_OF_A_BLOCK.get(part, part)}.{kind}"] = value
        else:
            found[_VISION[name] if name in _VISION else f"{_VISION[stem]}.{kind}"] = value
    return found


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}


def _weights(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise InputError(
            "no safetensors of this scorer", where=folder, expected=name,
            fix="convert its weights once, under their own names, with save_file of safetensors.torch",
        )  # fmt: skip
    return folder / name


def _require_processor(folder: Path) -> Path:
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise InputError(
            "no image processor beside the scorer", where=folder, expected="preprocessor_config.json",
            fix="copy the processor's files from the CLIP that the scorer was made of (its card names it)",
        )  # fmt: skip
    return folder
