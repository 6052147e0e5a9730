"""An OpenCLIP checkpoint gives the embeddings of OpenCLIP's own forward pass, written down with torch alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from prefmill.core.errors import InputError
from prefmill.families.reward.open_clip import CONFIG_FILE, WEIGHTS_FILE, is_open_clip, load_open_clip

WIDTH, PATCH, SIZE, LAYERS, EMBED, VOCAB, CONTEXT = 128, 8, 16, 2, 24, 50, 12
CONFIG = {
    "embed_dim": EMBED,
    "vision_cfg": {"image_size": SIZE, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 32, "heads": 4, "layers": LAYERS},
}


def make_state() -> dict[str, Tensor]:
    """Random weights under OpenCLIP's names."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    state = {
        "visual.class_embedding": normal(WIDTH), "visual.positional_embedding": normal(1 + (SIZE // PATCH) ** 2, WIDTH),
        "visual.conv1.weight": normal(WIDTH, 3, PATCH, PATCH), "visual.proj": normal(WIDTH, EMBED),
        "positional_embedding": normal(CONTEXT, 32), "token_embedding.weight": normal(VOCAB, 32),
        "text_projection": normal(32, EMBED), "logit_scale": torch.tensor(2.0),
    }  # fmt: skip
    norms = [("visual.ln_pre", WIDTH), ("visual.ln_post", WIDTH), ("ln_final", 32)]
    for tower, width in (("visual.transformer", WIDTH), ("transformer", 32)):
        for layer in range(LAYERS):
            name = f"{tower}.resblocks.{layer}"
            norms += [(f"{name}.ln_1", width), (f"{name}.ln_2", width)]
            state |= {
                f"{name}.attn.in_proj_weight": normal(3 * width, width),
                f"{name}.attn.in_proj_bias": normal(3 * width),
            }
            for part, out, into in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                state |= {f"{name}.{part}.weight": normal(out, into), f"{name}.{part}.bias": normal(out)}
    for name, width in norms:
        state |= {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}
    return state


def layer_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def transformer(state: dict[str, Tensor], tower: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Pre-norm blocks with torch's own multi-head attention, as OpenCLIP has them; x is [B, T, W]."""
    width = x.shape[-1]
    for layer in range(LAYERS):
        name = f"{tower}.resblocks.{layer}"
        seen = layer_norm(state, f"{name}.ln_1", x).transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            seen, seen, seen, width, heads, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"],
            None, None, False, 0.0, state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"],
            need_weights=False, attn_mask=mask,
        )  # fmt: skip
        x = x + attended.transpose(0, 1)
        inner = F.gelu(
            F.linear(
                layer_norm(state, f"{name}.ln_2", x), state[f"{name}.mlp.c_fc.weight"], state[f"{name}.mlp.c_fc.bias"]
            )
        )
        x = x + F.linear(inner, state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"])
    return x


def by_hand(state: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings of images and texts."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, WIDTH), x], 1)
        + state["visual.positional_embedding"]
    )
    x = transformer(state, "visual.transformer", layer_norm(state, "visual.ln_pre", x), WIDTH // 64, None)
    image = layer_norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    y = layer_norm(state, "ln_final", transformer(state, "transformer", y, 4, mask))
    return image, y[torch.arange(len(y)), tokens.argmax(1)] @ state["text_projection"]


def write(folder: Path, config: object, state: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(state, folder / WEIGHTS_FILE)
    return folder


def test_embeddings_are_open_clips(tmp_path: Path) -> None:
    state = make_state()
    model = load_open_clip(write(tmp_path, CONFIG, state)).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=generator)
    tokens = torch.randint(1, VOCAB - 1, (3, CONTEXT), generator=generator)
    tokens[:, 7], tokens[:, 8:] = VOCAB - 1, 0  # OpenCLIP ends a text by its largest id and fills up with zeros
    image, text = by_hand(state, pixels, tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_image_features(pixel_values=pixels).pooler_output, image, atol=1e-5, rtol=1e-5
        )
        found = model.get_text_features(input_ids=tokens, attention_mask=torch.ones_like(tokens)).pooler_output
    torch.testing.assert_close(found, text, atol=1e-5, rtol=1e-5)
    assert model.logit_scale.item() == 2.0
    assert is_open_clip(str(tmp_path))


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    state = make_state()
    with pytest.raises(InputError, match=r"not those of the configuration[\s\S]*layer_norm1"):
        load_open_clip(write(tmp_path / "a", CONFIG, {k: v for k, v in state.items() if "ln_1" not in k}))
    with pytest.raises(InputError, match="not a CLIP of two plain transformers"):
        load_open_clip(write(tmp_path / "b", {**CONFIG, "text_cfg": {"hf_model_name": "roberta"}}, state))
    # Each of these scored as if it were not there.
    for part, key, value in (
        ("vision_cfg", "pool_type", "avg"), ("vision_cfg", "global_average_pool", True),
        ("text_cfg", "pool_type", "last"), ("text_cfg", "no_causal_mask", True),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
    ):  # fmt: skip
        changed: dict[str, Any] = json.loads(json.dumps(CONFIG))
        changed[part][key] = value
        with pytest.raises(InputError, match=rf"two plain transformers[\s\S]*got: +{key}: "):
            load_open_clip(write(tmp_path / "d", changed, state))
    spelt = {"vision_cfg": {"pool_type": "tok", "patch_dropout": 0.5}, "text_cfg": {"pool_type": "argmax", "pad_id": 0}}
    load_open_clip(write(tmp_path / "e", {**CONFIG, **{k: {**CONFIG[k], **v} for k, v in spelt.items()}}, state))
    (write(tmp_path / "c", CONFIG, state) / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match=r"no safetensors[\s\S]*a pickle"):
        load_open_clip(tmp_path / "c")
