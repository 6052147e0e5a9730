"""Scoring a shard with a model: cut reviews are reported, and a resumed shard ends with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import stages.score_reviews as stage
from prefmill.checklist import engines
from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.core.files import write_atomic
from prefmill.core.stage import Task
from prefmill.store.artifacts import payload, publish
from prefmill.store.jsonl import read_jsonl, write_jsonl

METRICS = "metrics.json"


ANY_JUDGE = {"min_answer_mass": 0, "max_same_answer": 1}  # a tiny model judges nothing


@pytest.fixture
def corpus(tmp_path: Path, corpus_texts: list[str]) -> Artifact:
    """Two papers with three reviews each, one of them longer than the model's context."""
    folder = tmp_path / "corpus"
    shared = {"title": "Sparse masks", "abstract": "We study masks.", "text": ""}
    write_jsonl(folder / "papers.jsonl", [{"paper_id": name, **shared} for name in ("a", "b")])
    texts = [*corpus_texts[:4], " ".join(corpus_texts * 3), corpus_texts[5]]
    write_jsonl(
        folder / "reviews.jsonl",
        [{"paper_id": "ab"[n // 3], "review_id": f"r{n}", "text": text} for n, text in enumerate(texts)],
    )
    return publish(folder, "review_corpus", Provenance("s", "all", "f", {}, {}, "0", {}), {})


def run(
    folder: Path, corpus: Artifact, journal: bytes | None = None, debug: bool = False, judge: Any = None, **engine: Any
) -> Task:
    folder.mkdir()
    task = Task("r", "score_reviews", "all", {}, {}, {"corpus": (corpus,)}, folder / "output", folder)
    if journal is not None:
        (task.work / "outcomes.journal").write_bytes(journal)
    settings = {"engine": {"engine": "transformers", **engine}, "debug": debug, "judge": judge or ANY_JUDGE}
    write_atomic(task.logs / METRICS, json.dumps(stage.run(validate(stage.ScoreReviewsConfig, settings), task)))
    return task


def test_a_model_that_puts_no_mass_on_yes_or_no_is_refused(tmp_path: Path, tiny_judge: Path, corpus: Artifact) -> None:
    engine = {"model_name_or_path": str(tiny_judge), "truncate_reviews": True}
    with pytest.raises(InputError, match=r"this judge says yes to \d+% and puts [\d.]+% of its mass on an answer"):
        run(tmp_path / "t", corpus, judge={"max_same_answer": 1}, **engine)
    (journal,) = (path.read_bytes() for path in (tmp_path / "t").rglob("outcomes.journal"))
    task = run(tmp_path / "again", corpus, journal, judge={"min_answer_mass": 0, "max_same_answer": 1}, **engine)
    summary = json.loads((task.output / "summary.json").read_text())  # nothing was asked again
    rows = list(read_jsonl(task.output / "review_evaluations.jsonl"))
    masses = [answer["mass"] for row in rows for answer in row["answers"].values()]
    assert summary["judge"]["answer_mass"] == pytest.approx(sum(masses) / len(masses), abs=1e-4)
    assert summary["judge"]["answer_mass"] < 0.1
    assert summary["judge"]["items"]["summary"].keys() >= {"yes_share", "spread", "answer_mass"}


def test_cut_reviews_are_reported_and_resuming_ends_the_same(
    tmp_path: Path, tiny_judge: Path, corpus: Artifact
) -> None:
    engine = {"model_name_or_path": str(tiny_judge), "include_paper": "title_abstract", "truncate_reviews": True}
    task = run(tmp_path / "whole", corpus, **engine)
    expected = {path.name: path.read_bytes() for path in payload(task.output)}
    (cut,) = read_jsonl(task.output / "truncated.jsonl")
    assert cut["review_id"] == "r4"
    assert cut["num_cut_tokens"] > 100
    rows = list(read_jsonl(task.output / "review_evaluations.jsonl"))
    assert [row["review_id"] for row in rows] == [f"r{number}" for number in range(6)]
    assert rows[0]["engine"] == "transformers"
    assert str(tmp_path).encode() not in b"".join(expected.values())
    lines = (task.work / "outcomes.journal").read_bytes().splitlines(keepends=True)
    for num_kept in (0, 2, 5, 6):  # in the middle of a paper too: what the cache held must not matter
        again = run(tmp_path / f"again{num_kept}", corpus, b"".join(lines[:num_kept]) + b"0\t{torn", **engine)
        assert {path.name: path.read_bytes() for path in payload(again.output)} == expected


def test_a_resumed_shard_asks_only_for_what_is_missing(
    tmp_path: Path, tiny_judge: Path, corpus: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"model_name_or_path": str(tiny_judge), "truncate_reviews": True}
    opened: list[Any] = []

    def open_engine(*arguments: Any) -> Any:
        opened.append(engines.open_engine(*arguments))
        return opened[-1]

    monkeypatch.setattr(stage, "open_engine", open_engine)
    whole = run(tmp_path / "whole", corpus, **engine)
    lines = (whole.work / "outcomes.journal").read_bytes().splitlines(keepends=True)
    for num_kept in (2, 5):
        run(tmp_path / f"again{num_kept}", corpus, b"".join(lines[:num_kept]), **engine)
    assert [judge.num_requests for judge in opened] == [6 * 24, 4 * 24, 24]
    metrics = json.loads((whole.logs / METRICS).read_text())
    assert metrics["prompt_tokens"] == opened[0].num_prompt_tokens > 0
    assert 0.5 < metrics["cache_hit_rate"] == round(opened[0].num_cached_tokens / opened[0].num_prompt_tokens, 4) < 1
    assert json.loads((whole.logs / "progress.json").read_text())["done"] == 6


def test_debugging_shows_what_the_model_reads(
    tmp_path: Path, tiny_judge: Path, corpus: Artifact, corpus_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "t", corpus, debug=True, model_name_or_path=str(tiny_judge))
    shown = capsys.readouterr().out
    assert shown.count("--- prompt: review") == shown.count("--- answers: review") == 3
    assert "<|im_start|>user\nYou judge" in shown
    assert corpus_texts[0] in shown


def test_an_over_long_review_is_an_error_by_default(tmp_path: Path, tiny_judge: Path, corpus: Artifact) -> None:
    with pytest.raises(InputError, match=r"r4 of paper b: .* tokens[\s\S]*truncate_reviews=true"):
        run(tmp_path / "t", corpus, model_name_or_path=str(tiny_judge))
