"""optimize_checklist: payload, the dev split alone, reuse of steps, resuming, failures, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from counting_engine import CountingEngine
from optimize_runs import dev_ids, make_half_dev_rows, optimize, task_of
from review_artifacts import Rows, contents, make_artifact, make_corpus, make_task

import stages.optimize_checklist as stage
import stages.score_reviews as score_reviews
from prefmill.checklist.engine import LexicalConfig
from prefmill.checklist.items import load_checklist
from prefmill.checklist.optimize import run as optimize_run
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.stage import Task
from prefmill.store.artifacts import superseded
from prefmill.store.jsonl import read_jsonl

FILES = [
    "export/optimal_checklist.json", "export/step.json", "export/summary.json", "optimal_checklist.json",
    "propose/candidates.json", "propose/step.json", "refit/held_out.json", "refit/step.json", "refit/weights.json",
    "score/failures.jsonl", "score/paraphrases.json", "score/reviews.jsonl", "score/step.json", "select/items.jsonl",
    "select/path.jsonl", "select/step.json", "select/summary.json", "summary.json",
]  # fmt: skip


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingEngine]:
    monkeypatch.setattr(CountingEngine, "asked", [])
    monkeypatch.setattr(CountingEngine, "kill_before", None)
    monkeypatch.setattr(CountingEngine, "fails", frozenset())
    opened = lambda config, checklist: CountingEngine(LexicalConfig(evidence=False), checklist)  # noqa: E731
    monkeypatch.setattr(optimize_run, "open_engine", opened)
    return CountingEngine


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    return make_half_dev_rows()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, rows: tuple[Rows, Rows]) -> Artifact:
    return make_corpus(tmp_path_factory.mktemp("corpus"), *rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Artifact) -> Task:
    """A finished task that tests must not change."""
    task = task_of(tmp_path_factory.mktemp("finished"), corpus)
    optimize(task)
    return task


def replacing(folder: Path, finished: Task, corpus: Artifact) -> Task:
    """A task whose output replaces that of `finished`, as the worker leaves it."""
    task = task_of(folder / "t", corpus)
    kept = superseded(task.output)
    kept.parent.mkdir(parents=True)
    shutil.copytree(finished.output, kept)
    return task


def steps_run(capsys: pytest.CaptureFixture[str]) -> str:
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("steps run: "))[11:]


def test_the_payload_is_complete_and_score_reviews_takes_it(tmp_path: Path, corpus: Artifact) -> None:
    task = task_of(tmp_path / "t", corpus)
    metrics = optimize(task)
    assert sorted(contents(task)) == FILES
    checklist = load_checklist(task.output / "optimal_checklist.json")
    assert 0 < len(checklist.items) < 24
    assert sum(item.weight for item in checklist.items) == pytest.approx(24, abs=0.05)
    summary = json.loads((task.output / "summary.json").read_text())
    kept_and_dropped = [*summary["weights"], *[name for names in summary["dropped"].values() for name in names]]
    assert sorted(kept_and_dropped) == sorted(load_checklist().ids)
    assert metrics["signal"] is True
    assert metrics["conclusion"] == [summary["conclusion"]]
    assert set(summary["baselines"]) == {"length_only", "rating_only", "all_items_equal"}
    made = make_artifact(task.output, "checklist", corpus=corpus)
    scoring = make_task(tmp_path / "s", "score_reviews", {"corpus": [corpus], "checklist": [made]})
    score_reviews.run(validate(score_reviews.ScoreReviewsConfig, {}), scoring)
    assert load_checklist(scoring.output / "checklist.json") == checklist


def test_only_the_dev_split_is_scored(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows], counting: type[CountingEngine]
) -> None:
    task = task_of(tmp_path / "t", corpus)
    optimize(task)
    assert counting.asked == dev_ids(rows)
    assert [row["review_id"] for row in read_jsonl(task.output / "score" / "reviews.jsonl")] == dev_ids(rows)


def test_a_limit_leaves_whole_papers_out(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    task = task_of(tmp_path / "t", corpus)
    optimize(task, score={"max_reviews": 70})
    few = list(read_jsonl(task.output / "score" / "reviews.jsonl"))
    by_paper = {row["paper_id"]: 0 for row in few}
    for name in dev_ids(rows):
        paper = name.rpartition("-")[0]
        by_paper[paper] = by_paper.get(paper, -100) + 1
    assert 60 <= len(few) <= 70
    assert sum(count for count in by_paper.values() if count > 0) == len(few), "papers are whole"


def test_a_corpus_without_dev_papers_is_refused(tmp_path: Path, rows: tuple[Rows, Rows]) -> None:
    papers = [{**paper, "split": "train"} for paper in rows[0]]
    with pytest.raises(InputError, match="no paper with reviews is in split dev"):
        optimize(task_of(tmp_path / "t", make_corpus(tmp_path / "c", papers, rows[1])))


@pytest.mark.slow
def test_a_killed_process_is_resumed_without_scoring_a_review_twice(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows], counting: type[CountingEngine], finished: Task
) -> None:
    task, ids = task_of(tmp_path / "t", corpus), dev_ids(rows)
    counting.kill_before = ids[30]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        optimize(task)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    counting.kill_before = None
    counting.asked.clear()
    optimize(task)
    assert counting.asked == ids[30:]
    assert contents(task) == contents(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({"export": {"name": "other"}}, "export"),
        ({"refit": {"weights": "equal"}}, "refit, export"),
        ({"select": {"min_stability": 0.5}}, "select, refit, export"),
        ({"score": {"max_reviews": 120}}, "score, select, refit, export"),
        ({"step": "select"}, "select"),
        ({}, "propose, score, select, refit, export"),
    ],
)
def test_a_step_is_rerun_alone(
    tmp_path: Path,
    corpus: Artifact,
    finished: Task,
    capsys: pytest.CaptureFixture[str],
    blocks: dict[str, Any],
    expected: str,
) -> None:
    task = replacing(tmp_path / "run", finished, corpus)
    optimize(task, **blocks)
    assert steps_run(capsys) == expected
    if "step" in blocks or not blocks:
        assert contents(task) == contents(finished)


def test_reused_steps_change_no_byte(tmp_path: Path, corpus: Artifact, finished: Task) -> None:
    blocks = {"select": {"target": "decision_agreement"}}
    reusing, fresh = replacing(tmp_path / "run", finished, corpus), task_of(tmp_path / "fresh", corpus)
    for task in (reusing, fresh):
        optimize(task, **blocks)
    assert contents(reusing) == contents(fresh)


def test_failures_stop_the_stage_unless_allowed(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows], counting: type[CountingEngine]
) -> None:
    ids = dev_ids(rows)
    counting.fails = frozenset(ids[3:5])
    task = task_of(tmp_path / "t", corpus)
    with pytest.raises(InputError, match=f"1 failed, the latest {ids[3]}"):
        optimize(task)
    assert not (task.output / "score" / "step.json").exists()
    optimize(task, score={"max_failed_share": 0.1})
    failures = list(read_jsonl(task.output / "score" / "failures.jsonl"))
    assert [row["review_id"] for row in failures] == ids[3:5]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"select": {"min_labels": 1000}}, r"too few dev reviews have the target 'confidence'[\s\S]*at least 1000"),
        ({"select": {"target": "decision_agreement", "accept_rating": 6.0, "min_labels": 1000}}, "decision_agreement"),
        ({"refit": {"outer_folds": 30}}, "too few dev papers"),
        ({"select": {"min_answer_share": 0.49}}, "the screen leaves too few items"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    tmp_path: Path, corpus: Artifact, blocks: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        optimize(task_of(tmp_path / "t", corpus), **blocks)


def test_labels_by_other_ids_are_told(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    """The fix was a larger share for dev, or more labels."""
    path = tmp_path / "labels.csv"
    path.write_text("review_id,label\n" + "".join(f"x-{name},{len(name) % 3}\n" for name in dev_ids(rows)))
    message = rf"no label is of a dev review[\s\S]*'x-[\s\S]*such as '{dev_ids(rows)[0]}'"
    with pytest.raises(InputError, match=message):
        optimize(task_of(tmp_path / "t", corpus), select={"target": "labels", "labels": str(path)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": "scores"}, "step"),
        ({"refit": {"num_permutations": 19, "alpha": 0.01}}, "raise num_permutations"),
        ({"select": {"target": "grade"}}, "target"),
        ({"select": {"signed": True, "shrink": False}}, "set shrink=true"),
        ({"selection": {}}, "did you mean 'select'"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.OptimizeChecklistConfig, settings)
