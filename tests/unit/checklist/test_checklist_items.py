"""Loading checklists: what is shipped, what is refused, and what the message says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prefmill.checklist.human_labels import read_item_labels
from prefmill.checklist.items import load_checklist, save_checklist
from prefmill.checklist.patterns import compile_patterns
from prefmill.core.errors import ConfigError, InputError

GOOD: dict[str, Any] = {"id": "one", "question": "Is it?", "source": "test", "rule": {"any_of": ["\\bone\\b"]}}


def write(folder: Path, *items: dict[str, Any], **extra: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "items": list(items), **extra}))
    return path


def test_the_shipped_checklist_is_complete() -> None:
    checklist = load_checklist()
    assert len(checklist.items) == len(set(checklist.ids)) == 24
    for item in checklist.items:
        assert item.question.endswith("?")
        assert item.paraphrases
        assert item.rule is not None
        assert item.weight == 1
        assert any(guide in item.source for guide in ("RQI", "ARR", "NeurIPS", "ICLR")), item.id
    for guide in ("RQI", "ARR", "NeurIPS", "ICLR"):
        assert sum(guide in item.source for item in checklist.items) >= 4


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    save_checklist(load_checklist(), tmp_path / "checklist.json")
    assert load_checklist(tmp_path / "checklist.json") == load_checklist()


def test_a_users_checklist_is_read(tmp_path: Path) -> None:
    checklist = load_checklist(
        write(tmp_path, {**GOOD, "weight": 2}, {**GOOD, "id": "two", "question": "Else?", "rule": None})
    )
    assert checklist.ids == ("one", "two")
    assert checklist.items[0].weight == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "Not An Id"}, r"items\[0\]\.id = 'Not An Id'"),
        ({"question": " "}, r"items\[0\]\.question.*not blank"),
        ({"paraphrases": [""]}, r"items\[0\]\.paraphrases\[0\].*not blank"),
        ({"weight": 0}, r"items\[0\]\.weight = 0"),
        ({"weight": float("nan")}, r"items\[0\]\.weight"),
        ({"wieght": 1}, r"items\[0\]\.wieght: unknown key \(did you mean 'weight'\?\)"),
        ({"source": None}, r"items\[0\]\.source"),
        ({"rule": {}}, "a rule needs any_of or all_of"),
        ({"rule": {"any_of": ["("]}}, r"items\[0\]\.rule\.any_of\[0\].*is not a regular expression"),
        ({"rule": {"any_of": ["fine", "a.*b"]}}, r"any_of\[1\].*repeats without a bound"),
        ({"rule": {"any_of": ["a+"]}}, "repeats without a bound"),
        ({"rule": {"any_of": ["(a{0,99}){0,99}"]}}, "can be tried in"),
        ({"rule": {"none_of": ["x"]}}, "a rule needs any_of or all_of"),
        ({"rule": {"any_of": ["Capital"]}}, "holds the capital 'C'"),
        ({"rule": {"any_of": ["(a)\\1"]}}, "back-reference"),
        ({"rule": {"any_of": ["a"], "min_count": 0}}, "min_count = 0"),
        ({"rule": {"anyof": ["a"]}}, r"rule\.anyof: unknown key \(did you mean 'any_of'\?\)"),
    ],
)
def test_bad_items_are_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {**GOOD, **changes})
    with pytest.raises(ConfigError, match=message) as caught:
        load_checklist(path)
    assert str(path) in str(caught.value)


def test_repeated_ids_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than once: one, two"):
        load_checklist(write(tmp_path, GOOD, {**GOOD, "id": "two"}, GOOD, {**GOOD, "id": "two"}))


@pytest.mark.parametrize(
    "second",
    [{}, {"question": " IS  IT?\n"}],
)
def test_a_question_asked_twice_is_refused_and_is_accepted_once(tmp_path: Path, second: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"asked more than once, so keep one of them.*\(one\).*\(two\)"):
        load_checklist(write(tmp_path, GOOD, {**GOOD, "id": "two", **second}))
    assert load_checklist(write(tmp_path, GOOD)).ids == ("one",)


def test_a_checklist_that_an_optimisation_wrote_before_is_read(tmp_path: Path) -> None:
    """It has a paraphrase as an item beside the item that lists it."""
    second = {**GOOD, "id": "two", "question": "Else?", "paraphrases": ["is it?"]}
    assert load_checklist(write(tmp_path, GOOD, second)).ids == ("one", "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [("items: [", "unreadable YAML"), ("- a\n- b\n", "keys and values"), ("name: x\nitems: []\n", "items"),
     ("name: x\n", "items: required")],
)  # fmt: skip
def test_bad_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_checklist(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_checklist(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("pattern", "literals"),
    [
        (r"\berror[- ]?bars?\b", {"error"}),
        (r"\bcode\b.{0,30}\b(?:available|public)", {"available", "public"}),
        (r"\bcode\b.{0,30}\b(?:new|old)", {"code"}),
        (r"\b(?:main|key) strength", {"strength"}),
        (r"(?:why|how)\b[^?]{1,250}\?", {"why", "how"}),
        (r"\b(?:is|are|why|how)\b[^?]{1,250}\?", {"?"}),
        (r"\d{1,4} ?%", {"%"}),
        (r"(?:a|)b?", set()),
        (r".{1,5}", set()),
    ],
)
def test_literals_stand_in_every_match(pattern: str, literals: set[str]) -> None:
    assert compile_patterns((pattern,)).literals == literals


def test_one_pattern_without_literals_leaves_none() -> None:
    assert compile_patterns(("fine", r"\w{3}\s\w{3}")).literals == frozenset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("review_id,item_id,label\nr,one,well, yes\n", "more cells than the table"),
        ("review_id,item_id,label,label\nr,one,yes,no\n", "name every column once"),
        ('review_id,item_id,label\nr,one,yes,"open\n', "quote that is not closed"),
    ],
)
def test_a_label_that_may_stand_elsewhere_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_item_labels(tmp_path / "x.csv", ["r"], ["one"])


def test_answers_are_written_in_several_ways(tmp_path: Path) -> None:
    given = {"yes": True, "Y": True, "TRUE": True, "1.0": True, "no": False, "n": False, "False": False, "0": False}
    lines = [f"r{number},one,{text}\n" for number, text in enumerate(given)]
    (tmp_path / "x.csv").write_text("review_id,item_id,label\n" + "".join(lines))
    ids = [f"r{number}" for number in range(len(given))]
    assert [label.yes for label in read_item_labels(tmp_path / "x.csv", ids, ["one"])] == list(given.values())
