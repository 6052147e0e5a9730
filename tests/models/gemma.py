"""Tiny Gemma 3 and 4 as their folders lie on the hub: tokenizer, template, configuration and files for images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, GemmaTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from tests.models.tiny_configs import tiny_config, tiny_keys
from tests.tiny import WORDS

MARKS = {
    "gemma3": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    "gemma4": ("<|image>", "<|image|>", "<image|>"),
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{{ 'IMAGE' if part.type == 'image' else part.text | trim }}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma_tokenizer(model_type: str, folder: Path) -> Any:
    """A tokenizer that joins three line breaks to one token, as Gemma's does around images."""
    begin, image, end = MARKS[model_type]
    texts = [" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in range(20)]
    texts += ["user\n\n\nmodel\n\n\nRating: 6\n\n"] * 9
    specials = ["<start_of_turn>", "<end_of_turn>", begin, image, end, "<|video|>"]
    GemmaTokenizer().train_new_from_iterator(texts, 360, new_special_tokens=specials).save_pretrained(folder)
    named = {"boi_token": begin, "image_token": image, "eoi_token": end}
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)
    tokenizer.eos_token = "<end_of_turn>"
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", begin if model_type == "gemma3" else image)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_gemma(model_type: str, folder: Path, **text_keys: Any) -> Path:
    """A tiny Gemma with random weights in `folder`; `text_keys` are of its text part."""
    tokenizer = gemma_tokenizer(model_type, folder)
    config = tiny_config(model_type)
    begin, image, end = tokenizer.convert_tokens_to_ids(list(MARKS[model_type]))
    config.boi_token_id, config.image_token_id, config.eoi_token_id = begin, image, end
    text = config.text_config
    text.vocab_size, text.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    for key, value in text_keys.items():
        setattr(text, key, value)
    if model_type == "gemma3":
        config.mm_tokens_per_image = 4  # of 4 x 4 patches
        processor = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        Gemma3Processor(processor, tokenizer, image_seq_length=4).save_pretrained(folder)
    else:
        config.audio_config, config.vision_config = None, Gemma4VisionConfig(**tiny_keys(Gemma4VisionConfig, ""))
        config.vision_config.pooling_kernel_size = 2
        config.video_token_id = tokenizer.convert_tokens_to_ids("<|video|>")
        text.vocab_size_per_layer_input = len(tokenizer)
        Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder
