"""A configuration's keys for readers: type, default and description, the same in `--help` and on a stage's page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from prefmill.core.config import StrictConfig

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
_LONGEST_TYPE = 60


@dataclass(frozen=True)
class Key:
    """One key; `is_runtime` where it changes how a task runs and not its content."""

    name: str
    type: str
    default: str
    description: str
    is_runtime: bool


def keys_of(config: type[StrictConfig]) -> Iterator[Key]:
    """Every key at the top of a configuration, in its order."""
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        is_runtime = isinstance(extra, dict) and extra.get("identity") is False
        yield Key(name, type_of(field), default_of(field), field.description or "", is_runtime)


def type_of(field: FieldInfo) -> str:
    """A field's type in words, with its bounds."""
    # list[int].__name__ is `list` alone: a type with arguments is shown as it is written.
    plain = not hasattr(field.annotation, "__args__")
    text = getattr(field.annotation, "__name__", "") if plain else str(field.annotation)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("ExternalPath", "path").replace("Path", "path")
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), text)
    text = re.sub(r"Union\[(.*)\]", lambda found: found[1].replace(", ", " or "), text)
    text = text.replace(" | None", "").replace(" or NoneType", "").replace(" | ", " or ")
    # pydantic keeps each bound as an object with one attribute, named after the bound.
    bounds = [(sign, getattr(item, kind, None)) for item in field.metadata for kind, sign in _SIGNS.items()]
    limits = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return ", ".join([text if len(text) < _LONGEST_TYPE else "mapping", *limits])


def default_of(field: FieldInfo) -> str:
    """A field's default as one would write it; `required` where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "its defaults" if hasattr(value, "model_dump") else json.dumps(value, default=str).strip('"')
