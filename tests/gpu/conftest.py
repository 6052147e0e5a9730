"""Each test runs on a CPU with small sizes, in `make test`, and on a GPU with true ones, in `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefmill.store.jsonl import write_jsonl
from tests.tiny import pair_rows, save_tiny_qwen2

NO_GPU = "there is no GPU here: run `make test-gpu` on a machine with one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip in words what asks for a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test runs, and by that at which size; a GPU's memory is given back after it."""
    yield torch.device(request.param)
    if request.param == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2's folder."""
    return save_tiny_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts with two pairs each."""
    path = tmp_path_factory.mktemp("pairs") / "data.jsonl"
    write_jsonl(path, pair_rows(8))
    return path
