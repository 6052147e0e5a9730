"""judge_quality on the two real engines with one model: they agree to within float32 and are the same judge."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import stages.judge_quality as stage
from prefmill.checklist.calibration import judge_of
from prefmill.checklist.engine import Engine, TransformersConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist, save_checklist
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.e2e.review_artifacts import make_artifact, make_corpus, make_rows, make_task

pytestmark = pytest.mark.slow


def scores_of(engine: Engine, corpus: Artifact, folder: Path, settings: dict[str, Any]) -> Artifact:
    papers = {row["paper_id"]: row for row in read_jsonl(corpus.file("papers.jsonl"))}
    grouped = itertools.groupby(read_jsonl(corpus.file("reviews.jsonl")), key=lambda row: row["paper_id"])
    write_jsonl(
        folder / "review_evaluations.jsonl", engine.evaluate((papers[key], list(rows)) for key, rows in grouped)
    )
    save_checklist(engine.checklist, folder / "checklist.json")
    (folder / "summary.json").write_text("{}")
    return make_artifact(folder, "review_scores", {"engine": settings}, corpus=corpus)


def test_two_engines_of_one_model_are_one_judge(tmp_path: Path, judge: Path, engine: Engine) -> None:
    corpus = make_corpus(tmp_path / "corpus", *make_rows(4))
    served = {"engine": "vllm", "model_name_or_path": str(judge), "include_paper": "none"}
    config = TransformersConfig(model_name_or_path=str(judge))
    first = scores_of(engine, corpus, tmp_path / "vllm", served)
    other = open_engine(config, load_checklist())
    second = scores_of(other, corpus, tmp_path / "hf", config.model_dump(mode="json"))
    task = make_task(tmp_path / "t", "judge_quality", {"corpus": [corpus], "scores": [first], "other_scores": [second]})
    # A random model puts little on yes or no.
    given = {
        "judge": {"min_answer_mass": 0.0},
        "num_probed": 3,
        "max_paraphrases": 0,
        "num_resamples": 1000,
        "probe_other": False,
    }
    swapped = make_task(tmp_path / "u", "judge_quality", {**task.inputs, "scores": [second], "other_scores": [first]})
    stage.run(validate(stage.JudgeQualityConfig, {**given, "num_probed": 0}), task)
    stage.run(validate(stage.JudgeQualityConfig, given), swapped)
    for output in (task.output, swapped.output):
        between = json.loads((output / "quality.json").read_text())["between"]
        assert between["differ_in"] == ["engine"]
        assert 0 < between["max_gap"] < 1e-4
        assert between["kappa"]["value"] > 0.99
    probes = json.loads((swapped.output / "quality.json").read_text())["judges"][0]["probes"]
    assert abs(probes["repeat"]["max_answer"]) < 1e-5
    assert probes["injections"]["asks_for_yes"]["max_answer"] != 0
    assert judge_of(served) == judge_of(config.model_dump(mode="json"))
