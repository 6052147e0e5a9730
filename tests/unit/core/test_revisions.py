"""A revision is one of the hub's: beside a folder, a file or nothing it had no effect, and is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.core.stage import load_stage

TRAINING = {"learning_rate": 1e-3, "num_train_epochs": 1}


@pytest.mark.parametrize(
    ("stage", "keys", "name"),
    [
        ("dpo", TRAINING, "model_name_or_path"),
        ("sft", TRAINING, "model_name_or_path"),
        ("mdlm_evaluate", {}, "model_name_or_path"),
        ("evaluate", {"model": "base"}, "model_name_or_path"),
        ("sdxl_dpo", {}, "model_name_or_path"),
        ("train_reward", {}, "model_name_or_path"),
        ("evaluate_images", {}, "model_name_or_path"),
        ("generate_images", {"prompts": "p.csv"}, "model_name_or_path"),
        ("dpo", TRAINING, "ref_name"),
        ("dpo", TRAINING, "dataset"),
    ],
)
def test_a_revision_without_effect_is_refused(stage: str, keys: dict[str, Any], name: str, tmp_path: Path) -> None:
    revision = {"model_name_or_path": "revision", "ref_name": "ref_revision", "dataset": "dataset_revision"}[name]
    schema, file = load_stage(stage).config, tmp_path / "rows.jsonl"
    file.touch()
    for here, said in ((tmp_path, f"{tmp_path} is on this machine"), (None, f"{name} is not given"),
                       (file if name == "dataset" else tmp_path, "is on this machine")):  # fmt: skip
        values = {**keys, name: None if here is None else str(here), revision: "v2"}
        with pytest.raises(ConfigError, match=rf"{revision}: only what is on the hub has revisions, and .*{said}"):
            validate(schema, values)
        validate(schema, {**values, revision: None})  # the fix
    assert getattr(validate(schema, {**keys, name: "me/mine", revision: "v2"}), revision) == "v2"


def test_the_revision_of_an_adapter_as_reference_is_not_asked_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from prefmill.families.causal.other_reference import reference_parts

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--adapter" / "snapshots" / "v2"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").touch()
    said = {"base_model_name_or_path": "me/base", "peft_type": "LORA"}
    schema = load_stage("dpo").config
    for own in (None, "v7"):
        (folder / "adapter_config.json").write_text(json.dumps({**said, "revision": own}))
        config = validate(schema, {**TRAINING, "ref_name": "me/adapter", "ref_revision": "v2"})
        assert reference_parts(config) == ("me/base", own, folder)
    whole = validate(schema, {**TRAINING, "ref_name": "me/whole", "ref_revision": "v2"})
    assert reference_parts(whole) == ("me/whole", "v2", None)


def test_so_is_that_of_a_judge(tmp_path: Path) -> None:
    schema = load_stage("score_reviews").config
    engine = {"engine": "transformers", "model_name_or_path": str(tmp_path), "revision": "v2"}
    with pytest.raises(ConfigError, match="revision: only what is on the hub has revisions"):
        validate(schema, {"engine": engine})
