"""Fixtures shared by every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: tests on a shared machine are steadier with one thread, and forked ranks need it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; a test that needs it is skipped elsewhere."""
    folder = Path(os.environ.get("PREFMILL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data is not beside this checkout: set PREFMILL_TEST_DATA to its folder to run this test")
    return folder


@pytest.fixture(scope="session")
def reviews_file(shared_data: Path) -> Path:
    """The real ICLR reviews."""
    path = shared_data / "reviews" / "iclr_reviews.jsonl.gz"
    if not path.is_file():
        pytest.skip("iclr_reviews.jsonl.gz is not in the data folder: put it there to run this test")
    return path
