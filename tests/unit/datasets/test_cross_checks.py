"""Each check over many rows: sound rows pass, and the fault planted among them is named with its place."""

from __future__ import annotations

from typing import Any

import pytest

from prefmill.datasets.cross_checks import Leaks, Repeats, order_problems, rating_problems_of
from prefmill.datasets.examples import Answered, CheckedRow
from prefmill.datasets.findings import Findings
from prefmill.datasets.occurrences import Files, Occurrences, fingerprint
from prefmill.datasets.registry import DatasetKey
from prefmill.reviews.scale import moments

LONG = "A long review. " * 40


def example(line: int, row_id: str = "", texts: tuple[str, ...] = (LONG,), **changes: Any) -> CheckedRow:
    answers = tuple(Answered(f"{text}\nRating: 5", text, 5.0) for text in texts)
    key = DatasetKey("dpo" if len(texts) == 2 else "sft", "clean", changes.pop("split", "train"))
    found = CheckedRow(key, line, row_id or f"r{line}", f"p{line}", f"Title: T{line}", answers, (), (), None, None)
    return found._replace(**changes)


def found_in(report: Any) -> list[tuple[str, str, str, str]]:
    findings = Findings(max_listed=20)
    report(findings)
    return [tuple(finding) for finding in findings.listed]


def repeats_in(*examples: CheckedRow) -> list[tuple[str, str, str, str]]:
    repeats = Repeats(Files())
    for item in examples:
        repeats.add(item, tuple(fingerprint(answer.text) for answer in item.answers))
    return found_in(repeats.report)


def leaks_in(
    *examples: CheckedRow, held_out: str | None = None, abstract: str | None = None
) -> list[tuple[str, str, str, str]]:
    leaks = Leaks(Files(), min_shared_characters=400)
    for item in examples:
        leaks.add_example(item, tuple(fingerprint(answer.text) for answer in item.answers), True)
    if held_out:
        leaks.add_paper("test", "other", (held_out, abstract), "corpus papers.jsonl", 7)
    return found_in(leaks.report)


def test_an_abstract_under_another_title_is_told() -> None:
    """A renamed version of a training paper stood in the test without a word."""
    abstract = "We study masks.\n\nMore of it. " * 20
    trained = example(1, prompt=f"Review this paper.\n\nTitle: One\n\nAbstract: {abstract.strip()}\n\nPaper: Text.")
    (found,) = leaks_in(trained, held_out="Another", abstract=abstract)
    assert found[:2] == ("leakage", "warning")
    assert found[3].startswith("abstract of train is also in test: corpus papers.jsonl:7")
    assert leaks_in(trained, held_out="Another", abstract="We study shades. " * 40) == []
    short = example(1, prompt="Review this paper.\n\nTitle: One\n\nAbstract: Withdrawn.")
    assert leaks_in(short, held_out="Another", abstract="Withdrawn.") == []


def test_a_review_that_was_edited_is_told() -> None:
    """As of a resubmission: nothing but the very words was found."""
    words = [f"word{number}" for number in range(120)]
    edited = [*words[:40], "another", *words[41:]]
    (found,) = leaks_in(
        example(1, texts=(" ".join(words),)), example(2, texts=(" ".join(edited),), split="val"), held_out="Another"
    )
    assert found[:2] == ("leakage", "warning")
    assert found[3] == "review text of train is nearly the same in val: sft_clean_val/data.jsonl:2"
    abstract = example(1, prompt=f"Review this paper.\n\nTitle: One\n\nAbstract: {' '.join(words)}\n\nPaper: Text.")
    (found,) = leaks_in(abstract, held_out="Another", abstract=" ".join(edited))
    assert found[3].startswith("abstract of train is nearly the same in test: corpus papers.jsonl:7")
    other = " ".join(words[:30] + [f"more{number}" for number in range(90)])
    assert leaks_in(example(1, texts=(" ".join(words),)), example(2, texts=(other,), split="val")) == []


def test_order_of_sorted_rows_is_fine() -> None:
    first = example(1)
    assert not [*order_problems(None, first), *order_problems(first, example(2))]
    assert not [*order_problems(first, example(2, paper_id="p1", prompt=first.prompt))]


def test_order_faults() -> None:
    first = example(1)
    (problem,) = order_problems(example(2), first)
    assert "paper p1 after p2" in problem
    (problem,) = order_problems(first, example(2, paper_id="p1", prompt="another"))
    assert "another prompt for paper p1 than in line 1" in problem
    (problem,) = order_problems(first, first._replace(images=("x",)))
    assert "another prompt" in problem


def test_distinct_rows_are_no_repeats() -> None:
    assert repeats_in(example(1, texts=("a", "b")), example(2, texts=("a", "c")), example(3, texts=("c", "b"))) == []


def test_duplicates() -> None:
    (found,) = repeats_in(example(1, "same"), example(2, texts=("x",)), example(3, "same", texts=("y",)))
    assert found[:3] == ("duplicates", "error", "sft_clean_train/data.jsonl:3")
    assert found[3].endswith("sft_clean_train/data.jsonl:1")
    (found,) = repeats_in(example(1, texts=("Same text",)), example(2, texts=("same  TEXT",)))
    assert found[:2] == ("duplicates", "warning")


def test_contradictions_are_found_across_splits_and_named_once() -> None:
    found = repeats_in(example(1, texts=("a", "b")), example(9, texts=("b", "a"), split="val"))
    assert [item[:3] for item in found] == [("contradictions", "error", "dpo_clean_val/data.jsonl:9")]
    assert "dpo_clean_train/data.jsonl:1" in found[0][3]


def test_no_leaks_between_different_papers() -> None:
    assert leaks_in(example(1), example(2, texts=(LONG + "x",), split="val"), held_out="T3") == []


@pytest.mark.parametrize(
    ("twin", "what"),
    [
        ({"paper_id": "p1"}, "paper"),
        ({"prompt": "Title: t1 "}, "title"),
        ({"texts": (LONG.upper(),)}, "review text"),
    ],
)
def test_leaks_between_train_and_val(twin: dict[str, Any], what: str) -> None:
    fresh = {"texts": (LONG + "x",)}
    found = leaks_in(example(1), example(2, split="val", **{**fresh, **twin}))
    message = f"{what} of train is also in val: sft_clean_val/data.jsonl:2"
    assert found == [("leakage", "error", "sft_clean_train/data.jsonl:1", message)]


def test_leaks_into_held_out_papers() -> None:
    for split in ("train", "val"):
        (found,) = leaks_in(example(1, split=split), held_out="T1")
        assert found[3] == f"title of {split} is also in test: corpus papers.jsonl:7"


def test_short_reviews_may_repeat() -> None:
    (found,) = leaks_in(example(1, texts=("Fine.",)), example(2, texts=("Fine.",), split="val"))
    assert found[1] == "warning"


def test_ratings() -> None:
    usual = {4.0: 30, 6.0: 40, 8.0: 30}
    assert list(rating_problems_of(usual, {4.0: 8, 6.0: 12, 8.0: 7})) == []
    assert list(rating_problems_of({6.0: 40}, {})) == ["every completion of train has the rating 6"]
    (problem,) = rating_problems_of(usual, {8.0: 30, 6.0: 2})
    assert "mean rating is 6.00 in train and 7.88 in val" in problem
    assert list(rating_problems_of(usual, {8.0: 3})) == [], "three rows say nothing"


def test_moments_are_those_of_the_values() -> None:
    import numpy as np

    values = [1.0, 1.0, 4.0, 9.5]
    mean, deviation, count = moments({1.0: 2, 4.0: 1, 9.5: 1})
    assert (mean, deviation, count) == pytest.approx((np.mean(values), np.std(values), 4))


def test_occurrences_name_first_places() -> None:
    files = Files()
    left, right = Occurrences(files), Occurrences(files)
    for key, line in ((5, 1), (7, 2), (5, 3), (5, 4)):
        left.add(key, "a", line)
    for key, line in ((9, 1), (5, 2), (5, 8)):
        right.add(key, "b", line)
    assert [(str(a), str(b)) for a, b in left.repeated()] == [("a:1", "a:3"), ("a:1", "a:4")]
    assert [(str(a), str(b)) for a, b in left.shared_with(right)] == [("a:1", "b:2")]
    assert list(Occurrences(files).shared_with(left)) == []


def test_fingerprint_is_blind_to_case_and_space_only() -> None:
    assert fingerprint("A  b\n") == fingerprint("a B")
    assert fingerprint("ab") != fingerprint("a b")
    assert fingerprint("a", "b") != fingerprint("a b")
