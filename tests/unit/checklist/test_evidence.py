"""Evidence: only what stands in the review, in the review's own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.checklist.engine import Outcome, TransformersConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.evidence import MAX_CHARACTERS, MIN_CHARACTERS, find_passage, verified_quote
from prefmill.checklist.items import load_checklist
from tests.quoting import QUOTED, TRAINING_WORDS, save_quoting_model
from tests.unit.checklist.conftest import make_tokenizer

REVIEW = "The  paper’s idea is “new”.\nTable 3 shows the gain –  2 points. ÀÉİ ends it."


@pytest.mark.parametrize(
    ("quote", "found"),
    [
        ("Table 3 shows the gain", "Table 3 shows the gain"),
        ("table 3 SHOWS the gain - 2 points.", "Table 3 shows the gain –  2 points"),
        ('The paper\'s idea is "new". Table 3', "The  paper’s idea is “new”.\nTable 3"),
        ('"... Table 3 shows the gain..."', "Table 3 shows the gain"),
        ("àÉİ ends it.", "ÀÉİ ends it"),
        ("able 3 shows the gain", None),  # not from within a word
        ("Table 3 shows the gai", None),
        ("Table 4 shows the gain", None),
        ("The paper's idea was new", None),
        ("idea is", None),  # shorter than is worth quoting
        ("", None),
        ("x" * 400, None),
    ],
)
def test_a_quote_is_found_in_the_reviews_own_words(quote: str, found: str | None) -> None:
    assert verified_quote(json.dumps({"quote": quote}), REVIEW) == found
    assert found is None or found in REVIEW


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Table 3 shows the gain",
        '{"quote": "Table 3 shows the',
        "[]",
        '{"quote": 3}',
        "{}",
        "null",
        '{"quote": null}',
    ],
)
def test_what_is_no_whole_json_of_the_form_is_no_evidence(answer: str) -> None:
    assert verified_quote(answer, REVIEW) is None


def test_text_behind_the_json_does_no_harm_and_a_tab_within_neither() -> None:
    assert verified_quote('{"quote":"Table 3\tshows the gain"}', REVIEW) == "Table 3 shows the gain"
    assert verified_quote('\n{"quote":"Table 3 shows the gain"} I hope', REVIEW) == "Table 3 shows the gain"


@given(st.text(max_size=60), st.text(max_size=400))
def test_evidence_always_stands_in_the_review(quote: str, review: str) -> None:
    found = find_passage(quote, review)
    assert found is None or found in review


@given(st.lists(st.from_regex(r"[a-z]{2,9}", fullmatch=True), min_size=3, max_size=40), st.data())
def test_every_run_of_whole_words_is_found(words: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words) - 1))
    quote = " ".join(words[start : data.draw(st.integers(start + 1, len(words)))])
    found = find_passage(quote.upper(), "\n".join(words))
    assert found is None if not MIN_CHARACTERS <= len(quote) <= MAX_CHARACTERS else found is not None


@pytest.fixture(scope="module")
def quoting_judge(tmp_path_factory: pytest.TempPathFactory, corpus_texts: list[str]) -> Path:
    tokenizer = make_tokenizer([*corpus_texts, *TRAINING_WORDS, *["Yes No"] * 50, *["No Yes"] * 50], 600)
    return save_quoting_model(tmp_path_factory.mktemp("quoting"), tokenizer)


def score(model: Path, texts: list[str], **settings: object) -> list[Outcome]:
    paper = {"paper_id": "p0", "title": "Sparse masks", "abstract": "We study masks.", "text": ""}
    reviews = [{"review_id": f"r{n}", "paper_id": "p0", "text": text} for n, text in enumerate(texts)]
    engine = open_engine(
        TransformersConfig.model_validate({"model_name_or_path": str(model), **settings}), load_checklist()
    )
    return list(engine.score([(paper, reviews)]))  # type: ignore[list-item]


def test_the_transformers_engine_quotes_what_stands_there_and_nothing_else(
    quoting_judge: Path, corpus_texts: list[str]
) -> None:
    texts = [corpus_texts[0], f"{corpus_texts[0]} Well, {QUOTED.lower()}", "", f"{QUOTED} {corpus_texts[1]}"]
    plain = score(quoting_judge, texts)
    for size in (5, 32):
        found = score(quoting_judge, texts, evidence=True, evidence_max_tokens=24, item_batch_size=size)
        quotes = [[answer.get("evidence") for answer in outcome.answers.values()] for outcome in found]
        assert quotes == [[None] * 24, [QUOTED.lower().rstrip(".")] * 24, [None] * 24, [QUOTED.rstrip(".")] * 24]
        for before, after in zip(plain, found, strict=True):
            assert all(answer["yes"] for answer in after.answers.values())
            assert [a["p_yes"] for a in after.answers.values()] == [a["p_yes"] for a in before.answers.values()]


def test_a_quote_cut_off_is_none(quoting_judge: Path) -> None:
    (outcome,) = score(quoting_judge, [QUOTED], evidence=True, evidence_max_tokens=3)
    assert not any("evidence" in answer for answer in outcome.answers.values())


def test_a_quotes_tokens_are_kept_free(tiny_judge: Path, corpus_texts: list[str]) -> None:
    long = " ".join(corpus_texts * 3)
    (plain,) = score(tiny_judge, [long], truncate_reviews=True)
    (quoting,) = score(tiny_judge, [long], truncate_reviews=True, evidence=True, evidence_max_tokens=200)
    assert quoting.num_cut_tokens - plain.num_cut_tokens > 200
