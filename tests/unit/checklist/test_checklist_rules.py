"""Every rule of the shipped checklist: a sentence that must fire it and a near miss that must not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from prefmill.checklist.engine import LexicalConfig
from prefmill.checklist.items import load_checklist
from prefmill.checklist.lexical import LexicalEngine
from prefmill.reviews.generated import generate, quality_factors
from prefmill.reviews.synthetic_text import VAGUE

CHECKLIST = load_checklist()
KNOWN = {
    "summary": ("The authors introduce a new loss for parsing.", "I read this paper about parsing."),
    "importance": ("This is a timely and important problem.", "It is an interesting area these days."),
    "originality": ("The idea is a straightforward extension of dropout.", "The original model was trained on text."),
    "related_work": ("Prior work on pruning should be cited.", "How does this relate to the second experiment?"),
    "named_references": ("See Smith et al. (2019) for this.", "Somebody must have done this before."),
    "strengths": ("The experiments are convincing.", "The signal strength is measured in volts."),
    "weaknesses": ("My main concern is the missing proof.", "It concerns graphs."),
    "soundness": ("The proof of the theorem has a gap.", "It sounds like a good plan."),
    "claims": ("Table 3 does not support the claim about speed.", "The baggage claim is at the exit."),
    "baselines": ("Please compare with the method of last year.", "The lines at the base of the plot are red."),
    "evaluation_scope": ("Results on more data sets are needed.", "The data sets in at noon."),
    "ablation": ("I suggest an ablation without masks.", "The whole thing is fine, I guess."),
    "statistics": ("There are no error bars in the plots.", "The error is in the second bar."),
    "reproducibility": ("Will the code be released?", "Code words are sent over a channel."),
    "limitations": ("The limitations are not discussed.", "I have limited time for this."),
    "ethics": ("The societal impact should be discussed.", "The impact on accuracy is small."),
    "clarity": ("The paper is hard to follow.", "It is hard to train such models."),
    "interpretation": ("The results suggest that depth is harmful.", "The results are in the table."),
    "location": ("Figure 3 is cut off.", "I cannot figure out 3 of the terms."),
    "specifics": ("The gain is only 2 points.", "The gain is small at some points."),
    "question": ("How does it behave on long inputs?", "I know how it behaves on long inputs."),
    "suggestion": ("It would be helpful to add a plot.", "This would be a table."),
    "recommendation": ("I vote to reject because the proof is wrong.", "My vote is to reject."),
    "courtesy": ("I thank the authors for their careful work.", "The authors work on parsing."),
}


@pytest.fixture(scope="module")
def engine() -> LexicalEngine:
    return LexicalEngine(LexicalConfig(), CHECKLIST)


def test_every_item_has_a_known_answer() -> None:
    assert tuple(KNOWN) == CHECKLIST.ids
    assert len(KNOWN) == 24


@pytest.mark.parametrize("item", KNOWN)
def test_a_sentence_fires_and_a_near_miss_does_not(engine: LexicalEngine, item: str) -> None:
    fires, misses = KNOWN[item]
    assert engine.answers(f"Well then. {fires} So much for that.")[item] == {
        "yes": True, "p_yes": 1.0, "evidence": fires,
    }  # fmt: skip
    assert engine.answers(f"Well then. {misses} So much for that.")[item] == {"yes": False, "p_yes": 0.0}


def test_vague_sentences_earn_nothing(engine: LexicalEngine) -> None:
    words = {"topic": "parsing", "data": "poems"}
    for sentence in VAGUE:
        assert not [name for name, answer in engine.answers(sentence % words).items() if answer["yes"]], sentence


def test_a_form_heading_earns_nothing(engine: LexicalEngine) -> None:
    text = "## Strengths and weaknesses\n### Clarity, novelty and reproducibility\n## Limitations"
    assert not [name for name, answer in engine.answers(text).items() if answer["yes"]]


def test_score_follows_the_generators_quality_factors(engine: LexicalEngine) -> None:
    texts = [row["review_text"] for row in generate(3, 150)]
    scores = [sum(answer["yes"] for answer in engine.answers(text).values()) for text in texts]
    factors = [sum(quality_factors(text).values()) for text in texts]
    assert _correlation(scores, factors) > 0.95


def test_each_quality_factor_decides_an_item(engine: LexicalEngine) -> None:
    texts = [row["review_text"] for row in generate(3, 60)]
    answers = [engine.answers(text) for text in texts]
    for factor in quality_factors(""):
        holds = [quality_factors(text)[factor] for text in texts]
        best = max(_correlation([row[item]["yes"] for row in answers], holds) for item in CHECKLIST.ids)
        assert best > 0.75, factor


def test_no_item_is_constant_on_real_reviews(engine: LexicalEngine, reviews_file: Path) -> None:
    with gzip.open(reviews_file, "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["review_text"] for line in list(stream)[::10]]
    answers = [engine.answers(text) for text in texts]
    rates = {item: sum(row[item]["yes"] for row in answers) / len(answers) for item in CHECKLIST.ids}
    assert {item: rate for item, rate in rates.items() if not 0.01 < rate < 0.95} == {}


def _correlation(left: list[int], right: list[int]) -> float:
    import numpy as np

    if len(set(left)) < 2:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
