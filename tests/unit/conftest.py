"""One tiny model and one set of pairs for all tests of preference training."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.store.jsonl import write_jsonl
from tests.tiny import pair_rows, save_tiny_qwen2


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "data.jsonl"
    write_jsonl(path, pair_rows(8))
    return path
