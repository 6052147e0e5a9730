"""What a training asks of its starting model before the first step: its head, its configuration, its positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.layout import choose_layout
from prefmill.families.causal.start_checks import check_positions, check_start
from prefmill.training.preference_config import PreferenceConfig


def test_a_reward_model_is_no_start_and_one_without_a_head_is_told(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With tied embeddings both would load without a word, the head dropped or made up."""
    from transformers import Qwen2ForSequenceClassification, Qwen2Model

    from prefmill.families.causal.loading import load_model

    said = json.loads((tiny_qwen2 / "config.json").read_text()) | {"tie_word_embeddings": True}
    for kind in (Qwen2ForSequenceClassification, Qwen2Model):
        kind(kind.config_class(**said)).save_pretrained(tmp_path / kind.__name__)
    reward = str(tmp_path / "Qwen2ForSequenceClassification")
    # Of a training before its rows are read; judges and evaluations load it, and read the embeddings as its head.
    for read in (lambda: check_start(reward, PreferenceConfig()), lambda: load_model(reward, precision="fp32")):
        with pytest.raises(InputError, match="Qwen2ForSequenceClassification"):
            read()
    load_model(str(tmp_path / "Qwen2Model"), precision="fp32")
    check_start(str(tmp_path / "Qwen2Model"), PreferenceConfig())
    assert "says that it is Qwen2Model" in caplog.text


def test_what_the_configuration_says_is_checked_before_weights_are_loaded(tiny_qwen2: Path, tmp_path: Path) -> None:
    from prefmill.families.causal.loading import load_tokenizer

    folder = shutil.copytree(tiny_qwen2, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    check_start(str(folder), PreferenceConfig())
    check_positions(str(folder), [512], PreferenceConfig())
    with pytest.raises(ConfigError, match="longer than the model has positions"):
        check_positions(str(folder), [3, 513], PreferenceConfig())
    for attention in ("flash_attention_2", "nonesuch"):
        with pytest.raises(ConfigError, match="this attention cannot be used"):
            check_start(str(folder), PreferenceConfig(attn_implementation=attention, layout="pairwise"))
    check_start(str(folder), PreferenceConfig(attn_implementation="eager", layout="pairwise"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["full_attention", "indexed_attention"]}))
    with pytest.raises(ConfigError, match="cannot share prompts in this model"):
        choose_layout(PreferenceConfig(layout="group"), str(folder))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="neither a pad nor an end token"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"model_type": "brandnew"}, r"`brandnew`(.|\n)*install a transformers that has this kind"),
        ({"model_type": None}, r"model_type(.|\n)*check that the folder is whole"),
        ({"model_type": "brandnew", "auto_map": {"AutoConfig": "c.C"}}, r"set trust_remote_code=true if you trust"),
    ],
)
def test_a_model_that_transformers_does_not_know_is_refused_by_name(
    said: dict[str, Any], why: str, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Wherever its configuration is read first: dpo ended in a traceback of transformers, for a very new model too."""
    from prefmill.families.causal.loading import load_model

    folder = shutil.copytree(tiny_qwen2, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | said
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    for read in (
        lambda: choose_layout(PreferenceConfig(), str(folder)),
        lambda: check_start(str(folder), PreferenceConfig()),
        lambda: load_model(str(folder), precision="fp32"),
    ):
        with pytest.raises(InputError, match=why):
            read()


def test_a_file_in_a_models_place_names_its_folder(tiny_qwen2: Path) -> None:
    """`model.gguf` of the current folder was looked for on the hub."""
    with pytest.raises(InputError, match=rf"this is a file(.|\n)*give {tiny_qwen2}$"):
        choose_layout(PreferenceConfig(), str(tiny_qwen2 / "config.json"))


def test_rows_with_two_sets_of_positions_are_not_mixed(tiny_qwen2: Path, tmp_path: Path) -> None:
    """LongRoPE (Phi 3, Phi 4 mini): transformers takes the long factors for all rows of a batch, or for none."""
    from prefmill.families.causal.loading import load_model
    from prefmill.families.causal.scorer import encode_sequences, patch_forward, score_batch

    folder = shutil.copytree(tiny_qwen2, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    model = patch_forward(load_model(str(folder), precision="fp32").eval())
    short, long = ([5, 6, 7, 8], [9, 10]), ([5] * 70, [6, 7])
    alone, beside = (float(score_batch(model, encode_sequences(rows, 0))[0]) for rows in ([short], [short, long]))
    assert abs(alone - beside) > 1e-3
    for lengths in ([6, 64], [65, 72]):
        check_positions(str(folder), lengths, PreferenceConfig())
    with pytest.raises(ConfigError, match=r"other positions for long(.|\n)*6 to 72 tokens(.|\n)*max_length=64"):
        check_positions(str(folder), [6, 72], PreferenceConfig())
