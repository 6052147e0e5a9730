"""judge_quality: known agreement with people and between judges, labels that are wrong, and bad input."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from judge_artifacts import (
    NUM_PAPERS,
    QUICK,
    as_rows,
    draw,
    judged,
    make_split_rows,
    measure,
    scored,
    two_items,
    write_labels,
)
from review_artifacts import Rows, make_artifact, make_corpus, make_task

import stages.judge_quality as stage
from prefmill.checklist.items import Checklist, load_checklist
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.report.checklist_sections import judged as judged_section
from prefmill.report.report import page_environment
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    return make_split_rows()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, rows: tuple[Rows, Rows]) -> Artifact:
    return make_corpus(tmp_path_factory.mktemp("corpus"), *rows)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, corpus: Artifact) -> Artifact:
    """What rules say of the whole corpus."""
    return scored(tmp_path_factory.mktemp("scores"), corpus, {"engine": "lexical"})


def test_agreement_with_people_is_what_was_put_in(
    tmp_path: Path, corpus: Artifact, scores: Artifact, rows: tuple[Rows, Rows]
) -> None:
    """Labels are the judge's own answers, but that every fifth one for the item summary is turned over."""
    answers = {row["review_id"]: row["answers"] for row in read_jsonl(scores.file("review_evaluations.jsonl"))}
    labels = [
        (key, name, int(found[name]["yes"])) for key, found in answers.items() for name in ("statistics", "summary")
    ]
    turned = [
        (key, name, 1 - yes if name == "summary" and number % 5 == 0 else yes)
        for number, (key, name, yes) in enumerate(labels)
    ]
    path = write_labels(tmp_path / "labels.csv", turned)
    quality, task = measure(tmp_path / "t", {"corpus": corpus, "scores": scores}, labels=str(path))
    (judge,) = quality["judges"]
    found = {item["id"]: item for item in judge["labels"]["items"]}
    assert set(found) == {"statistics", "summary"}
    kappa, z = found["statistics"]["kappa"], NormalDist().inv_cdf(0.975)
    assert (kappa["value"], kappa["high"]) == (1.0, 1.0)
    # Papers that all agree leave room for some that would not: Wilson's share of them, each worth 2 on kappa's scale.
    assert kappa["low"] == pytest.approx(1 - 2 * z**2 / (NUM_PAPERS + z**2), abs=1e-5)
    wrong = sum(a != b for a, b in zip(labels, turned, strict=True))
    assert found["summary"]["accuracy"]["value"] == pytest.approx(1 - wrong / len(answers), abs=1e-6)
    assert found["summary"]["accuracy"]["low"] < 1 - wrong / len(answers) < found["summary"]["accuracy"]["high"]
    assert judge["labels"]["num_answers"] == quality["num_labels"] == 2 * len(answers)
    assert judge["labels"]["accuracy"]["value"] == pytest.approx(1 - wrong / len(labels), abs=1e-6)
    assert len(list(read_jsonl(task.output / "labelled.jsonl"))) == len(labels)
    assert f"over {len(labels)} labels of {NUM_PAPERS} papers" in quality["conclusion"][2]
    assert sorted(path.name for path in payload(task.output)) == [
        "between.jsonl", "labelled.jsonl", "probes.jsonl", "quality.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows_of_labels", "message"),
    [
        ([("R", "statistics", "maybe")], r"labels.csv:2[\s\S]*label 'maybe'[\s\S]*write yes or no"),
        ([("R", "statistics", "")], r"labels.csv:2[\s\S]*label ''"),
        ([("R", "", "yes")], r"labels.csv:2[\s\S]*item_id ''"),
        ([("", "statistics", "yes")], "review_id ''"),
        ([("R", "statistics", "yes"), ("nobody", "statistics", "no")], r"labels.csv:3[\s\S]*review_id 'nobody'"),
        ([("R", "statistic", "yes")], r"labels.csv:2[\s\S]*item_id 'statistic' \(did you mean 'statistics'\?\)"),
        ([("R", "statistics", "yes"), ("R", "statistics", "no")], r"labels.csv:3[\s\S]*statistics of review .* again"),
        ([], "the label file is empty"),
        ([("R", "statistics")], "fewer cells"),
    ],
)
def test_labels_that_are_wrong_name_their_line(
    tmp_path: Path, corpus: Artifact, scores: Artifact, rows: tuple[Rows, Rows], rows_of_labels: Any, message: str
) -> None:
    known = rows[1][0]["review_id"]
    path = write_labels(
        tmp_path / "labels.csv", [[known if cell == "R" else cell for cell in row] for row in rows_of_labels]
    )
    with pytest.raises(InputError, match=message):
        measure(tmp_path / "t", {"corpus": corpus, "scores": scores}, labels=str(path))


def test_files_of_labels_that_cannot_be_read_are_explained(tmp_path: Path, corpus: Artifact, scores: Artifact) -> None:
    inputs = {"corpus": corpus, "scores": scores}
    other = write_labels(tmp_path / "a.csv", [("r", "yes")], ("review_id", "label"))
    with pytest.raises(InputError, match=r"unusable item labels[\s\S]*item_id"):
        measure(tmp_path / "a", inputs, labels=str(other))
    (tmp_path / "b.csv").write_bytes(b"review_id,item_id,label\n\xff\xfe,x,1\n")
    with pytest.raises(InputError, match="not utf-8 text"):
        measure(tmp_path / "b", inputs, labels=str(tmp_path / "b.csv"))
    with pytest.raises(InputError, match="no such file"):
        measure(tmp_path / "c", inputs, labels=str(tmp_path / "none.csv"))


def test_labels_of_reviews_without_a_score_are_counted(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]
) -> None:
    ids = [row["review_id"] for row in rows[1]]
    answers, labels = draw(ids, 0)
    part = judged(tmp_path / "s", corpus, {key: answers[key] for key in ids[5:]})
    path = write_labels(tmp_path / "labels.csv", as_rows(labels))
    quality, _ = measure(tmp_path / "t", {"corpus": corpus, "scores": part}, labels=str(path))
    assert (quality["num_labels"], quality["num_unscored_labels"]) == (2 * len(ids), 10)
    assert quality["judges"][0]["num_unscored"] == 5
    few = write_labels(tmp_path / "few.csv", as_rows({key: labels[key] for key in ids[:5]}))
    with pytest.raises(InputError, match="no labelled review is scored"):
        measure(tmp_path / "f", {"corpus": corpus, "scores": part}, labels=str(few))


def test_two_judges_are_compared_on_what_both_answered(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]
) -> None:
    ids = [row["review_id"] for row in rows[1]]
    answers, _ = draw(ids, 0)
    moved = {key: {"kind": row["kind"], "clear": max(0.0, row["clear"] - 0.2)} for key, row in answers.items()}
    turned = sum((row["clear"] > 0.5) != (moved[key]["clear"] > 0.5) for key, row in answers.items())
    first = judged(tmp_path / "a", corpus, answers)
    second = judged(
        tmp_path / "b", corpus, {key: moved[key] for key in ids[3:]}, "transformers", two_items(clear="Clear?")
    )
    quality, task = measure(tmp_path / "t", {"corpus": corpus, "scores": first, "other_scores": second})
    found = quality["between"]
    assert found["differ_in"] == ["engine", "wording of 1 items"]
    assert found["num_reviews"] == len(ids) - 3
    by_item = {item["id"]: item for item in found["items"]}
    assert by_item["kind"]["kappa"]["value"] == 1.0
    assert by_item["kind"]["max_gap"] == 0
    assert by_item["clear"]["max_gap"] == pytest.approx(0.2)
    assert by_item["clear"]["other_question"] == "Clear?"
    left_out = sum((answers[key]["clear"] > 0.5) != (moved[key]["clear"] > 0.5) for key in ids[:3])
    assert found["num_flips"] == turned - left_out > 10
    assert 0 < by_item["clear"]["kappa"]["value"] < 1
    rows_between = list(read_jsonl(task.output / "between.jsonl"))
    assert sum(row["num_flips"] for row in rows_between) == found["num_flips"]
    assert any("agree at kappa" in line and "wording of 1 items" in line for line in quality["conclusion"])
    other_items = Checklist(name="x", items=load_checklist().items[:2])
    apart = judged(tmp_path / "c", corpus, {ids[0]: dict.fromkeys(other_items.ids, 0.5)}, checklist=other_items)
    with pytest.raises(InputError, match="without an answer in common"):
        measure(tmp_path / "u", {"corpus": corpus, "scores": first, "other_scores": apart})


def test_a_judge_that_likes_length_is_seen_through(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    """One judge says yes to what is long, the other by lot: labels by lot tell that the first one errs with length."""
    lengths = {row["review_id"]: len(row["text"].split()) for row in rows[1]}
    middle = float(np.median(list(lengths.values())))
    rng = np.random.default_rng(0)
    long = {
        key: {"kind": 0.9 if count > middle else 0.1, "clear": 0.9 if count > middle else 0.1}
        for key, count in lengths.items()
    }
    lot = {key: dict(zip(("kind", "clear"), rng.random(2).round(3).tolist(), strict=True)) for key in lengths}
    path = write_labels(
        tmp_path / "l.csv",
        as_rows({key: {"kind": bool(rng.random() < 0.5), "clear": bool(rng.random() < 0.5)} for key in lengths}),
    )
    inputs = {
        "corpus": corpus,
        "scores": judged(tmp_path / "a", corpus, long),
        "other_scores": judged(tmp_path / "b", corpus, lot),
    }
    quality, _ = measure(tmp_path / "t", inputs, labels=str(path))
    biased, fair = (judge["length"] for judge in quality["judges"])
    assert biased["score"]["low"] > 0.7
    assert biased["error"]["low"] > 0.3
    assert fair["score"]["low"] < 0 < fair["score"]["high"]
    assert fair["error"]["low"] < 0 < fair["error"]["high"]
    # Where people say yes to what is long as well, it errs nowhere, and the other one the more the longer a review is.
    agreeing = write_labels(
        tmp_path / "m.csv", as_rows({key: {"kind": row["kind"] > 0.5} for key, row in long.items()})
    )
    quality, _ = measure(tmp_path / "u", inputs, labels=str(agreeing))
    assert quality["judges"][0]["length"]["error"] is None
    assert quality["judges"][1]["length"]["error"]["high"] < -0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibrate": True}, "a temperature is fitted to labels"),
        ({"num_probed": -1}, "num_probed = -1"),
        ({"min_labels": 3}, "min_labels = 3"),
        ({"label": "x.csv"}, r"label: unknown key"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.JudgeQualityConfig, settings)


def test_labels_of_one_answer_have_no_kappa(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    """An item that never occurs, as many do, counted as perfect agreement in the mean over items."""
    ids = [row["review_id"] for row in rows[1]]
    answers, _ = draw(ids, 0)
    labels = [(key, "kind", 1) for key in ids if answers[key]["kind"] > 0.5]
    path = write_labels(tmp_path / "labels.csv", labels)
    inputs = {"corpus": corpus, "scores": judged(tmp_path / "a", corpus, answers)}
    quality, _ = measure(tmp_path / "t", inputs, labels=str(path))
    people = quality["judges"][0]["labels"]
    assert (people["kappa"], people["mean_item_kappa"], people["num_items_of_one_answer"]) == (None, None, 1)
    told = next(sentence for sentence in quality["conclusion"] if "agrees with people" in sentence)
    assert "at an undefined kappa (one and the same answer throughout), F1 1.00" in told
    labels += [(key, "clear", number % 2) for number, key in enumerate(ids)]
    quality, _ = measure(tmp_path / "u", inputs, labels=str(write_labels(tmp_path / "more.csv", labels)))
    people = quality["judges"][0]["labels"]
    kappas = {item["id"]: item["kappa"] for item in people["items"]}
    assert kappas["kind"] is None
    assert people["mean_item_kappa"] == kappas["clear"]["value"]
    page = page_environment().get_template("judge.html.jinja").render(judge=[judged_section(quality)])
    assert "<td>one answer<small>" in page
    assert "agrees with people at kappa" in page


def test_several_people_may_label_one_answer(tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]) -> None:
    """What most say counts, ties do not, and how far they agree among themselves is told."""
    ids = [row["review_id"] for row in rows[1]]
    answers, labels = draw(ids, 0)
    given = [
        (key, name, int(yes), rater)
        for place, (key, row) in enumerate(labels.items())
        for name, yes in row.items()
        for rater, yes in (("ann", yes), ("ben", yes), ("cleo", yes != (place % 4 == 0)))
    ]
    # Of the first review only two people remain, who contradict each other.
    given = [row for row in given if (row[0], row[3]) != (ids[0], "ben")]
    path = write_labels(tmp_path / "l.csv", given, ("review_id", "item_id", "label", "annotator"))
    inputs = {"corpus": corpus, "scores": judged(tmp_path / "a", corpus, answers)}
    quality, _ = measure(tmp_path / "t", inputs, labels=str(path))
    people = quality["people"]
    told = {name: people[name] for name in ("num_raters", "num_shared", "num_answers", "num_ties")}
    assert told == {"num_raters": 3, "num_shared": 2 * len(ids), "num_answers": 6 * len(ids) - 2, "num_ties": 2}
    assert quality["num_labels"] == 2 * len(ids) - 2
    assert any("3 people who labelled agree among themselves at alpha 0." in line for line in quality["conclusion"])
    single = {key: row for key, row in labels.items() if key != ids[0]}
    alone, _ = measure(tmp_path / "u", inputs, labels=str(write_labels(tmp_path / "m.csv", as_rows(single))))
    assert alone["people"] is None
    assert alone["judges"] == quality["judges"]
    with pytest.raises(InputError, match=r"again[\s\S]*column `rater`"):
        measure(tmp_path / "v", inputs, labels=str(write_labels(tmp_path / "n.csv", [row[:3] for row in given])))


def test_scores_that_do_not_belong_together_are_refused(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]
) -> None:
    ids = [row["review_id"] for row in rows[1]]
    answers, _ = draw(ids, 0)
    half = {key: answers[key] for key in ids[: len(ids) // 2]}
    rest = {key: answers[key] for key in ids[len(ids) // 2 :]}
    shards = [judged(tmp_path / "a", corpus, half), judged(tmp_path / "b", corpus, rest, "transformers")]
    task = make_task(tmp_path / "t", "judge_quality", {"corpus": [corpus], "scores": shards})
    config = validate(stage.JudgeQualityConfig, QUICK)
    with pytest.raises(InputError, match="the shards were scored with different settings: engine"):
        stage.run(config, task)
    unknown = judged(tmp_path / "c", corpus, answers)
    bare = make_artifact(unknown.path, "review_scores", {}, corpus=corpus)
    with pytest.raises(InputError, match="do not tell which engine made them"):
        measure(tmp_path / "u", {"corpus": corpus, "scores": bare}, num_probed=3)
    quality, _ = measure(tmp_path / "v", {"corpus": corpus, "scores": bare})
    assert quality["judges"][0]["settings"] is None
