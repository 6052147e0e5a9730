"""`layout: auto`, the default: group where the model allows it, else pairwise with the reason told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import identity, validate
from prefmill.core.files import digest_path
from prefmill.core.stage import load_stage
from prefmill.families.causal.layout import choose_layout
from prefmill.store.jsonl import write_jsonl
from prefmill.training.preference_config import PreferenceConfig
from tests.tiny import pair_rows
from tests.unit.training.test_group_training import SMALL, train


def rewrite(model: Path, folder: Path, **keys: Any) -> Path:
    """A copy of `model` whose configuration says something else."""
    import json
    import shutil

    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def sparse(model: Path, folder: Path) -> Path:
    """A copy whose second layer chooses its keys by content."""
    return rewrite(model, folder, layer_types=["full_attention", "indexed_attention"])


def chosen(model: Path, **keys: Any) -> tuple[str, str | None]:
    config, reason = choose_layout(validate(PreferenceConfig, {**SMALL, **keys}), str(model))
    return config.layout, reason


def test_it_is_group_where_the_model_allows_it(tiny_qwen2: Path) -> None:
    assert chosen(tiny_qwen2) == ("group", None)


def test_a_window_is_no_reason(tiny_qwen2: Path, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    keys = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    assert chosen(rewrite(tiny_qwen2, tmp_path / "windowed", **keys)) == ("group", None)


def test_layers_that_choose_their_keys_are_a_reason(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout, reason = chosen(sparse(tiny_qwen2, tmp_path / "sparse"))
    assert layout == "pairwise"
    assert reason is not None
    assert "layers of indexed_attention" in reason
    assert f"layout: auto is pairwise: {reason}" in caplog.text


def test_an_attention_of_the_users_is_a_reason(tiny_qwen2: Path) -> None:
    layout, reason = chosen(tiny_qwen2, attn_implementation="eager")
    assert (layout, reason) == ("pairwise", "attn_implementation is eager, and group brings its own")


def test_the_other_reference_must_allow_it_too(tiny_qwen2: Path, tmp_path: Path) -> None:
    other = sparse(tiny_qwen2, tmp_path / "sparse")
    assert chosen(tiny_qwen2, ref_name=str(other))[0] == "pairwise"


def test_what_is_asked_for_stays(tiny_qwen2: Path) -> None:
    assert [chosen(tiny_qwen2, layout=name)[0] for name in ("group", "pairwise")] == ["group", "pairwise"]


@pytest.mark.slow
def test_a_training_says_which_it_was(tiny_qwen2: Path, tmp_path: Path) -> None:
    """In its metrics; and the weights are those of the layout it became."""
    rows = tmp_path / "data.jsonl"
    write_jsonl(rows, pair_rows(2, 2))
    keys = {"num_train_epochs": 1, "effective_batch_size": 4}
    found = {}
    for name, more in (("group", {}), ("pairwise", {"attn_implementation": "eager"})):
        auto, asked = (
            train(tmp_path / f"{name}{n}", tiny_qwen2, rows, **keys, **more, **layout)
            for n, layout in enumerate(({}, {"layout": name}))
        )
        assert auto["layout"] == asked["layout"] == name
        weights = [digest_path(tmp_path / f"{name}{n}" / "out" / "model.safetensors") for n in range(2)]
        assert weights[0] == weights[1]
        found[name] = auto["why_pairwise"]
    assert found["group"] is None
    assert "attn_implementation is eager" in found["pairwise"]


def test_the_identity_is_what_the_configuration_says() -> None:
    """Not the layout it became: that would need the model before anything is planned. Layouts by name are as before."""
    schema = load_stage("dpo").config
    found = [
        identity(validate(schema, {"modality": "clean", **keys}))["layout"] for keys in ({}, {"layout": "pairwise"})
    ]
    assert found == ["auto", "pairwise"]
