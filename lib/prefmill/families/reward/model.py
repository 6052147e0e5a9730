"""A reward model: CLIP sees an image and reads its prompt, and every head turns what it makes of them into a reward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.tokenization_utils_base import LARGE_INTEGER

from prefmill.core.errors import InputError
from prefmill.core.image_rows import HEADS
from prefmill.families.causal.whole import require_vocabulary

INPUTS = ("pixel_values", "input_ids", "attention_mask")
"""What `forward` takes, as a CLIP processor gives it."""
_MAX_TOKENS = 77  # of every CLIP
_log = logging.getLogger(__name__)


class MultiHeadRewardConfig(PreTrainedConfig):
    """CLIP's configuration, the names of the heads, and each head's calibration.

    `temperatures[k]` > 0 divides a difference of two rewards of head k before it is read as a log-odds.
    """

    model_type = "prefmill_reward"
    # By this transformers passes dtype and attention on to the configuration inside.
    sub_configs = {"clip_config": CLIPConfig}

    clip_config: dict[str, Any] | CLIPConfig | None = None
    heads: list[str] | None = None
    hidden_size: int = 64
    temperatures: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.clip_config
        self.clip_config = given if isinstance(given, CLIPConfig) else CLIPConfig(**(given or {}))
        self.heads = list(HEADS) if self.heads is None else list(self.heads)
        self.temperatures = self.temperatures or [1.0] * len(self.heads)
        super().__post_init__(**kwargs)


class MultiHeadReward(PreTrainedModel):
    """Rewards [B, K] of B images and their prompts, one for every head.

    A head is a small network on the two embeddings of unit length and their product, as both what is seen and how it
    agrees with the prompt may please. Rewards are only comparable between images of one prompt.
    """

    config_class = MultiHeadRewardConfig
    base_model_prefix = "reward"
    supports_gradient_checkpointing = True
    config: Any

    def __init__(self, config: MultiHeadRewardConfig) -> None:
        super().__init__(config)
        assert isinstance(config.clip_config, CLIPConfig)
        assert config.heads is not None
        self.clip = CLIPModel(config.clip_config)
        width = 3 * int(config.clip_config.projection_dim or 0)
        self.heads = nn.ModuleDict({name: _head(width, config.hidden_size) for name in config.heads})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Only the heads are new; CLIP's weights are its own."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, prompt_of: Tensor | None = None
    ) -> Tensor:
        """Rewards [B, K] of `pixel_values` [B, 3, H, W] for the prompts' `input_ids`, `attention_mask` [P, T].

        `prompt_of` [B] says which of the P prompts per image is of; None: the first is of the first, and so on.
        """
        image = self.clip.get_image_features(pixel_values=pixel_values).pooler_output
        text = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        # Not indexed: a CPU's threads would add the gradients of a prompt's images in another order every time.
        return self.rewards(image, text if prompt_of is None else text.index_select(0, prompt_of))

    def rewards(self, image: Tensor, text: Tensor) -> Tensor:
        """Rewards [B, K] from the projected embeddings of images and prompts, [B, D] each."""
        # In fp32: bf16 has 8 bits, and two images of one prompt may differ by less.
        seen, read = normalize(image.float(), dim=-1), normalize(text.float(), dim=-1)
        scale = seen.shape[-1] ** 0.5  # back to entries of about 1, which is what the heads' weights expect
        features = torch.cat([seen, read, seen * read * scale], dim=-1) * scale
        return torch.cat([head(features) for head in self.heads.values()], dim=-1)


def create_reward(clip: CLIPModel, hidden_size: int, seed: int) -> MultiHeadReward:
    """A reward model on the weights of `clip`, its heads drawn from `seed`."""
    from prefmill.core.seeding import seeded

    given = {**clip.config.to_dict(), "_name_or_path": ""}  # a path of this machine, and no part of the content
    config = MultiHeadRewardConfig(clip_config=given, hidden_size=hidden_size)
    with seeded(seed):
        model = MultiHeadReward(config)
    # Only now: making the model draws its weights at random, CLIP's among them.
    model.clip.load_state_dict(clip.state_dict())
    model.clip.set_attn_implementation(clip.config._attn_implementation)  # no dictionary says it
    return model


def open_processor(name: str | Path, **options: Any) -> Any:
    """CLIP's tokenizer and image processor; raises InputError where the tokenizer has no words."""
    # By its class, as older folders name a class that transformers no longer has; and Pillow's, as the scorers' authors
    # resize: where torchvision is installed transformers would take that, whose pixels are others.
    images = CLIPImageProcessorPil.from_pretrained(name, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.model_max_length > LARGE_INTEGER:  # transformers' word for a folder that does not say
        tokenizer.model_max_length = _MAX_TOKENS
    require_vocabulary(tokenizer, str(name))
    return CLIPProcessor(images, tokenizer)


def require_size(images_of: Any, clip: Any, where: object) -> None:
    """Raise InputError where pictures of any shape do not become the squares that a CLIP of this configuration sees."""
    side = getattr(clip, "vision_config", clip).image_size
    for size in ((2 * side, side), (side, 3 * side)):
        made = np.shape(images_of(images=Image.new("RGB", size))["pixel_values"][0])
        if made != (3, side, side):
            raise InputError(
                "the image processor is of another model", where=where, got=f"{made[2]} x {made[1]} pixels",
                expected=f"{side} x {side}",
                fix="copy preprocessor_config.json from the CLIP that this model was made of (its card names it)",
            )  # fmt: skip


def encode(processor: Any, prompts: Sequence[str], images: Sequence[Any]) -> dict[str, Any]:
    """What the model takes of these images and prompts; prompts are filled up or cut to what CLIP reads.

    The same width for every prompt: a reward does not depend on what else is in the batch.
    """
    tell_cut(processor.tokenizer, prompts, processor.tokenizer.model_max_length)
    batch = processor(
        text=list(prompts), images=list(images), padding="max_length", truncation=True, return_tensors="pt"
    )
    return {name: batch[name] for name in INPUTS}


def cut_prompts(tokenizer: Any, prompts: Iterable[str], longest: int) -> list[str]:
    """Those of more than `longest` tokens: their ends have no effect."""
    return [prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) > longest]


def tell_cut(tokenizer: Any, prompts: Iterable[str], longest: int) -> None:
    """Say in the log that prompts are cut, where one is."""
    if cut_prompts(tokenizer, prompts, longest):
        _say_cut(longest)


@functools.cache
def _say_cut(longest: int) -> None:
    """Once: prompts come in many batches."""
    _log.warning("there are prompts of more than %d tokens: the scorer does not read their ends", longest)


def _head(width: int, hidden_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, 1))


# So that AutoModel opens a finished folder wherever this module is imported.
AutoConfig.register(MultiHeadRewardConfig.model_type, MultiHeadRewardConfig)
AutoModel.register(MultiHeadRewardConfig, MultiHeadReward)
