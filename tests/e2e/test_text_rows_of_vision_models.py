"""Rows of text alone on checkpoints with a vision part: the text is trained, the vision part is what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_artifacts import make_datasets, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.families.causal.image_limits import FrozenParts
from prefmill.families.causal.vision_parts import freeze, part_of_weights
from stages import dpo, sft
from tests.models.matrix import build
from tests.models.tiny_configs import tiny_config
from tests.tiny import make_tokenizer

SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4, "max_length": 64,
    "report_to": [],
}  # fmt: skip
SEEN = {"gemma3": ("vision_tower", "multi_modal_projector"), "qwen3_5": ("visual.blocks", "visual.merger")}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_datasets(tmp_path_factory.mktemp("datasets"))


def checkpoint(folder: Path, model_type: str) -> Path:
    """A tiny model of this type for the tokenizer of the tests, as a Hugging Face folder."""
    from transformers import AutoModelForImageTextToText

    tokenizer, config = make_tokenizer(), tiny_config(model_type)
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model_type == "gemma3":  # rows of text need no files for images
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
    return folder


def train(stage: Any, folder: Path, base: Path, datasets: Artifact, **keys: Any) -> dict[str, torch.Tensor]:
    config = validate(stage.STAGE.config, {**SETTINGS, "model_name_or_path": str(base), **keys})
    stage.run(config, make_task(stage.STAGE.name, folder, datasets=datasets))
    output = next(path.parent for path in folder.rglob("model.safetensors") if "state" not in str(path))
    assert (output / "preprocessor_config.json").is_file() == (base / "preprocessor_config.json").is_file()
    return load_file(output / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "model_type", "keys"), [
    (dpo, "gemma3", {"layout": "group"}), (dpo, "qwen3_5", {}), (sft, "gemma3", {"lora": {"r": 2, "alpha": 4}}),
])  # fmt: skip
def test_the_text_part_is_trained_and_the_vision_part_kept(
    tmp_path: Path, datasets: Artifact, stage: Any, model_type: str, keys: dict[str, Any]
) -> None:
    base = checkpoint(tmp_path / "base", model_type)
    before, after = load_file(base / "model.safetensors"), train(stage, tmp_path / "run", base, datasets, **keys)
    same = {name: torch.equal(before[name], weight) for name, weight in after.items() if name in before}
    for part in SEEN[model_type]:
        found = [kept for name, kept in same.items() if part in name]
        assert found
        assert all(found)
    assert not all(kept for name, kept in same.items() if "language_model" in name)


@pytest.mark.parametrize(("keys", "with_images", "trained"), [
    ({}, False, {"language_model"}),
    ({}, True, {"language_model", "projector", "vision_tower"}),
    ({"freeze_vision_tower": True}, True, {"language_model", "projector"}),
    ({"freeze_language_model": True, "freeze_projector": False}, False, {"projector"}),
])  # fmt: skip
@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "llama4"])
def test_each_part_is_frozen_by_its_key(
    model_type: str, keys: dict[str, Any], with_images: bool, trained: set[str]
) -> None:
    model = build(model_type)
    parts = part_of_weights(model)
    assert set(parts.values()) == {"language_model", "projector", "vision_tower"}
    freeze(model, FrozenParts(**keys), with_images)
    assert {parts[name] for name, weight in model.named_parameters() if weight.requires_grad} == trained


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2"])
def test_nothing_left_to_train_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match="every part of the model is frozen"):
        freeze(build(model_type), FrozenParts(freeze_language_model=True), with_images=False)
