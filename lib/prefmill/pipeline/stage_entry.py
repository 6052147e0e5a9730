"""The form of a stage in a pipeline file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from prefmill.core.config import StrictConfig
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
