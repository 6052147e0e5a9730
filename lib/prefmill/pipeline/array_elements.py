"""The elements of a stage's array, and how they are named."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefmill.core.errors import ConfigError
from prefmill.core.stage import ArrayValue

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
