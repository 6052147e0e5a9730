"""Questions as the field's files have them: a choice is known by its label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.families.mdlm.benchmarks import BenchmarkConfig, read_questions
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig
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


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("multiple_choice", {"choices": "['red', 'blue']", "answer": 1}),  # its letters were choices
        ("multiple_choice", {"choices": {"text": "red", "label": ["A", "B"]}, "answer": "B"}),
        ("multiple_choice", {"choices": ["red", None], "answer": 1}),  # "None" was right
        ("multiple_choice", {"choices": ["red", "blue"], "answer": 1.5}),
        ("multiple_choice", {"choices": ["red", "blue"], "answer": True}),
        ("multiple_choice", {"choices": ["red", "blue"], "answer": -1}),
        ("multiple_choice", {"choices": ["red", "blue"], "answer": 2}),
        ("multiple_choice", {"choices": ["red", "blue"], "answer": "J"}),
        ("exact_match", {"target": "red"}),  # the model was to write "None"
        ("exact_match", {"answer": ["red", "blue"]}),
        ("exact_match", {"answer": {"value": "red"}}),
        ("exact_match", {"answer": float("nan")}),
    ],
)
def test_what_is_no_choice_or_answer_is_refused_and_not_made_text_of(
    kind: str, row: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "which", **row}))
    config = {"name": "b", "kind": kind, "file": str(tmp_path / "rows.jsonl")}
    with pytest.raises(InputError, match=f"not a row of {kind}"):
        read_questions(validate(BenchmarkConfig, config))


def test_a_number_of_a_table_with_gaps_is_the_whole_number(tmp_path: Path) -> None:
    for answer in (2.0, "2.0"):
        assert read(tmp_path, "multiple_choice", choices=TEXTS, answer=answer).answer == "three"
    assert read(tmp_path, "exact_match", answer=4.0).answer == "4"


@pytest.mark.parametrize("names", [["a", "a"], ["preference"]])
def test_a_figure_has_a_name_of_its_own(names: list[str]) -> None:
    """Of two benchmarks with one name the second alone was evaluated; `preference_accuracy` was that of questions."""
    benchmarks = [{"name": name, "kind": "exact_match", "file": "rows.jsonl"} for name in names]
    with pytest.raises(ConfigError, match=f"name {names[0]} is taken"):
        validate(DiffusionEvaluationConfig, {"benchmarks": benchmarks})
