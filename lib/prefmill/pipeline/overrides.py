"""What stands on the command line as `stage.key=value`, put where a pipeline keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefmill.core.config import merge, split_override


def names_stage_key(override: str, stages: Mapping[str, Any]) -> bool:
    """Whether it is a key of one of the `stages` and not one of the pipeline."""
    key = override.split("=", 1)[0]
    return "." in key and key.split(".", 1)[0] in stages


def with_stage_keys(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A pipeline's `values` with `dpo.lora.r=8` in that stage's `set`, its key as it is written: `lora.r`.

    What was set of that key, or under it, before is gone. An entry that is no entry is left for validation to refuse.
    Raises ConfigError for what is not key=value.
    """
    stages = dict(values["stages"])
    for override in overrides:
        head, text = split_override(override)
        stage, key = head.split(".", 1)
        entry = stages[stage] or {}
        before = entry.get("set") or {} if isinstance(entry, Mapping) else None
        if not isinstance(before, Mapping):
            continue
        kept = {old: given for old, given in before.items() if not f"{old}.".startswith(f"{key}.")}
        given = merge({}, [f"value={text}"], "the command line")["value"]
        stages[stage] = {**entry, "set": {**kept, key: given}}
    return {**values, "stages": stages}
