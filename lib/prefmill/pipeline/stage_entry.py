"""The form of a stage in a pipeline file, and the elements of its array with their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.errors import ConfigError
from prefmill.core.stage import ArrayValue, Match


class Need(StrictConfig):
    """Which stage makes an input: `stage`, or one of `stages` by array key `by`; `where` picks of its elements."""

    stage: str | None = None
    by: str | None = None
    # Unlike a function, pydantic copies a mutable default for every instance.
    stages: dict[str, str] = {}
    where: dict[str, ArrayValue] = {}
    match: Match | None = None


class ElementEntry(StrictConfig):
    """What an element of an array has of its own: a `config` in place of its stage's, a `set` over its stage's."""

    config: str | None = None
    set: dict[str, Any] = {}


class StageEntry(StrictConfig):
    """A stage in a pipeline: its configuration, its array and where its inputs come from.

    `config` names a file: `demo` means configs/<stage>/demo.yaml beside the pipeline's folder. `set` is laid over
    it: `lora.r` sets that key alone, `lora` all that stands under it. `array` gives an element for every
    combination of its keys' values, words or numbers; a number alone means 0 to n-1. Under one key the words may
    have settings: `modality: {clean: {config: text}, vision: {config: vl}}`. `resources` are what a task
    of it gets on a cluster, laid over the cluster file's. `processes` are the ranks of a training: one per GPU
    unless given.
    """

    config: str | None = None
    set: dict[str, Any] = {}
    array: dict[str, int | list[ArrayValue] | dict[str, ElementEntry]] = {}
    needs: dict[str, str | Need] = {}
    inputs: dict[str, str | list[str]] = {}
    resources: dict[str, Any] = {}
    processes: int | None = Field(None, ge=1)


def with_settings(array: Mapping[str, Any]) -> str | None:
    """The key of an array whose values have settings of their own."""
    return next((key for key, given in array.items() if isinstance(given, Mapping)), None)


def refuse_set_beside_array(
    stage: str, element: Mapping[str, Any], said: Mapping[str, Any], origins: Mapping[str, str]
) -> None:
    """Raise ConfigError where a key that is `said` has no effect: each `element` of the stage's array has its own."""
    for key in (key for key in element if key in said):
        raise ConfigError(
            f"stage {stage}: {key} is set, and has an array over its values",
            where=origins.get(key), got=f"{key}: {said[key]}",
            fix=f"leave {key} out, or the array (an sbatch without --array): one task then has that value",
        )  # fmt: skip


SINGLE_TASK = "all"
# No separators, as names become folders, and no dot in front: that marks output which is being remade.
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def elements(
    stage: str, array: Mapping[str, int | list[ArrayValue] | Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, ArrayValue]]]:
    """Every element's name and array values; names join the values with '-', a number's preceded by its key."""
    if sum(isinstance(given, Mapping) for given in array.values()) > 1:
        raise ConfigError(
            f"elements of stage {stage} have settings under two array keys", got=", ".join(array),
            fix="give settings to the values of one key, and list those of the others",
        )  # fmt: skip
    options: list[list[tuple[str, ArrayValue]]] = []
    for key, given in array.items():
        if key == "shard" and not isinstance(given, int):
            raise ConfigError(
                f"the shards of stage {stage} are counted, not listed", got=given, expected="their number",
                fix=f"array: {{shard: {len(given) or 1}}}",
            )  # fmt: skip
        values: Sequence[ArrayValue] = list(range(given)) if isinstance(given, int) else list(given)
        # Two elements of one name would write to one folder.
        if not values or len(set(values)) != len(values):
            raise ConfigError(
                f"array key '{key}' of stage {stage} needs distinct values",
                got=given,
                fix="correct the stage's `array`",
            )
        options.append([(key, value) for value in values])
    for combination in itertools.product(*options):
        # A number alone would not say what it counts: `shard3`, not `3`.
        parts = [value if isinstance(value, str) else f"{key}{value}" for key, value in combination]
        name = "-".join(parts) or SINGLE_TASK
        if not SAFE_NAME.fullmatch(name):
            raise ConfigError(
                f"an element of stage {stage} cannot be named after its values", got=repr(name),
                expected="letters, digits, '_', '-' and '.'", fix="correct the stage's `array`",
            )  # fmt: skip
        yield name, dict(combination)
