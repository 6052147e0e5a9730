"""Questions as the field's files have them: a choice is known by its label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.families.mdlm.benchmarks import BenchmarkConfig, read_questions
from prefmill.store.jsonl import write_jsonl


def read(folder: Path, kind: str, **row: Any) -> Any:
    write_jsonl(folder / "rows.jsonl", [{"question": "which", **row}])
    config = {"name": "b", "kind": kind, "file": str(folder / "rows.jsonl")}
    return read_questions(validate(BenchmarkConfig, config))[0]


TEXTS = ["one", "two", "three", "four"]


@pytest.mark.parametrize("labels", [list("ABCD"), list("1234"), list("0123")])
def test_a_choice_is_known_by_its_label(tmp_path: Path, labels: list[str]) -> None:
    for label, text in zip(labels, TEXTS, strict=True):
        choices = {"text": TEXTS, "label": labels}
        assert read(tmp_path, "multiple_choice", choices=choices, answer=label).answer == text
    with pytest.raises(InputError, match="not a row of multiple_choice"):
        read(tmp_path, "multiple_choice", choices={"text": TEXTS, "label": labels}, answer="E")


def test_without_labels_it_is_a_number_from_0_or_a_letter(tmp_path: Path) -> None:
    assert [read(tmp_path, "multiple_choice", choices=TEXTS, answer=a).answer for a in (0, "3", "B")] == [
        "one", "four", "two"
    ]  # fmt: skip


def test_a_solution_is_no_answer_to_write_word_for_word(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"harness\.tasks=\[gsm8k\]"):
        read(tmp_path, "exact_match", answer="2 + 2 = 4\n#### 4")
