"""Checks of the datasets as a whole: the registry, and that nothing the summary counts is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.core.errors import InputError
from prefmill.datasets.registry import KINDS, SPLITS, SUMMARY, DatasetKey, dataset_keys, entry
from prefmill.reviews.prompt import MODALITIES

ALL_KEYS = {key.folder: key for key in dataset_keys(MODALITIES, SPLITS)}


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json that build_datasets wrote; raises InputError when it is missing or damaged."""
    path = folder / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
        assert {"datasets", "sft", "dpo"} <= set(summary)
    except (OSError, ValueError, AssertionError) as error:
        raise InputError(
            "the datasets' summary cannot be read", where=path, got=str(error) or "keys are missing",
            fix="rerun build_datasets with --force",
        ) from None  # fmt: skip
    return summary


def keys_in(folder: Path) -> list[DatasetKey]:
    """The datasets whose rows are there, in the order of the twelve."""
    return [key for key in ALL_KEYS.values() if (folder / key.file_name()).is_file()]


def registry_problems(registry: Mapping[str, Any], keys: Sequence[DatasetKey]) -> Iterator[str]:
    """Entries that are missing, of no dataset, or other than their loaders need."""
    by_folder = {}
    for name, given in registry.items():
        # By the ending: datasets of earlier versions are named with their run before it.
        folder = next((folder for folder in ALL_KEYS if f"_{name}".endswith(f"_{folder}")), None)
        if folder is None or ALL_KEYS[folder] not in keys:
            yield f"entry '{name}' has no dataset"
        else:
            by_folder[folder] = (name, given)
    for key in keys:
        if key.folder not in by_folder:
            yield f"dataset {key.folder} has no entry"
            continue
        name, given = by_folder[key.folder]
        yield from (f"entry '{name}': {problem}" for problem in entry_problems(given, entry(key)))


def entry_problems(given: Any, needed: Any, path: str = "") -> Iterator[str]:
    """Where a registry entry is not what `needed` says, key by key."""
    if not isinstance(given, dict) or not isinstance(needed, dict):
        if given != needed:
            yield f"{path} is {given!r}, needed {needed!r}"
        return
    for key in [*needed, *(key for key in given if key not in needed)]:
        where = f"{path}.{key}" if path else str(key)
        if key not in given:
            yield f"{where} is missing, and its loader would take None for {needed[key]!r}"
        elif key not in needed:
            yield f"{where} is not known to its loader"
        else:
            yield from entry_problems(given[key], needed[key], where)


def grid_problems(keys: Sequence[DatasetKey]) -> Iterator[str]:
    """Datasets that are missing beside the others: every modality has both kinds and the same splits."""
    # Only modalities and splits that are there: a build may be asked for fewer than all.
    splits = {key.split for key in keys}
    for key in dataset_keys({key.modality: None for key in keys}, [split for split in SPLITS if split in splits]):
        if key not in keys:
            yield f"dataset {key.folder} is missing"
    if not keys:
        yield f"no dataset at all: expected folders such as {KINDS[0]}_{MODALITIES[0]}_{SPLITS[0]}"


def count_problems(summary: Mapping[str, Any], found: Mapping[str, int]) -> Iterator[str]:
    """Datasets that are empty, or whose number of rows (`found`, by folder) is not what the summary says."""
    counted = {folder: counts["rows"] for folder, counts in summary["datasets"].items()}
    for folder in [*counted, *(folder for folder in found if folder not in counted)]:
        if counted.get(folder) != found.get(folder):
            yield f"{folder}: {found.get(folder, 'no')} rows, but {counted.get(folder, 'none')} in {SUMMARY}"
        elif not counted.get(folder):
            yield f"{folder}: no rows"
