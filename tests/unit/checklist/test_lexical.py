"""The lexical engine's mechanics: sentences, evidence, prefilter, counting, hostile text, speed."""

from __future__ import annotations

import functools
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmill.checklist.engine import LexicalConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import Checklist, load_checklist
from prefmill.checklist.lexical import EVIDENCE_CHARACTERS, LexicalEngine, Sentences
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.reviews.generated import generate

SHIPPED = load_checklist()


def checklist(*rules: dict[str, Any] | None, weights: tuple[float, ...] = ()) -> Checklist:
    items = [{"id": f"item{number}", "question": f"Is it {number}?", "source": "test"} for number in range(len(rules))]
    for item, rule in zip(items, rules, strict=True):
        item.update({"rule": rule} if rule else {})
    for item, weight in zip(items, weights, strict=False):
        item["weight"] = weight
    return validate(Checklist, {"name": "t", "items": items})


def yes(text: str, rule: dict[str, Any]) -> bool:
    return LexicalEngine(LexicalConfig(), checklist(rule)).answers(text)["item0"]["yes"]


@functools.cache
def shipped_engine() -> LexicalEngine:
    return LexicalEngine(LexicalConfig(), SHIPPED)


def sentences(text: str) -> list[str]:
    return Sentences(text).sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["one.", "two!", "three?"]),
        ("As in Smith et al. (2019) and Fig. 3 here. Next.", ["as in smith et al. (2019) and fig. 3 here.", "next."]),
        ("In general. Then", ["in general.", "then"]),
        ("A value of 0.5 stays. So", ["a value of 0.5 stays.", "so"]),
        ("- point\n\n- other", ["- point", "- other"]),
        ('He said "so." Then', ['he said "so."', "then"]),
        ("# Heading\nText", ["", "text"]),
        ("spaced . out", ["spaced .", "out"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_text_without_stops_is_cut() -> None:
    parts = sentences("word " * 5000)
    assert max(map(len, parts)) <= 1000
    assert sum(part.count("word") for part in parts) >= 5000 - 25


def test_capitals_that_grow_in_lowercase_keep_their_place() -> None:
    answers = shipped_engine().answers("İİİ İ. My main concern is İ.")
    assert answers["weaknesses"]["evidence"] == "My main concern is İ."


def test_curly_apostrophes_count_as_straight_ones() -> None:
    assert yes("I’d like more.", {"any_of": ["\\bi'd like"]})


def test_evidence_is_one_line_and_short() -> None:
    long = "I thank the authors   for\tthe work, " + "and so on " * 40 + "end."
    evidence = shipped_engine().answers(long)["courtesy"]["evidence"]
    assert len(evidence) <= EVIDENCE_CHARACTERS + 2
    assert evidence.endswith(" …")
    assert evidence.startswith("I thank the authors for the work, and so on")


def test_evidence_is_the_first_sentence_and_can_be_left_out() -> None:
    text = "Fine. The code is public. The code is online."
    with_evidence = shipped_engine().answers(text)["reproducibility"]
    assert with_evidence["evidence"] == "The code is public."
    assert LexicalEngine(LexicalConfig(evidence=False), SHIPPED).answers(text)["reproducibility"] == {
        "yes": True, "p_yes": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha beta.", True),
        ("alpha. beta.", False),  # not in one sentence
        ("alpha beta gamma.", False),
        ("alpha beta gamma. alpha beta.", True),
        ("beta.", False),
        ("ALPHA BETA.", True),
    ],
)
def test_all_of_any_of_and_none_of_hold_within_a_sentence(text: str, expected: bool) -> None:
    assert yes(text, {"all_of": ["alpha"], "any_of": ["beta", "delta"], "none_of": ["gamma"]}) is expected


def test_min_count_counts_sentences() -> None:
    rule = {"any_of": ["\\bwhy\\b"], "min_count": 2}
    assert not yes("Why why why?", rule)
    assert yes("Why? Because. Why?", rule)


def test_items_without_a_rule_are_named() -> None:
    with pytest.raises(ConfigError, match=r"item1, item2"):
        open_engine(LexicalConfig(), checklist({"any_of": ["a"]}, None, None))


def test_checkmark_score_is_the_weighted_number_of_yes() -> None:
    rules = [{"any_of": [word]} for word in ("alpha", "beta", "gamma")]
    engine = open_engine(LexicalConfig(), checklist(*rules, weights=(2.0, 0.5, 1.0)))
    papers: Any = [({"paper_id": "p"}, [{"review_id": "r", "paper_id": "p", "text": "alpha beta"}])]
    (row,) = engine.evaluate(papers)
    assert (row["checkmark_score"], row["mean_p_yes"], row["engine"]) == (2.5, 0.666667, "lexical")


def brute_force(text: str) -> dict[str, bool]:
    """The rules by their definition: every pattern on every sentence."""
    found = {}
    for item in SHIPPED.items:
        assert item.rule is not None
        rule, count = item.rule, 0
        for sentence in sentences(text):
            hits = all(re.search(pattern, sentence) for pattern in rule.all_of)
            hits = hits and (not rule.any_of or any(re.search(pattern, sentence) for pattern in rule.any_of))
            count += hits and not any(re.search(pattern, sentence) for pattern in rule.none_of)
        found[item.id] = count >= rule.min_count
    return found


def test_the_word_look_up_rules_nothing_out_that_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefmill.checklist.lexical.MAX_WORDS", 50)  # forgetting words must not matter either
    engine = LexicalEngine(LexicalConfig(), SHIPPED)
    for row in generate(5, 30):
        answers = engine.answers(row["review_text"])
        assert {name: answer["yes"] for name, answer in answers.items()} == brute_force(row["review_text"])


FRAGMENTS = ["et al.", "[3]", "(2019)", "why?", "error bars", "i would like to see", "“a quotation of some length”",
             "5 %", "table 2", "L123", "p. 4", "code is", "available", "lacks", "not clear", ".", "\n", "#", "claim",
             "support", "state-of-the-art", "i'd suggest", "reject", "because", "f1 score", "thank", "you"]  # fmt: skip


@settings(max_examples=200)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=12).map(" ".join))
def test_any_text_is_answered_as_by_definition(text: str) -> None:
    answers = shipped_engine().answers(text)
    assert {name: answer["yes"] for name, answer in answers.items()} == brute_force(text)


@pytest.mark.timing
@pytest.mark.parametrize(
    "unit", ["a", "a ", "this paper ", "claim ", '"', "why ", "the results ", "1", "((((", "- ", "authors the the "]
)
def test_no_text_makes_a_rule_run_away(unit: str) -> None:
    engine = shipped_engine()
    text = unit * (100_000 // len(unit))
    start = time.process_time()
    engine.answers(text)
    assert time.process_time() - start < 3.0


@pytest.mark.timing
@pytest.mark.slow
def test_thousands_of_reviews_a_second() -> None:
    texts = [row["review_text"] for row in generate(0, 800)]
    engine = LexicalEngine(LexicalConfig(), SHIPPED)
    start = time.process_time()
    for text in texts:
        engine.answers(text)
    rate = len(texts) / (time.process_time() - start)
    assert rate > 3000, f"{rate:.0f} reviews per second"  # about 10,000 where this was written
