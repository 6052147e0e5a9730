"""A job is handed its configuration as JSON with every key in it: each stage takes its own back, unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefmill.core.config import load, validate
from prefmill.core.stage import load_stage, stage_names
from tests.conftest import REPOSITORY

CONFIGS = [path for name in stage_names() for path in sorted((REPOSITORY / "configs" / name).glob("*.yaml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_survives_the_way_into_a_job(path: Path) -> None:
    schema = load_stage(path.parent.name).config
    config = load(schema, path)
    assert validate(schema, json.loads(json.dumps(config.model_dump(mode="json")))) == config
