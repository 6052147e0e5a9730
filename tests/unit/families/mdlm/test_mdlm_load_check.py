"""The load check of masked diffusion: the scorer's values against the model's own full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.errors import InputError
from prefmill.families.mdlm.load_check import check_diffusion_model
from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of
from prefmill.families.mdlm.scorer import patch_forward


def scoring(folder: Path, shifted: bool = False) -> tuple[Any, int]:
    model: Any = load_diffusion_model(str(folder), precision="fp32")
    mask = mask_token_of(model, load_diffusion_tokenizer(str(folder)))
    return patch_forward(model, mask_token_id=mask, shifted=shifted), mask


@pytest.mark.parametrize("shifted", [False, True])
def test_a_plain_model_passes(tiny_folder: Path, shifted: bool) -> None:
    model, mask = scoring(tiny_folder, shifted)
    check_diffusion_model(model, "tiny", mask, shifted, torch.float32)


def test_outputs_read_at_another_place_are_caught(tiny_folder: Path) -> None:
    model, mask = scoring(tiny_folder, shifted=True)
    with pytest.raises(InputError, match="own likelihoods"):
        check_diffusion_model(model, "tiny", mask, False, torch.float32)


def test_a_planted_functional_dropout_is_caught(tiny_folder: Path) -> None:
    model, mask = scoring(tiny_folder)
    layer = model.model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda states: torch.nn.functional.dropout(own(states), 0.5, training=layer.training)
    with pytest.raises(InputError, match="own likelihoods"):
        check_diffusion_model(model, "tiny", mask, False, torch.float32)
