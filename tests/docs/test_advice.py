"""Every setting that a message advises is one that is accepted: the key is there, and takes the value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, get_args

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from prefmill.core.config import StrictConfig
from prefmill.core.stage import load_stage, stage_names
from prefmill.pipeline.plan import PipelineFile, StageEntry
from prefmill.slurm.cluster import ClusterFile
from tests.docs import messages

_KEY, _VALUE = r"([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*)", r"(\{[^}]*\}|\[[^\]]*\]|[^\s,;|)`'\"]+)"
_SETTING = re.compile(rf"(?<![\w.$/-]){_KEY}(=|: ){_VALUE}")
_OPEN = re.compile(r"…|\.\.\.|[A-Z]{2,}|^/")  # known at run time, or for the reader to fill in
ELSEWHERE = {
    "is_causal",  # of a model's own config.json
    "task",  # of a stage's command line, beside run and workspace
    "preference_data_path",  # another name of dataset, read before the configuration is checked
}


@cache
def models() -> tuple[type[BaseModel], ...]:
    """Every configuration class that a user's file or command line can reach."""
    roots = [load_stage(name).config for name in stage_names()] + [PipelineFile, StageEntry, ClusterFile]
    found: dict[type[BaseModel], None] = {}
    while roots:
        model = roots.pop()
        if model not in found:
            found[model] = None
            roots += [inner for field in model.model_fields.values() for inner in _inside(field.annotation)]
    return tuple(found)


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _inside(argument)


def fields_of(dotted: str) -> list[Any]:
    """The fields that a dotted key can name."""
    *path, last = dotted.split(".")
    if path == ["array"]:
        return [StageEntry.model_fields["array"]]
    if path == ["inputs"]:  # of a pipeline's entry, or of a stage's command line
        known = any(last in load_stage(name).reads for name in stage_names())
        return [StageEntry.model_fields["inputs"]] if known else []
    owners = set(models())
    for part in path:
        owners = {inner for owner in owners if part in owner.model_fields
                  for inner in _inside(owner.model_fields[part].annotation)}  # fmt: skip
    return [owner.model_fields[last] for owner in owners if last in owner.model_fields]


def accepts(field: Any, text: str) -> bool:
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(kind, config=StrictConfig.model_config if not list(_inside(kind)) else None).validate_json(
            json.dumps(yaml.safe_load(text))
        )
    except (ValidationError, yaml.YAMLError, TypeError):
        return False
    return True


def advised() -> list[tuple[str, str]]:
    """Key and value of every setting in a remedy; a word with a colon in prose is none."""
    remedies = [line.split(" | ")[-1] for line in messages.page().splitlines() if line.startswith("| `")]
    found = set()
    for remedy in remedies:
        for key, sign, value in _SETTING.findall(remedy):
            if key not in ELSEWHERE and (sign == "=" or (fields_of(key) and key != "names")):
                found.add((key, value.rstrip(".")))
    return sorted(found)


@pytest.mark.parametrize(("key", "value"), advised())
def test_an_advised_setting_is_accepted(key: str, value: str) -> None:
    fields = fields_of(key)
    assert fields, f"no configuration has the key {key}"
    is_nested = key.startswith(("inputs.", "array."))
    is_open = is_nested or _OPEN.search(value)
    assert is_open or any(accepts(field, value) for field in fields), f"{key} does not take {value}"


def test_settings_are_found_and_a_wrong_one_is_seen() -> None:
    assert len(advised()) > 40
    assert not fields_of("on_bad_rows")
    assert not any(accepts(field, "quarantined") for field in fields_of("on_bad_row"))
    assert any(accepts(field, "{min_answer_mass: 0}") for field in fields_of("judge"))
