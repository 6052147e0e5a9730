"""score_reviews: payload, shards, limits, what is shown, checklists, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from review_artifacts import Rows, contents, make_artifact, make_corpus, make_rows
from score_runs import FILES, NUM_PAPERS, evaluations, score, task_of

import stages.score_reviews as stage
from prefmill.checklist.engine import LexicalConfig
from prefmill.checklist.items import load_checklist, save_checklist
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.reviews.generated import quality_factors
from prefmill.store.artifacts import payload


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    return make_rows(NUM_PAPERS)


@pytest.fixture
def corpus(tmp_path: Path, rows: tuple[Rows, Rows]) -> Artifact:
    return make_corpus(tmp_path / "corpus", *rows)


def test_every_review_is_scored_in_order(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    task = task_of(tmp_path / "t", corpus)
    metrics = score(task)
    found, reviews = evaluations(task), rows[1]
    assert sorted(contents(task)) == FILES
    assert [row["review_id"] for row in found] == [review["review_id"] for review in reviews]
    ids = load_checklist(task.output / "checklist.json").ids
    assert ids == load_checklist().ids
    for row, review in zip(found, reviews, strict=True):
        assert tuple(row["answers"]) == ids
        assert row["checkmark_score"] == sum(answer["yes"] for answer in row["answers"].values())
        assert row["answers"]["statistics"]["yes"] == quality_factors(review["text"])["statistics"]
        for answer in row["answers"].values():
            assert answer.get("evidence", "") in review["text"]
            assert answer["yes"] == (answer["p_yes"] == 1.0) == ("evidence" in answer)
    summary = json.loads((task.output / "summary.json").read_text())
    assert summary["num_reviews"] == summary["num_scored"] == metrics["num_scored"] == len(reviews)
    assert summary["yes_rates"]["statistics"] == pytest.approx(
        sum(row["answers"]["statistics"]["yes"] for row in found) / len(found), abs=1e-6
    )
    assert summary["mean_checkmark_score"] == pytest.approx(
        sum(row["checkmark_score"] for row in found) / len(found), abs=1e-6
    )


def test_shards_partition_the_reviews_and_stay_when_papers_are_added(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    whole = make_corpus(tmp_path / "whole", *rows)
    fewer = [row for row in rows[0] if row["paper_id"] != rows[0][3]["paper_id"]]
    part = make_corpus(tmp_path / "part", fewer, [r for r in rows[1] if r["paper_id"] != rows[0][3]["paper_id"]])
    held: dict[str, list[set[str]]] = {"whole": [], "part": []}
    for shard in range(3):
        for name, corpus in (("whole", whole), ("part", part)):
            task = task_of(tmp_path / f"{name}{shard}", corpus, shard, 3)
            score(task)
            held[name].append({row["review_id"] for row in evaluations(task)})
    everything = [row["review_id"] for row in rows[1]]
    assert sum(map(len, held["whole"])) == len(everything)
    assert set().union(*held["whole"]) == set(everything)
    assert all(held["whole"])
    for before, after in zip(held["part"], held["whole"], strict=True):
        assert before <= after


def test_a_shard_without_papers_is_empty_but_done(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    paper = rows[0][0]
    corpus = make_corpus(tmp_path / "c", [paper], [r for r in rows[1] if r["paper_id"] == paper["paper_id"]])
    counts = []
    for shard in range(4):
        task = task_of(tmp_path / f"t{shard}", corpus, shard, 4)
        counts.append(score(task)["num_scored"])
        assert sorted(contents(task)) == FILES
    assert sorted(counts)[:3] == [0, 0, 0]
    assert max(counts) >= 3


def test_a_limit_takes_the_first_reviews(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    for count in (1, 5, 10_000):
        task = task_of(tmp_path / f"t{count}", corpus)
        score(task, limit=count)
        expected = [review["review_id"] for review in rows[1][:count]]
        assert [row["review_id"] for row in evaluations(task)] == expected


def test_debugging_shows_the_first_answers_and_steers_no_terminal(
    tmp_path: Path, rows: tuple[Rows, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [{**row, "text": "\x1b[2J Table 3 shows p-values."} for row in rows[1]]
    task = task_of(tmp_path / "t", make_corpus(tmp_path / "c", rows[0], changed))
    assert score(task, debug=True)["num_scored"] == 3
    shown = capsys.readouterr().out
    assert shown.count("--- answers: review") == 3
    assert '1.000000 yes statistics  "\\x1b[2J Table 3 shows p-values."' in shown
    assert "\x1b" not in shown
    assert score(task_of(tmp_path / "five", make_corpus(tmp_path / "d", *rows)), debug=True, limit=5)["num_scored"] == 5


def test_the_pace_is_told_and_not_part_of_the_payload(
    tmp_path: Path, corpus: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(tmp_path / "t", corpus)
    metrics = score(task)
    assert metrics["items_per_second"] > 24
    assert "cache_hit_rate" not in metrics  # rules have no prompts
    assert b"per_second" not in b"".join(contents(task).values())
    assert "items/s" in capsys.readouterr().err
    assert json.loads((task.logs / "progress.json").read_text())["unit"] == "reviews"
    assert "items_per_second" not in score(task)  # nothing was left


def test_hostile_text_breaks_no_row(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    hostile = ["a\x00b\x1b[31m\u2028c\u0085d\u202e.", "no stop " * 20_000, '"}\n{"review_id": "x"}', "\t0\t{}\r\n", "…"]
    before = make_corpus(tmp_path / "before", *rows)
    changed = [dict(row) for row in rows[1]]
    for row, text in zip(changed[::9], hostile, strict=False):
        row["text"] = text
    after = make_corpus(tmp_path / "after", rows[0], changed)
    tasks = [task_of(tmp_path / name, corpus) for name, corpus in (("t0", before), ("t1", after))]
    for task in tasks:
        score(task)
    first, second = map(evaluations, tasks)
    assert len(second) == len(first)
    touched = {row["review_id"] for row in changed[::9][: len(hostile)]}
    assert [row for row in first if row["review_id"] not in touched] == [
        row for row in second if row["review_id"] not in touched
    ]


def test_an_optimised_checklist_or_a_file_of_the_users_is_used(tmp_path: Path, corpus: Artifact) -> None:
    shipped = load_checklist()
    chosen = shipped.model_copy(
        update={"name": "best", "items": tuple(i.model_copy(update={"weight": 2.0}) for i in shipped.items[:3])}
    )
    save_checklist(chosen, tmp_path / "best" / "optimal_checklist.json")
    artifact = make_artifact(tmp_path / "best", "checklist")
    task = task_of(tmp_path / "t", corpus, checklist=artifact)
    score(task)
    row = evaluations(task)[0]
    assert len(row["answers"]) == 3
    assert row["checkmark_score"] == 2 * sum(answer["yes"] for answer in row["answers"].values())
    assert load_checklist(task.output / "checklist.json") == chosen
    path = str(tmp_path / "best" / "optimal_checklist.json")
    file_task = task_of(tmp_path / "f", corpus)
    score(file_task, checklist=path)
    assert contents(file_task) == contents(task)
    with pytest.raises(ConfigError, match="two checklists"):
        score(task, checklist=path)


def test_items_without_rules_are_named_before_anything_is_written(tmp_path: Path, corpus: Artifact) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nitems:\n- {id: kind, question: 'Is it kind?', source: me}\n")
    task = task_of(tmp_path / "t", corpus)
    with pytest.raises(ConfigError, match=r"have no rule[\s\S]*kind"):
        score(task, checklist=str(path))
    assert payload(task.output) == []


def test_an_empty_corpus_is_refused(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    corpus = make_corpus(tmp_path / "corpus", rows[0], [])
    with pytest.raises(InputError, match="the corpus has no reviews"):
        score(task_of(tmp_path / "t", corpus))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": {"engine": "lexicla"}}, "lexical"),
        ({"engine": {"engine": "lexical", "model_name_or_path": "x"}}, "model_name_or_path: unknown key"),
        ({"engine": {"engine": "transformers"}}, "model_name_or_path: required"),
        ({"limit": 0}, "limit = 0"),
        ({"debug": 5}, "debug = 5"),
        ({"max_failed_share": 1.5}, "max_failed_share = 1.5"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.ScoreReviewsConfig, settings)


def test_lexical_is_the_default_engine() -> None:
    assert validate(stage.ScoreReviewsConfig, {}).engine == LexicalConfig()
