"""optimize_checklist: known answers: labels give weights, what is shown decides what is exported, no signal is said."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from optimize_runs import dev_ids, make_half_dev_rows, optimize, task_of
from review_artifacts import Rows, make_corpus

from benchmarks.optimize_checklist import NOISE, USEFUL, draw, least_covered, run_stage, sample, shuffled_p_value
from prefmill.checklist.engine import LexicalConfig, Outcome
from prefmill.checklist.items import load_checklist
from prefmill.checklist.lexical import LexicalEngine
from prefmill.checklist.optimize import run as optimize_run
from prefmill.checklist.optimize.config import ExportConfig
from prefmill.checklist.optimize.export_step import write_export
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.core.records import Paper, Review
from prefmill.store.jsonl import read_jsonl


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    return make_half_dev_rows()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, rows: tuple[Rows, Rows]) -> Artifact:
    return make_corpus(tmp_path_factory.mktemp("corpus"), *rows)


@pytest.mark.slow
def test_an_unreliable_item_is_found_by_its_paraphrase(
    tmp_path: Path, corpus: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge whose answers follow the rules, but for one item of which the paraphrase is answered at random."""

    class Judge(LexicalEngine):
        def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
            for outcome in super().score(papers):
                answers = dict(outcome.answers)
                yes = random.Random(outcome.review_id).random() < 0.5
                answers["paraphrase_0_0"] = {"yes": yes, "p_yes": float(yes)}
                yield Outcome(outcome.review_id, outcome.paper_id, answers)

    monkeypatch.setattr(optimize_run, "open_engine", lambda config, checklist: Judge(LexicalConfig(), checklist))
    task = task_of(tmp_path / "t", corpus)
    optimize(task, score={"engine": {"engine": "transformers", "model_name_or_path": "judge"}})
    items = {row["id"]: row for row in read_jsonl(task.output / "select" / "items.jsonl")}
    assert items["summary"]["status"] == "unreliable"
    assert items["summary"]["paraphrase_kappa"] < 0.3
    others = [row for name, row in items.items() if name != "summary"]
    assert {row["status"] for row in others} <= {"kept", "not_chosen", "constant", "redundant"}
    assert {row["paraphrase_kappa"] for row in others} == {1.0}


def test_a_judge_that_answers_nothing_is_stopped_early_and_kept(
    tmp_path: Path, corpus: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Mumbler(LexicalEngine):
        def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
            for outcome in super().score(papers):
                asked.append(outcome.review_id)
                answers: Any = {name: {**answer, "mass": 0.02} for name, answer in outcome.answers.items()}
                yield Outcome(outcome.review_id, outcome.paper_id, answers)

    monkeypatch.setattr(optimize_run, "open_engine", lambda config, checklist: Mumbler(LexicalConfig(), checklist))
    task, model = task_of(tmp_path / "t", corpus), {"engine": "transformers", "model_name_or_path": "judge"}
    for num_asked, keys in ((50, {}), (50, {"after_reviews": 1000})):  # a rerun with a later look gets round nothing
        with pytest.raises(InputError, match=r"puts 2% of its mass(.|\n)*set score.judge.min_answer_mass=0"):
            optimize(task, score={"engine": model, "judge": keys, "max_reviews": 50 if keys else 5000})
        assert len(asked) == num_asked
    optimize(task, score={"engine": model, "judge": {"min_answer_mass": 0}})
    assert len(asked) == len(set(asked)) > 50


def test_labels_of_people(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    """Labels that follow one item find it; labels of other splits are not used, and counted."""
    path = tmp_path / "labels.csv"
    dev = set(dev_ids(rows))
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["review_id", "label"])
        for review in rows[1]:
            flag = "thank" in review["text"] or "hope these" in review["text"] or "appreciate" in review["text"]
            writer.writerow([review["review_id"], int(flag if review["review_id"] in dev else not flag)])
    task = task_of(tmp_path / "t", corpus)
    optimize(task, select={"target": "labels", "labels": str(path)})
    assert load_checklist(task.output / "optimal_checklist.json").ids == ("courtesy",)
    summary = json.loads((task.output / "summary.json").read_text())
    assert summary["correlation"]["value"] > 0.95
    counted = json.loads((task.output / "select" / "summary.json").read_text())
    assert counted["num_labels_outside_dev"] == len(rows[1]) - len(dev)


def write_weighted_labels(path: Path, reviews: Rows, weights: dict[str, float], noise: float) -> dict[str, str]:
    """Labels that are a weighted count of the shipped items' yes, plus noise; returns the block `select`."""
    engine, generator = LexicalEngine(LexicalConfig(), load_checklist()), random.Random(0)
    lines = ["review_id,label"]
    for review in reviews:
        answers = engine.answers(review["text"])
        value = sum(weight * answers[name]["yes"] for name, weight in weights.items()) + generator.gauss(0, noise)
        lines.append(f"{review['review_id']},{value:.6f}")
    path.write_text("\n".join(lines) + "\n")
    return {"target": "labels", "labels": str(path)}


@pytest.mark.slow
def test_where_all_items_count_the_same_none_is_dropped(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]
) -> None:
    labels = write_weighted_labels(tmp_path / "l.csv", rows[1], dict.fromkeys(load_checklist().ids, 1.0), 2.5)
    task = task_of(tmp_path / "t", corpus)
    assert "no choice among them predicts better" in optimize(task, select=labels)["conclusion"][0]
    summary = json.loads((task.output / "summary.json").read_text())
    assert len(set(summary["weights"].values())) == 1
    assert set(summary["dropped"]) <= {"constant", "redundant"}


@pytest.mark.slow
def test_weights_are_fitted_and_worth_it_where_items_count_differently(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]
) -> None:
    labels = write_weighted_labels(tmp_path / "l.csv", rows[1], {"courtesy": 4.0, "question": 1.0}, 0.5)
    summaries = {}
    for weights in ("fitted", "equal"):
        task = task_of(tmp_path / weights, corpus)
        optimize(task, select=labels, refit={"weights": weights})
        summaries[weights] = json.loads((task.output / "summary.json").read_text())
    fitted, equal = summaries["fitted"], summaries["equal"]
    assert set(fitted["weights"]) == set(equal["weights"]) == {"courtesy", "question"}
    assert fitted["weights"]["courtesy"] / fitted["weights"]["question"] == pytest.approx(4, abs=0.6)
    assert set(equal["weights"].values()) == {12.0}  # of 24 candidates: scores range as with all at 1
    assert fitted["correlation"]["value"] > equal["correlation"]["value"] + 0.02


@pytest.mark.slow
def test_shuffled_labels_report_no_signal(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    path = tmp_path / "labels.csv"
    values = [f"{number % 5}" for number in range(len(rows[1]))]
    random.Random(1).shuffle(values)
    pairs = zip((review["review_id"] for review in rows[1]), values, strict=True)
    path.write_text("review_id,label\n" + "\n".join(",".join(pair) for pair in pairs) + "\n")
    task = task_of(tmp_path / "t", corpus)
    labels = {"target": "labels", "labels": str(path)}
    metrics = optimize(task, select=labels)
    assert metrics["signal"] is False
    assert metrics["conclusion"][0].startswith("No signal")
    exported = [item.weight for item in load_checklist(task.output / "optimal_checklist.json").items]
    assert len(set(exported)) == 1
    assert sum(exported) == pytest.approx(24, abs=0.1)
    with pytest.raises(InputError, match="no signal"):
        optimize(task_of(tmp_path / "f", corpus), select=labels, export={"on_no_signal": "fail"})


@pytest.mark.slow
def test_a_sum_that_goes_against_the_target_is_told(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    """It was exported as `No signal`, although its scores preferred the worse reviews beyond doubt."""
    labels = write_weighted_labels(tmp_path / "l.csv", rows[1], dict.fromkeys(load_checklist().ids, -1.0), 2.5)
    (told,) = optimize(task_of(tmp_path / "t", corpus), select=labels)["conclusion"]
    assert told.startswith("No signal")
    assert "All items equal correlate at −0." in told
    assert "select.signed=true" in told
    metrics = optimize(task_of(tmp_path / "s", corpus), select={**labels, "signed": True})
    assert metrics["signal"] is True
    assert "speaks against a review" in metrics["conclusion"][0]


BOTH = {"summary": 1.5, "importance": 1.5}  # of 3 candidates


def held_out(signal: bool, low: float, high: float) -> dict[str, Any]:
    advantage = {"advantage": {"value": (low + high) / 2, "low": low, "high": high}}
    found = {"value": 0.5, "low": 0.4, "high": 0.6}
    better = {"advantage": {"value": 0.2, "low": 0.1, "high": 0.3}}
    baselines = {"length_only": better, "rating_only": better, "all_items_equal": {**advantage, "correlation": found}}
    return {
        "target": "confidence", "signal": signal, "model": "chosen", "p_value": 0.5, "alpha": 0.05,
        "correlation": found, "baselines": baselines,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("signal", "advantage", "on_worse", "weights", "told"),
    [
        (True, (0.1, 0.2), "equal", {"summary": 3}, "better than length only, rating only and all items equal."),
        (True, (-0.1, 0.2), "equal", {"summary": 3}, "not shown to differ from all items equal."),
        (True, (-0.2, -0.1), "keep", {"summary": 3}, "worse than all items equal."),
        (
            True,
            (-0.2, -0.1),
            "equal",
            BOTH,
            "Exported with equal weights: the 2 of 3 items",
        ),
        (False, (0.1, 0.2), "equal", BOTH, "No signal"),
        (True, (0.1, 0.2), "none kept", BOTH, "no item is chosen steadily. Exported"),
    ],
)
def test_what_is_exported_follows_from_what_is_shown(
    tmp_path: Path,
    signal: bool,
    advantage: tuple[float, float],
    on_worse: str,
    weights: dict[str, float],
    told: str,
) -> None:
    none_kept = on_worse == "none kept"
    config = validate(ExportConfig, {} if none_kept else {"on_worse": on_worse})
    statuses = {
        "summary": "not_chosen" if none_kept else "kept",
        "importance": "not_chosen",
        "originality": "redundant",
    }
    items = [{"id": name, "status": status} for name, status in statuses.items()]
    found = held_out(signal, *advantage)
    write_export(config, load_checklist(), items, {} if none_kept else {"summary": 1.5}, found, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["weights"] == weights
    assert told in summary["conclusion"]
    assert {item.id: item.weight for item in load_checklist(tmp_path / "optimal_checklist.json").items} == weights


@pytest.mark.slow
def test_known_items_are_found_and_noise_is_dropped(tmp_path: Path) -> None:
    found = [run_stage(tmp_path / str(seed), seed, 450) for seed in range(5)]
    assert sum(item.precision for item in found) / 5 >= 0.9
    assert sum(item.recall for item in found) / 5 >= 0.9
    assert all(item.summary["signal"] for item in found)
    assert all(len(set(item.kept) & {*NOISE}) <= 1 for item in found)
    assert all(item.summary["baselines"]["length_only"]["advantage"]["low"] > 0 for item in found)
    shuffled = run_stage(tmp_path / "shuffled", 0, 450, shuffle=True)
    assert shuffled.summary["signal"] is False


@pytest.mark.slow
def test_held_out_intervals_hold_the_truth_and_shuffled_targets_give_no_signal() -> None:
    """A short form of the benchmark, which has 200 draws."""
    population = sample(900_000, 1500)
    draws = [draw(seed, population) for seed in range(1000, 1020)]
    covered = sum(item.low <= item.of_folds <= item.high for item in draws)
    assert covered >= least_covered(20, 0.95)
    assert abs(sum(item.value - item.of_folds for item in draws) / 20) < 0.03
    alarms = sum(shuffled_p_value(seed, 60) <= 0.05 for seed in range(20))
    assert alarms <= 20 - least_covered(20, 0.95)
    assert len(USEFUL) + len(NOISE) == population.answers.shape[1]
