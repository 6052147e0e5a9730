"""What is said of keys that are wrong: unknown, missing, of another kind."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prefmill.core.aliases import ALIASES, REFUSED
from prefmill.core.variables import HIDDEN

_FEW_KEYS = 12


def instead(key: str, valid: Collection[str], listed: set[str]) -> str:
    """What to write in place of an unknown key; all that is valid only where that is short, or nothing is near.

    No list stands twice in an error, whose lists are in `listed`: another tool's file has dozens of unknown keys.
    """
    if key in REFUSED and ALIASES.get(key) not in valid:
        return f" ({REFUSED[key]})"
    near = difflib.get_close_matches(key, sorted(valid), n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
    names = _on_lines(sorted(valid))
    if names in listed or (near and len(valid) > _FEW_KEYS):
        return hint
    listed.add(names)
    return f"{hint}; valid keys: {names}"


def told_kinds(detail: ErrorDetails) -> str:
    """What is wrong with the key that says which kind a section is, without pydantic's words for it."""
    context = detail.get("ctx", {})
    key = str(context["discriminator"]).strip("'")
    if "tag" in context:
        return f"{key} = {context['tag']!r}, expected one of {context['expected_tags']}"
    return f"{key} is missing: it says what the other keys are"


def _on_lines(names: Sequence[str]) -> str:
    """Names on lines of a terminal's width."""
    lines = textwrap.wrap(", ".join(names) or "(none)", 100)
    return "\n      ".join(lines if len(lines) == 1 else ["", *lines])


def keys_at(schema: Any, location: Sequence[str | int]) -> set[str]:
    """The field names a configuration has at `location`, looking through lists, dicts, unions and tags."""
    schemas = {schema}
    for part in location:
        inner = {step for item in schemas for step in _step_into(item, part)}
        # A union's tag is part of the location but not of the data: it says which of them is meant.
        schemas = inner or {item for item in schemas if _is_tagged(item, part)} or schemas
    return {name for item in schemas for name in getattr(item, "model_fields", {})}


def _is_tagged(schema: Any, tag: str | int) -> bool:
    return any(tag in get_args(field.annotation) for field in getattr(schema, "model_fields", {}).values())


def _step_into(schema: Any, part: str | int) -> Iterator[Any]:
    field = getattr(schema, "model_fields", {}).get(part)
    if field is not None:
        yield from _models_in(field.annotation)


def _models_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


# JSON's array and object are YAML's list and mapping.
_WORDS = {
    "string_type": "Input should be a text: put it in quotes (on the command line in two kinds: key='\"1\"')",
    "list_type": "Input should be a list, as in [a, b]",
    "model_type": "Input should be keys with values, as in {key: value}",
}


def written(location: Sequence[str | int]) -> str:
    """A place in a configuration or a row, an element of a list in brackets: `sources[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _given_at(schema: Any, location: Sequence[str | int], values: Any) -> list[str | int]:
    """`location` without the tag or type of a union's member, which pydantic names too and nobody writes."""
    kept: list[str | int] = []
    for number, part in enumerate(location):
        # Where a validator of ours has changed the values, None are known.
        is_key = isinstance(values, dict | None) and part in keys_at(schema, location[:number])
        if isinstance(part, int) or is_key or (isinstance(values, dict) and part in values):
            kept.append(part)
            inside = dict(enumerate(values)) if isinstance(values, list) else values
            values = inside.get(part) if isinstance(inside, dict) else None
    return kept


def explain(
    schema: type[BaseModel], error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, object]
) -> list[str]:
    """A line for every wrong key of `values`: what is wrong with it, its value, and where it was given by `origins`."""
    listed: set[str] = set()
    lines = []
    for detail in error.errors(include_url=False):
        given = _given_at(schema, detail["loc"], values)
        dotted = ".".join(map(str, given))
        places = [origin for key, origin in origins.items() if f"{dotted}.".startswith(f"{key}.")]
        lines.append(f"    {_explain(schema, detail, written(given), f', {places[-1]}' if places else '', listed)}")
    return lines


def _explain(schema: type[BaseModel], detail: ErrorDetails, location: str, place: str, listed: set[str]) -> str:
    if detail["type"] == "extra_forbidden":
        hint = instead(str(detail["loc"][-1]), keys_at(schema, detail["loc"][:-1]), listed)
        return f"{location}: unknown key{hint}{place}"
    if detail["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"{location} = {detail['input']!r:.200}: {told_kinds(detail)}{place}"
    if detail["type"] == "missing":
        return f"{location}: required, but not given"
    if detail["type"] == HIDDEN:
        return f"{location}: {detail['msg']}{place}"
    # pydantic's own first words for what a validator of ours says.
    said = _WORDS.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
    # Of a whole configuration, the beginning says nothing: a validator names its keys.
    return said if not detail["loc"] else f"{location} = {detail['input']!r:.200}: {said}{place}"
