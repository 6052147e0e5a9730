"""The report's section on an optimised checklist, and that it is left out where there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from evaluation_artifacts import make_corpus, make_evaluation, make_task, publish_as

import stages.optimize_checklist as optimize_checklist
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.report.checklist_sections import optimisation_section
from prefmill.store.jsonl import read_jsonl
from stages.report import ReportConfig, run

QUICK = {
    "select": {"min_labels": 40, "num_bootstrap": 10, "inner_folds": 3},
    "refit": {"num_permutations": 19, "num_resamples": 1000, "outer_folds": 3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """An evaluation whose checklist was optimised on a corpus of dev papers of its own, and that checklist."""
    workspace = tmp_path_factory.mktemp("workspace")
    corpus = make_corpus(workspace, 90)
    folder = workspace / "data" / "run" / "optimize_checklist" / "all"
    task = make_task("optimize_checklist", folder, {"corpus": [_as_dev(corpus)]})
    optimize_checklist.run(validate(optimize_checklist.OptimizeChecklistConfig, QUICK), task)
    _tell_weights_apart(folder / "summary.json")
    checklist = publish_as(folder, "checklist", corpus=corpus)
    evaluation = make_evaluation(workspace, corpus, "dpo", (3, 9))
    config = evaluation.manifest.identity["config"]
    return publish_as(evaluation.path, "evaluation", config, corpus=corpus, checklist=checklist), checklist


def _tell_weights_apart(path: Path) -> None:
    summary = json.loads(path.read_text())
    summary["weights"] = {name: 0.5 + index / 50 for index, name in enumerate(summary["weights"])}
    path.write_text(json.dumps(summary))


def _as_dev(corpus: Artifact) -> Artifact:
    """The corpus with every training paper in split dev."""
    path = corpus.path / "papers.jsonl"
    path.write_text(path.read_text().replace('"split":"train"', '"split":"dev"'))
    return publish_as(corpus.path, "review_corpus")


def write_report(evaluation: Artifact, folder: Path) -> str:
    output = folder / "data" / "run" / "report" / "all"
    run(ReportConfig(num_resamples=1000), make_task("report", output, {"evaluations": [evaluation]}))
    return (output / "report.html").read_text()


def test_the_section_tells_what_the_stage_found(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    evaluation, checklist = made
    page = write_report(evaluation, tmp_path)
    section = re.search(r'<section id="optimisation">.*?</section>', page, re.DOTALL)
    assert section is not None
    summary = json.loads(checklist.file("summary.json").read_text())
    assert summary["conclusion"].replace("'", "&#39;") in section[0]
    for item in read_jsonl(checklist.file("select/items.jsonl")):
        row = re.search(
            rf"<th scope=\"row\">{re.escape(item['question'])}</th>.*?</tr>", section[0].replace("&#39;", "'")
        )
        assert row is not None
        assert item["status"].replace("_", " ") in row[0]
        weight = summary["weights"].get(item["id"])
        assert (f"{weight:.2f}" if weight is not None else "–") in row[0]
    assert f"{summary['correlation']['value']:.2f} (" in section[0]
    assert "all items equal" in section[0]
    assert section[0].count("<svg") == 2
    assert 'href="#optimisation"' in page


def test_without_an_optimised_checklist_there_is_no_section(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    evaluation, _ = made
    assert optimisation_section([evaluation]) == []
    alone = make_evaluation(tmp_path, make_corpus(tmp_path, 18), "dpo", (3, 9))
    page = write_report(alone, tmp_path)
    assert 'id="optimisation"' not in page
    assert "#optimisation" not in page
