"""One pipeline, several models: elements of an array with settings of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prefmill.core.errors import ConfigError
from prefmill.pipeline.freeze import freeze
from prefmill.pipeline.plan import PipelineFile, make_plan, read_pipeline
from prefmill.slurm.cluster import ClusterFile
from prefmill.slurm.rehearsal_plan import rehearsal_of
from tests.conftest import REPOSITORY

TRAIN = REPOSITORY / "configs/pipelines/train.yaml"
MODELS = {"clean": "Qwen2.5-3B-Instruct", "clean_images": "Qwen2.5-VL-3B-Instruct", "vision": "Qwen2.5-VL-3B-Instruct"}


def models(pipeline: PipelineFile, source: Path) -> dict[str, tuple[str, int]]:
    """Model and length of each SFT element."""
    tasks = [task for task in make_plan(pipeline, source).tasks if task.stage.name == "sft"]
    return {task.name: (task.config.model_name_or_path.rpartition("/")[2], task.config.max_length) for task in tasks}  # type: ignore[attr-defined]


def test_the_shipped_array_trains_text_and_vision_models_and_survives_being_frozen(tmp_path: Path) -> None:
    pipeline = read_pipeline(TRAIN, [f"workspace={tmp_path}"])
    wanted = {name: (model, 16384 if "VL" in model else 28000) for name, model in MODELS.items()}
    assert models(pipeline, TRAIN) == wanted
    frozen = json.loads(json.dumps(freeze(pipeline, make_plan(pipeline, TRAIN), TRAIN)))
    assert models(PipelineFile.model_validate(frozen), Path("/nowhere/else.yaml")) == wanted


def test_the_command_line_speaks_for_all_elements(tmp_path: Path) -> None:
    values = yaml.safe_load(TRAIN.read_text())
    values["stages"]["sft"]["array"]["modality"]["vision"]["set"] = {"max_length": 5, "lora.r": 2}
    values["stages"]["sft"]["set"] = {"max_length": 4}
    path = tmp_path / "pipelines" / "train.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(values))
    (tmp_path / "sft").symlink_to(REPOSITORY / "configs/sft")
    for stage in ("dpo", "ingest_reviews", "score_reviews", "build_datasets", "validate_datasets"):
        (tmp_path / stage).symlink_to(REPOSITORY / "configs" / stage)
    found = models(read_pipeline(path), path)
    assert [length for _, length in found.values()] == [4, 4, 5]  # an element's own before its stage's
    found = models(read_pipeline(path, ["sft.max_length=7"]), path)
    assert [length for _, length in found.values()] == [7, 7, 7]


def test_its_rehearsal_has_a_tiny_model_of_each_kind(tmp_path: Path) -> None:
    pipeline = read_pipeline(TRAIN, [f"workspace={tmp_path}"])
    small, plan = rehearsal_of(pipeline, make_plan(pipeline, TRAIN), TRAIN, ClusterFile())
    found = {task.key: Path(task.config.model_name_or_path or "").name for task in plan.tasks if task.stage.trains}  # type: ignore[attr-defined]
    assert [found[f"sft:{name}"] for name in MODELS] == ["qwen2", "qwen2_5_vl", "qwen2_5_vl"]
    assert small.stages["sft"].set == {}


def test_settings_stand_under_one_key(tmp_path: Path) -> None:
    two = {"modality": {"clean": {}}, "seed": {"a": {}}}
    pipeline = PipelineFile.model_validate({"name": "x", "stages": {"sft": {"config": "qwen2.5-3b", "array": two}}})
    with pytest.raises(ConfigError, match="settings under two array keys"):
        make_plan(pipeline, TRAIN)
