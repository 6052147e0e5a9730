"""Checks of the whole: registry, grid and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import InputError
from prefmill.datasets.registry import dataset_keys, entry, read_registry, write_registry
from prefmill.datasets.structure_checks import count_problems, grid_problems, registry_problems

KEYS = dataset_keys(["clean", "vision"], ["train", "val"])


@pytest.fixture
def registry() -> dict[str, Any]:
    # As earlier versions named them, with the run.
    return json.loads(json.dumps({f"run_a_{key.folder}": entry(key) for key in KEYS}))


def test_a_written_registry_is_sound(tmp_path: Path) -> None:
    write_registry(tmp_path, KEYS)
    assert list(registry_problems(read_registry(tmp_path), KEYS)) == []


def test_a_registry_of_an_earlier_version_is_sound(registry: dict[str, Any]) -> None:
    assert list(registry_problems(registry, KEYS)) == []


@pytest.mark.parametrize("text", ["{", "[]"])
def test_unreadable_registry(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(InputError, match="registry"):
        read_registry(tmp_path)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda r: r.pop("run_a_dpo_clean_val"), "dataset dpo_clean_val has no entry"),
        (lambda r: r.update(other={}), "entry 'other' has no dataset"),
        (lambda r: r["run_a_sft_clean_val"]["tags"].pop("system_tag"), "tags.system_tag is missing"),
        (lambda r: r["run_a_dpo_vision_val"]["columns"].pop("images"), "columns.images is missing"),
        (lambda r: r["run_a_dpo_clean_val"].pop("ranking"), "ranking is missing"),
        (lambda r: r["run_a_sft_clean_val"].update(ranking=True), "ranking is not known"),
        (lambda r: r["run_a_dpo_clean_val"].update(file_name="x"), "file_name is 'x', needed 'dpo_clean_val/"),
    ],
)  # fmt: skip
def test_registry_faults(registry: dict[str, Any], plant: Any, message: str) -> None:
    plant(registry)
    (problem,) = registry_problems(registry, KEYS)
    assert message in problem


def test_grid() -> None:
    assert list(grid_problems(KEYS)) == []
    assert list(grid_problems(dataset_keys(["clean"], ["train"]))) == []
    assert list(grid_problems(KEYS[:-1])) == ["dataset dpo_vision_val is missing"]
    assert "no dataset at all" in "".join(grid_problems([]))


def test_counts() -> None:
    summary = {"datasets": {"a": {"rows": 2}, "b": {"rows": 3}}}
    assert list(count_problems(summary, {"a": 2, "b": 3})) == []
    expected = ["a: 1 rows, but 2 in summary.json", "b: no rows, but 3 in summary.json"]
    assert list(count_problems(summary, {"a": 1})) == expected
    assert list(count_problems({"datasets": {"a": {"rows": 0}}}, {"a": 0})) == ["a: no rows"]
