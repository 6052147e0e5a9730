"""Checks of one row, and of the datasets as a whole: the registry, and that nothing the summary counts is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER
from prefmill.datasets.examples import CheckedRow
from prefmill.datasets.registry import KINDS, SPLITS, SUMMARY, DatasetKey, dataset_keys, entry
from prefmill.reviews.prompt import MODALITIES, asked_scale
from prefmill.store.pictures import ImageError, open_image

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


def rating_problems(example: CheckedRow) -> Iterator[str]:
    """A completion without a rating on the prompt's scale in its last line, or with nothing before it."""
    for answer in example.answers:
        if answer.rating is None:
            low, high = asked_scale(example.prompt)
            yield f"no last line 'Rating: N' with N from {low:g} to {high:g}, but {answer.completion[-40:]!r}"
        elif not answer.text:
            yield "no review before the rating"


def contrast_problems(example: CheckedRow, min_rating_diff: float, min_checkmark_diff: float) -> Iterator[str]:
    """A pair whose differences are too small, or whose rating_diff is not what its two completions say."""
    if example.rating_diff is None or example.checkmark_diff is None:
        return
    chosen, rejected = (answer.rating for answer in example.answers)
    # A missing rating is told by rating_problems, once.
    if (
        chosen is not None
        and rejected is not None
        and not math.isclose(
            chosen - rejected,
            example.rating_diff,
            abs_tol=1e-4,  # completions give six digits
        )
    ):
        yield f"rating_diff is {example.rating_diff:g}, but the ratings are {chosen:g} and {rejected:g}"
    if example.rating_diff < min_rating_diff:
        yield f"rating_diff is {example.rating_diff:g}, under {min_rating_diff:g}"
    if example.checkmark_diff < min_checkmark_diff:
        yield f"checkmark_diff is {example.checkmark_diff:g}, under {min_checkmark_diff:g}"
    if example.answers[0].text.split() == example.answers[1].text.split():
        yield "chosen and rejected are the same text"


def marker_problems(example: CheckedRow) -> Iterator[str]:
    """Image markers that are not as many as the images, or that stand in a completion."""
    markers = example.prompt.count(IMAGE_MARKER)
    if markers != len(example.images):
        yield f"{markers} {IMAGE_MARKER} markers for {len(example.images)} images"
    if any(IMAGE_MARKER in answer.completion for answer in example.answers):
        yield f"{IMAGE_MARKER} in a completion"


def image_problems(example: CheckedRow, folder: Path) -> Iterator[str]:
    """Images that are missing, lead out of the artifact or cannot be read."""
    for name in example.images:
        problem = unreadable(folder, name)
        if problem:
            yield f"{name}: {problem}"


@lru_cache(maxsize=4096)  # the rows of a paper stand together and share its images
def unreadable(folder: Path, name: str) -> str | None:
    """Why the image `name` below `folder` cannot be read, or None."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "not a path below the dataset folder"
    try:
        open_image(folder / name)  # a header can be whole where the pixels are cut off
    except ImageError as error:
        return ": ".join(str(part) for part in (error.what, error.details["got"]) if part)
    return None
