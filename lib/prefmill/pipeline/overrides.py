"""What stands on the command line as `stage.key=value`, put where a pipeline keeps it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from prefmill.core.aliases import ALIASES
from prefmill.core.config import merge, split_override
from prefmill.core.errors import ConfigError, nearest
from prefmill.core.places import expand_home
from prefmill.core.stage import load_stage, stage_names


def joined(overrides: Sequence[str]) -> list[str]:
    """Overrides with blanks around the sign put together: `dpo.beta = 0.2` is three words to a shell.

    Raises ConfigError for one without a value: the shell's variable is empty, and the next key is no value.
    """
    words: list[str] = []
    for item in overrides:
        last = words[-1] if words else ""
        goes_on = "=" not in last and item.startswith("=") if "=" in item else last.endswith("=")
        words[-1:] = [last + item] if last and goes_on else [*words[-1:], item]
    if empty := [word for word in words if word.endswith("=") and word.count("=") == 1]:
        raise ConfigError(
            "an override without a value", where="the command line", got=empty[0],
            fix=f"write {empty[0]}VALUE, or {empty[0]}null for none; is a variable of the shell empty?",
        )  # fmt: skip
    return words


# What a stage's entry in a pipeline has beside `config` and `set`, of which name sweep has keys.
_OF_ENTRY = ("array", "inputs", "needs", "processes", "resources")


def of_stages_and_pipeline(
    overrides: Sequence[str], stages: Sequence[str], keys: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Overrides of the `stages`' keys, and those of the pipeline, whose own `keys` these are.

    Raises ConfigError for one that is neither, or no key=value.
    """
    words = joined(overrides)
    require_signs(words, stages)
    own, others = [], []
    for word in words:
        stage, dot, rest = word.partition("=")[0].partition(".")
        first = rest.partition(".")[0]
        if not dot or stage not in stages:
            others.append(word)
        elif first in _OF_ENTRY or (rest == "config" and not _has_key(stage, first)):  # as the pipeline's file has it
            others.append(f"stages.{word}")
        else:
            in_set = rest.startswith("set.") and not _has_key(stage, first)
            own.append(word.replace(".set.", ".", 1) if in_set else word)
    _require_stages(others, stages, keys)
    return own, others


def with_stage_keys(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A pipeline's `values` with `dpo.lora.r=8` in that stage's `set`, its key as it is written: `lora.r`.

    What was set of that key, or under it, before is gone. An entry that is no entry is left for validation to refuse.
    Raises ConfigError for what is not key=value.
    """
    if not overrides:
        return dict(values)
    stages = dict(values["stages"])
    for override in overrides:
        head, text = split_override(override)
        stage, key = head.split(".", 1)
        entry = stages[stage] or {}
        before = entry.get("set") or {} if isinstance(entry, Mapping) else None
        if not isinstance(before, Mapping):
            continue
        # Read as any other override is, so that 8 is a number and [a, b] a list.
        given = merge({}, [f"value={text}"], "the command line")["value"]
        # `lora` replaces all under it, `lora.r` that key alone; what was set there before must not come back.
        stages[stage] = {**_without(entry, key), "set": {**_kept(before, key), key: given}}
    return {**values, "stages": stages}


def require_signs(overrides: Sequence[str], stages: Sequence[str] = ()) -> None:
    """Raise ConfigError for a word that is not key=value, with the next one as its value where that is none either."""
    for word, following in zip_longest(overrides, overrides[1:], fillvalue="="):
        if "=" not in word:
            names_stage = word.partition(":")[0] in stages
            is_value = "=" not in following and not names_stage
            pair = f"write {word}={following if is_value else 'VALUE'}"
            raise ConfigError(
                "an override is written key=value", got=f"{word} {following}" if is_value else repr(word),
                fix=f"`run` and `submit` take a stage or task as --only {word}" if names_stage else pair,
            )  # fmt: skip


def _require_stages(overrides: Sequence[str], stages: Sequence[str], keys: Sequence[str]) -> None:
    """Raise ConfigError for an override of a stage that the pipeline does not have, as `keys` are its own.

    A stage's key without its stage, and a stage before another sign than the dot, are told as they are written.
    """
    for item in overrides:
        written, text = split_override(item)
        head, dot, key = re.sub("[:/]", ".", written).partition(".")
        if head in keys:
            continue
        if dot and head not in stages:
            raise _no_stage(head, key, item, stages)
        if meant := [f"{head}.{key}"] if dot else [f"{name}.{head}" for name in stages if _has_key(name, head)]:
            raise ConfigError(
                f"'{written}' is no key of a pipeline", where="the command line", got=item,
                expected=", ".join(keys), fix=f"write {' or '.join(f'{name}={text}' for name in meant)}",
            )  # fmt: skip


def _no_stage(name: str, key: str, item: str, stages: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, stages, n=1, cutoff=0.6)
    return ConfigError(
        f"no stage '{name}' in this pipeline" + (f" (did you mean '{near[0]}.{key}'?)" if near else ""),
        where="the command line", got=item, expected=", ".join(stages), fix="write STAGE.KEY=VALUE",
    )  # fmt: skip


def _has_key(stage: str, key: str) -> bool:
    keys = load_stage(stage).config.model_fields if stage in stage_names() else {}
    return key in keys or ALIASES.get(key) in keys


def _kept(keys: Mapping[str, Any], key: str) -> dict[str, Any]:
    # The dots keep `lora` from taking `lora_alpha` along.
    return {old: given for old, given in keys.items() if not f"{old}.".startswith(f"{key}.")}


def _without(entry: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A stage's entry, of whose elements none sets `key` any more: the command line speaks for all of them."""
    array = entry.get("array")
    if not isinstance(array, Mapping):
        return dict(entry)
    kept = {
        name: {value: _of_element(own, key) for value, own in given.items()} if isinstance(given, Mapping) else given
        for name, given in array.items()
    }
    return {**entry, "array": kept}


def _of_element(own: Any, key: str) -> Any:
    has_set = isinstance(own, Mapping) and isinstance(own.get("set"), Mapping)
    return {**own, "set": _kept(own["set"], key)} if has_set else own


def config_path(source: Path, stage: str, name: str) -> Path:
    """The file of the configuration `name` of `stage`, in the pipeline `source`; raises ConfigError where none is."""
    if name.endswith((".yaml", ".yml")):
        return expand_home(name)
    beside = source.resolve().parent.parent / stage / f"{name}.yaml"
    # A pipeline of one's own may lie anywhere, not only beside the folders of stages.
    here = Path("configs", stage, f"{name}.yaml").absolute()
    as_given = expand_home(f"{name}.yaml")  # `configs/dpo/demo`, without its ending
    places = (beside, here, as_given)
    if found := next((path for path in places if path.is_file()), None):
        return found
    named = [path.stem for folder in (beside.parent, here.parent) for path in folder.glob("*.yaml")]
    raise ConfigError(
        f"no configuration '{name}' of stage {stage}{nearest(name, named)}", where=source,
        expected=" or ".join(str(path) for path in dict.fromkeys(places)),
        fix="run from the folder that holds configs/, or give the path of the file, with its .yaml",
    )  # fmt: skip
