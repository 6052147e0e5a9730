"""The changed reviews a judge is probed with: the same words elsewhere, more words, instructions at the end."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from prefmill.checklist.items import load_checklist
from prefmill.checklist.judge_probes import (
    CONTROL,
    END,
    FRONT,
    INJECTIONS,
    MAX_PADDING_WORDS,
    PADDED,
    UNCHANGED,
    Sampled,
    rules_of,
    sample,
    variants,
)
from prefmill.checklist.lexical import LexicalConfig, LexicalEngine
from prefmill.reviews.generated import generate

PAPER: Any = {"paper_id": "p", "title": "", "abstract": "", "text": ""}
TEXT = "# Summary\nThe idea is simple. I could not find any variance or significance test.\n- Typos remain. The end"


def review(text: str, name: str = "r") -> Any:
    return {"review_id": name, "paper_id": "p", "text": text, "rating": 5.0, "confidence": 3.0}


@cache
def shipped_rules() -> Any:
    return rules_of(load_checklist())


def changed(text: str, quotes: dict[str, str] | None = None, rules: Any = None, seed: int = 0) -> dict[str, Any]:
    found = variants(Sampled(PAPER, review(text), quotes or {}), shipped_rules() if rules is None else rules, seed)
    return {name: (item, result) for name, item, result in found}


def test_every_change_of_real_reviews_keeps_their_words() -> None:
    engine = LexicalEngine(LexicalConfig(), load_checklist())
    num_moved = 0
    for row in list(generate(0, 8))[:25]:
        text = row["review_text"]
        before = engine.answers(text)
        found = changed(text)
        assert found[UNCHANGED] == (None, text)
        if FRONT in found:
            num_moved += 1
            item = found[FRONT][0]
            assert item == found[END][0]
            assert before[item]["yes"]
            front, end = (found[name][1] for name in (FRONT, END))
            assert sorted(front.split()) == sorted(end.split()) == sorted(text.split())
            sentence = front.split("\n\n")[0]
            assert end.endswith(sentence)
            assert engine.answers(sentence)[item]["yes"]
        for name, (_, result) in found.items():
            assert {key: a["yes"] for key, a in engine.answers(result).items()} == {
                key: a["yes"] for key, a in before.items()
            }, name
    assert num_moved > 20


def test_the_judges_own_evidence_is_moved_where_it_quotes_any() -> None:
    rules = dict.fromkeys(("a", "b"))
    assert {FRONT, END}.isdisjoint(changed(TEXT, rules=rules))
    assert {FRONT, END}.isdisjoint(changed(TEXT, {"a": "not in the review"}, rules))
    found = changed(TEXT, {"b": "could not find any variance"}, rules)
    assert found[FRONT] == (
        "b",
        "I could not find any variance or significance test.\n\n# Summary\nThe idea is simple. - Typos remain. The end",
    )
    assert found[END][1].endswith("Typos remain. The end\n\nI could not find any variance or significance test.")


@pytest.mark.parametrize("text", ["", "One sentence only.", "Novel idea. Good."])
def test_short_reviews_have_nothing_to_move(text: str) -> None:
    found = changed(text)
    assert {FRONT, END}.isdisjoint(found)
    assert {UNCHANGED, PADDED, CONTROL, *INJECTIONS} == set(found)


def test_what_is_added_stands_at_the_end() -> None:
    found = changed(TEXT + "\n\n")
    for name, line in INJECTIONS.items():
        assert found[name][1] == f"{TEXT}\n\n{line}"
    lengths = [len(line.split()) for line in INJECTIONS.values()]
    neutral = found[CONTROL][1].removeprefix(TEXT)
    assert min(lengths) <= len(neutral.split()) <= max(lengths) + 5
    for text, expected in ((TEXT, len(TEXT.split())), ("word " * 5000, MAX_PADDING_WORDS)):
        padding = changed(text)[PADDED][1].removeprefix(text.rstrip())
        assert expected <= len(padding.split()) <= expected + 10


def test_a_larger_sample_holds_the_smaller_one() -> None:
    ids = [f"r{number}" for number in range(100)]
    small, large = sample(ids, 10, 0), sample(ids[::-1], 40, 0)
    assert len(small) == 10
    assert small < large
    assert sample(ids, 10, 1) != small
    assert sample(ids, 1000, 0) == set(ids)
