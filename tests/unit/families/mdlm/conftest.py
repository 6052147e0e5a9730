"""A small masked-diffusion model for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.demo.text import Shape
from prefmill.demo.toy_language import HARSH, KIND, PLACES, PLAIN, THINGS, build_model

SHAPE = Shape(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
    max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "how is the of it and " + " ".join((*KIND, *HARSH, *PLAIN, *THINGS, *PLACES))
    return build_model(tmp_path_factory.mktemp("tiny_mdlm"), [text] * 3, SHAPE, seed=0)
