"""The report's section on the judge, that it is left out where there is none, and that it shows text and runs none."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from evaluation_artifacts import make_corpus, make_evaluation, make_task, publish_as

import stages.judge_quality as judge_quality
import stages.score_reviews as score_reviews
from prefmill.checklist.items import load_checklist, save_checklist
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.report.checklist_sections import judge_section, judged
from prefmill.report.report import page_environment
from prefmill.store.jsonl import read_jsonl
from stages.report import STAGE, ReportConfig, run

HOSTILE = "</th><script>alert(1)</script><img src=x onerror=alert(2)>"
Made = tuple[Artifact, Artifact]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An evaluation, and the quality of the rules that scored its corpus, against labels that are mostly theirs."""
    workspace = tmp_path_factory.mktemp("workspace")
    corpus = make_corpus(workspace, 24)
    evaluation = make_evaluation(workspace, corpus, "dpo", (3, 9))
    return evaluation, quality_of(workspace, corpus, load_checklist().items[0].question)


def quality_of(workspace: Path, corpus: Artifact, question: str) -> Artifact:
    """judge_quality by the stage itself; the first item asks `question`, and every seventh label is turned over."""
    checklist = load_checklist()
    items = (checklist.items[0].model_copy(update={"question": question}), *checklist.items[1:3])
    save_checklist(checklist.model_copy(update={"items": items}), workspace / "three.json")
    run_folder = workspace / "data" / "run"
    settings = {"checklist": str(workspace / "three.json")}
    config = validate(score_reviews.ScoreReviewsConfig, settings)
    task = make_task("score_reviews", run_folder / "score_reviews" / "all", {"corpus": [corpus]})
    score_reviews.run(config, task)
    scores = publish_as(task.output, "review_scores", config.model_dump(mode="json"), corpus=corpus)
    answers = [
        (row["review_id"], name, answer["yes"])
        for row in read_jsonl(scores.file("review_evaluations.jsonl"))
        for name, answer in row["answers"].items()
    ]
    lines = [f"{key},{name},{int(yes != (number % 7 == 0))}" for number, (key, name, yes) in enumerate(answers)]
    (workspace / "labels.csv").write_text("\n".join(["review_id,item_id,label", *lines]))
    given = {"labels": str(workspace / "labels.csv"), "num_probed": 6, "num_resamples": 1000}
    task = make_task("judge_quality", run_folder / "judge_quality" / "all", {"corpus": [corpus], "scores": [scores]})
    judge_quality.run(validate(judge_quality.JudgeQualityConfig, given), task)
    return publish_as(task.output, "judge_quality", {}, corpus=corpus, scores=scores)


def write_report(folder: Path, evaluation: Artifact, **inputs: Artifact) -> str:
    output = folder / "data" / "run" / "report" / "all"
    given = {"evaluations": [evaluation], **{name: [item] for name, item in inputs.items()}}
    run(ReportConfig(num_resamples=1000), make_task("report", output, given))
    return (output / "report.html").read_text()


def section_of(page: str) -> str:
    found = re.search(r'<section id="judge">.*?</section>', page, re.DOTALL)
    assert found is not None
    return found[0]


def test_the_section_tells_what_the_stage_found(made: Made, tmp_path: Path) -> None:
    evaluation, quality = made
    page = write_report(tmp_path, evaluation, quality=quality)
    section = unescape(section_of(page))
    found = json.loads(quality.file("quality.json").read_text())
    for line in found["conclusion"]:
        assert line in section
    kappa = found["judges"][0]["labels"]["kappa"]
    assert 0.5 < kappa["low"] < kappa["value"] < kappa["high"] < 0.95
    assert f"{kappa['value']:.2f} ({kappa['low']:.2f} to {kappa['high']:.2f})" in section
    for item in found["judges"][0]["labels"]["items"]:
        row = re.search(rf"<th scope=\"row\">{re.escape(item['question'])}</th>.*?</tr>", section)
        assert row is not None
        assert f"<td>{item['kappa']['value']:.2f}<small>" in row[0]
        assert f"{item['num_answers']} answers" in row[0]
    assert section.count("<svg") == 2
    assert "asks for yes" in section
    assert 'href="#judge"' in page
    assert STAGE.reads["quality"].stage == "judge_quality"


def test_it_is_found_behind_the_evaluation_as_well(made: Made, tmp_path: Path) -> None:
    evaluation, quality = made
    config = evaluation.manifest.identity["config"]
    behind = publish_as(evaluation.path, "evaluation", config, calibration=quality)
    assert section_of(write_report(tmp_path, behind))
    publish_as(evaluation.path, "evaluation", config)


def test_without_a_judges_quality_there_is_no_section(made: Made, tmp_path: Path) -> None:
    evaluation, _ = made
    assert judge_section([evaluation]) == []
    alone = make_evaluation(tmp_path, make_corpus(tmp_path, 18), "dpo", (3, 9))
    page = write_report(tmp_path, alone)
    assert 'id="judge"' not in page
    assert "#judge" not in page


def test_hostile_questions_are_shown_and_not_run(made: Made, tmp_path: Path) -> None:
    evaluation, _ = made
    quality = quality_of(tmp_path, make_corpus(tmp_path, 18), HOSTILE)
    section = section_of(write_report(tmp_path, evaluation, quality=quality))
    assert "<script" not in section
    assert "<img" not in section
    assert "&lt;script&gt;alert(1)" in section


def test_every_measure_may_be_missing_or_hostile() -> None:
    """A judge without labels, probes or intervals, another with all of it, and text that would be markup."""
    point = {"value": -0.25, "low": None, "high": None}
    shift = {
        "num_reviews": 1,
        "score": point,
        "p_yes": point,
        "max_score": 0,
        "max_p_yes": 0,
        "max_answer": 0,
        "flips": 0,
    }
    table: dict[str, Any] = {
        "kappa": point, "f1": point, "accuracy": point, "mean_gap": 0.1, "max_gap": 0.2,
        "items": [{"id": "a", "question": HOSTILE, "num_answers": 1, "kappa": point, "max_gap": 0.2}],
    }  # fmt: skip
    probes = {
        "num_reviews": 1, "paraphrases": table, "control": None, "padding": shift, "injections": {HOSTILE: shift},
    }  # fmt: skip
    bare = {
        "name": HOSTILE, "engine": HOSTILE, "settings": None, "temperature": None, "checklist": HOSTILE, "num_items": 1,
        "num_reviews": 1, "num_papers": 1, "num_unscored": 2, "labels": None, "probes": None,
    }  # fmt: skip
    full = {**bare, "settings": {"model_name_or_path": HOSTILE}, "temperature": 2.5, "labels": table, "probes": probes}
    shared = {"conclusion": [HOSTILE], "confidence": 0.95, "num_unscored_labels": 1}
    made = [
        judged({**shared, "judges": [bare], "between": None}),
        judged({**shared, "judges": [full, bare], "between": table}),
    ]
    html = page_environment().get_template("judge.html.jinja").render(judge=made)
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("<svg") == 2
    assert "temperature 2.500" in html
    assert "−0.25" in html
