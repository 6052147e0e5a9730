"""No architecture is silently wrong, and docs/models.md says what comes of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefmill.families.causal.layout import _PAIRWISE_ONLY
from tests.models.__main__ import PAGE, line, page
from tests.models.matrix import ARCHITECTURES, Row, row_of, silence

SAMPLE = (
    "llama",
    "mistral",
    "gemma2",
    "gpt_oss",
    "llama4_text",
    "lfm2",
    "qwen3_next",
    "bamba",
    "granite",
    "doge",
    "bert",
)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with silence():
        yield


def rows() -> Iterator[Row]:
    yield from (row for name in ARCHITECTURES if isinstance(row := row_of(name), Row))


@pytest.mark.parametrize("model_type", SAMPLE)
def test_an_architecture_is_as_its_row_says(model_type: str) -> None:
    row = row_of(model_type)
    assert isinstance(row, Row)
    assert line(row) in PAGE.read_text()
    assert "WRONG" not in row.group + row.pairwise


@pytest.mark.slow
def test_the_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.models"


@pytest.mark.slow
def test_no_architecture_is_wrong_and_auto_is_group_only_where_that_works() -> None:
    assert [row for row in rows() if "WRONG" in row.group + row.pairwise] == []
    tried = {row.model_type for row in rows() if row.pairwise == "works" and row.group.endswith(
        ("own likelihoods", "the model's own", "to their attention"))}  # fmt: skip
    assert tried == _PAIRWISE_ONLY
    assert sum(row.pairwise == "works" for row in rows()) > 120
