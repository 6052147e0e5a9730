"""The vLLM engine, for real: equal to the transformers engine, whatever the order, the neighbours and the text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import stages.score_reviews as stage
from benchmarks.scoring_work import distinct_tokens
from prefmill.checklist.engine import TransformersConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist
from prefmill.core.artifact import Provenance
from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.vllm.judging import HOSTILE, TOLERANCE, close, p_yes, papers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scored(engine: Any, texts: list[str]) -> dict[str, list[float]]:
    return p_yes(list(engine.score(papers(texts))))


def test_it_equals_the_transformers_engine(scored: dict[str, list[float]], judge: Path, texts: list[str]) -> None:
    other = open_engine(TransformersConfig(model_name_or_path=str(judge)), load_checklist())
    expected = p_yes(list(other.score(papers(texts))))
    assert scored.keys() == expected.keys()
    assert all(close(scored[name], expected[name]) for name in scored)
    spread = [value for values in expected.values() for value in values]
    assert min(spread) < 0.2 < 0.8 < max(spread)  # else equality would say nothing


def test_outcomes_come_in_the_order_given(engine: Any, texts: list[str]) -> None:
    assert [outcome.review_id for outcome in engine.score(papers(texts))] == [f"r{n}" for n in range(len(texts))]


def test_neither_order_nor_neighbours_matter(engine: Any, scored: dict[str, list[float]], texts: list[str]) -> None:
    shuffled = papers(texts)
    random.Random(3).shuffle(shuffled)
    again = p_yes(list(engine.score(shuffled)))
    alone = p_yes(list(engine.score(papers(texts)[:1])))
    assert all(close(again[name], scored[name]) for name in scored)
    assert all(close(alone[name], scored[name]) for name in alone)


def test_hostile_text_moves_no_other_score(engine: Any, scored: dict[str, list[float]], texts: list[str]) -> None:
    for paper, reviews in papers(texts)[:2]:
        for name, text in HOSTILE.items():
            between = [item for review in reviews for item in (review, {**review, "review_id": "h", "text": text})]
            found = p_yes(list(engine.score([(paper, between)])))
            assert all(close(found[review["review_id"]], scored[review["review_id"]]) for review in reviews), name
            assert all(0 <= value <= 1 for value in found["h"])


def test_an_over_long_review_fails_alone(engine: Any, texts: list[str]) -> None:
    ((paper, reviews),) = papers([texts[0], "word " * 3000, texts[1]])
    first, long, last = engine.score([(paper, reviews)])
    assert long.failure is not None
    assert "with room for" in long.failure
    assert first.failure is None
    assert last.failure is None


def test_the_cache_reads_shared_prefixes_once(engine: Any, texts: list[str]) -> None:
    tokens, cached, requests = engine.num_prompt_tokens, engine.num_cached_tokens, engine.num_requests
    list(engine.score(papers([f"{text} Again." for text in texts[:8]])))
    assert engine.num_requests - requests == 8 * 24
    assert (engine.num_cached_tokens - cached) / (engine.num_prompt_tokens - tokens) > 0.5


def test_an_item_rereads_less_than_the_smallest_block(engine: Any, texts: list[str]) -> None:
    rows = papers(texts)
    prompts = [
        engine.prompts.shared(paper) + engine.prompts.foreign(review["text"]) + question
        for paper, reviews in rows for review in reviews for question in engine.prompts.questions
    ]  # fmt: skip
    engine._llm.reset_prefix_cache()
    before = engine.num_prompt_tokens - engine.num_cached_tokens
    assert len(list(engine.score(rows))) * 24 == len(prompts)
    read = engine.num_prompt_tokens - engine.num_cached_tokens - before
    assert distinct_tokens(prompts) <= read <= distinct_tokens(prompts) + 32 * len(prompts)


def test_a_caller_that_stops_leaves_nothing_behind(
    engine: Any, scored: dict[str, list[float]], texts: list[str]
) -> None:
    stream = engine.score(papers(texts))
    next(stream)
    stream.close()
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert p_yes(list(engine.score(papers(texts)[:1])))["r0"] == pytest.approx(scored["r0"], abs=TOLERANCE)


def test_a_stopped_shard_asks_only_for_what_is_missing(
    engine: Any, scored: dict[str, list[float]], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = papers(texts[:20])
    reviews = sorted((row for _, group in rows for row in group), key=lambda row: (row["paper_id"], row["review_id"]))
    write_jsonl(tmp_path / "c" / "papers.jsonl", [paper for paper, _ in rows])
    write_jsonl(tmp_path / "c" / "reviews.jsonl", reviews)
    corpus = publish(tmp_path / "c", "review_corpus", Provenance("s", "all", "f", {}, {}, "0", {}), {})
    task = Task("r", "score_reviews", "all", {}, {}, {"corpus": (corpus,)}, tmp_path / "o", tmp_path)
    monkeypatch.setattr(stage, "open_engine", lambda *_: engine)
    any_judge = {"min_answer_mass": 0, "max_same_answer": 1}
    settings = {"engine": {"engine": "vllm", "model_name_or_path": "it"}, "judge": any_judge}
    config = validate(stage.ScoreReviewsConfig, settings)
    journal = task.work / "outcomes.journal"

    def stop(*_: Any) -> None:
        if len(journal.read_bytes().splitlines()) >= 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Task, "progress", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.run(config, task)
    kept = len(journal.read_bytes().splitlines())
    assert 7 <= kept < 20
    before = engine.num_requests
    metrics = stage.run(config, task)
    assert engine.num_requests - before == (20 - kept) * 24
    assert 0 < metrics["cache_hit_rate"] < 1
    found = list(read_jsonl(task.output / "review_evaluations.jsonl"))
    assert [row["review_id"] for row in found] == [review["review_id"] for review in reviews]
    assert all(close([a["p_yes"] for a in row["answers"].values()], scored[row["review_id"]]) for row in found)
