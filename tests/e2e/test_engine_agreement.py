"""evaluate with a second scoring engine: what it adds, known agreement, and what the report makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_artifacts import make_corpus, make_evaluation, make_task, publish_as
from test_report import text_of, write_report

from prefmill.checklist.calibration import Calibration, judge_of, write_calibration
from prefmill.core.artifact import Artifact
from prefmill.core.config import load
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.statistics import Resampling
from prefmill.evaluation.engine_agreement import SECOND_EVALUATIONS, engine_agreement
from prefmill.store.jsonl import read_jsonl
from stages.evaluate import STAGE, run
from tests.tiny import save_tiny_qwen2


def rows(yes: list[list[bool]], engine: str) -> list[Any]:
    """Reviews with these answers to four items; the score counts them."""
    return [
        {
            "review_id": f"p{index}#0", "paper_id": f"p{index}", "engine": engine, "mean_p_yes": 0.5,
            "answers": {f"q{item}": {"yes": value, "p_yes": 0.5} for item, value in enumerate(values)},
            "checkmark_score": float(sum(values)),
        }
        for index, values in enumerate(yes)
    ]  # fmt: skip


def test_agreement_is_that_of_the_answers() -> None:
    """40 answers: 15 both yes, 15 both no, 10 otherwise; chance is 1/2, so kappa is (0.75 - 0.5) / 0.5."""
    first = [[True, True, False, False]] * 10
    second = [[True, True, False, False]] * 5 + [[True, False, True, False]] * 5
    texts: list[Any] = [{"text": "good", "paper_id": f"p{index}"} for index in range(10)]
    found = engine_agreement(texts, rows(first, "one"), rows(second, "two"), Resampling(1000))
    assert found is not None
    assert found["engine"] == "two"
    assert found["accuracy"]["value"] == 0.75
    assert found["kappa"]["value"] == 0.5
    assert found["kappa"]["low"] < 0.5 < found["kappa"]["high"]
    assert found["distance"]["value"] == found["shift"]["value"] == 0.0
    assert found["rank_correlation"] is None  # every score is 2
    assert [item["accuracy"]["value"] for item in found["items"]] == [1.0, 0.5, 0.5, 1.0]
    more = engine_agreement(texts, rows(first, "one"), rows([[True] * 4] * 10, "two"), Resampling(1000))
    assert more is not None
    assert more["distance"]["value"] == more["shift"]["value"] == 2.0
    empty: list[Any] = [{"text": " ", "paper_id": f"p{index}"} for index in range(10)]
    assert engine_agreement(empty, rows(first, "one"), rows(second, "two"), Resampling(1000)) is None


ANY_JUDGE = {"judge": {"min_answer_mass": 0, "max_same_answer": 1}}  # a tiny model judges nothing


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_corpus(tmp_path_factory.mktemp("workspace"), 24)


@pytest.mark.slow
def test_a_second_engine_scores_the_same_reviews(corpus: Artifact, tmp_path: Path) -> None:
    output = tmp_path / "data" / "run" / "evaluate" / "human-clean"
    judge = {"engine": "transformers", "model_name_or_path": str(save_tiny_qwen2(tmp_path / "judge"))}
    long = {**judge, "truncate_reviews": True}
    keys = {"model": "human", "second_engine": long}
    with pytest.raises(InputError, match="this judge says"):  # as it was said in the other process
        run(load(STAGE.config, keys), make_task("evaluate", tmp_path / "data" / "refused", {"corpus": [corpus]}))
    run(load(STAGE.config, keys | ANY_JUDGE), make_task("evaluate", output, {"corpus": [corpus]}))
    first, second = (list(read_jsonl(output / name)) for name in ("evaluations.jsonl", SECOND_EVALUATIONS))
    assert [row["review_id"] for row in first] == [row["review_id"] for row in second]
    assert {row["engine"] for row in first} == {"lexical"}
    assert {row["engine"] for row in second} == {"transformers"}
    found = json.loads((output / "metrics.json").read_text())["agreement"]
    assert found["num_reviews"] == len(first)
    apart = [abs(one["checkmark_score"] - two["checkmark_score"]) for one, two in zip(first, second, strict=True)]
    assert 0 < found["distance"]["value"] <= max(apart)
    with pytest.raises(ConfigError, match="would agree with itself"):
        load(STAGE.config, {"model": "human", "engine": judge, "second_engine": judge})
    elsewhere = {**judge, "model_name_or_path": str(tmp_path / "nowhere")}
    config = load(STAGE.config, {"model": "human", "second_engine": elsewhere})
    task = make_task("evaluate", tmp_path / "data" / "run" / "evaluate" / "other", {"corpus": [corpus]})
    with pytest.raises(InputError, match="no such model folder"):  # as it was said in the other process
        run(config, task)


@pytest.mark.slow
def test_a_temperature_moves_probabilities_and_turns_no_answer(corpus: Artifact, tmp_path: Path) -> None:
    judge = {"engine": "transformers", "model_name_or_path": str(save_tiny_qwen2(tmp_path / "judge"))}
    keys = {"model": "human", "num_papers": 3, "engine": {**judge, "truncate_reviews": True}, **ANY_JUDGE}
    config = load(STAGE.config, keys)
    fitted = tmp_path / "data" / "run" / "judge_quality" / "all"
    fitted.mkdir(parents=True)
    of_judge = judge_of(config.engine.model_dump(mode="json"))
    write_calibration(Calibration(2.0, of_judge, 100, 10, 5, 0.7, 0.6, 0.2, 0.1), fitted)
    quality = publish_as(fitted, "judge_quality")
    found = {}
    for name, more in {"plain": {}, "tempered": {"calibration": [quality]}}.items():
        output = tmp_path / "data" / "run" / "evaluate" / name
        run(config, make_task("evaluate", output, {"corpus": [corpus], **more}))
        found[name] = list(read_jsonl(output / "evaluations.jsonl"))
        assert json.loads((output / "metrics.json").read_text())["engine_temperature"] == (2.0 if more else None)
    for plain, tempered in zip(*found.values(), strict=True):
        assert tempered["checkmark_score"] == plain["checkmark_score"]
        for item, answer in plain["answers"].items():
            odds = answer["p_yes"] / (1 - answer["p_yes"])
            assert tempered["answers"][item]["p_yes"] == pytest.approx(odds**0.5 / (1 + odds**0.5), abs=1e-5)
            assert tempered["answers"][item]["yes"] == answer["yes"]
    assert found["plain"] != found["tempered"]
    other = load(STAGE.config, {"model": "human", "num_papers": 3})
    output = tmp_path / "data" / "run" / "evaluate" / "other"
    with pytest.raises(ConfigError, match="the temperature was fitted for another judge"):
        run(other, make_task("evaluate", output, {"corpus": [corpus], "calibration": [quality]}))


def with_agreement(evaluation: Artifact, mean_score: float) -> Artifact:
    """The evaluation as if a second engine had found this mean."""
    path = evaluation.path / "metrics.json"
    interval = {"value": 0.61, "low": 0.5, "high": 0.7}
    names = ("kappa", "accuracy", "distance", "shift", "rank_correlation")
    found = {"engine": "<b>second</b>", "num_reviews": 60, "confidence": 0.95, "mean_score": mean_score, "items": []}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"agreement": found | dict.fromkeys(names, interval)}))
    (evaluation.path / "manifest.json").unlink()
    return publish_as(evaluation.path, "evaluation")


def test_the_report_shows_it_and_doubts_a_verdict_of_one_engine_alone(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, 60)
    factors = {"base": (0, 4), "dpo": (6, 11)}
    pages = {}
    for name, means in {"agrees": (5.0, 9.0), "differs": (5.0, 4.5)}.items():
        made = [make_evaluation(tmp_path / name, corpus, model, found) for model, found in factors.items()]
        given = [with_agreement(one, mean) for one, mean in zip(made, means, strict=True)]
        html, _ = write_report({"evaluations": given}, tmp_path / name / "out")
        assert "<b>second" not in html
        pages[name] = text_of(html)
    for page in pages.values():
        assert "Two scoring engines" in page
        assert "lexical, <b>second</b>" in page
        assert "0.61" in page
    doubt = "does not see this difference: its mean score goes from 5.00 (base) to 4.50 (dpo)"
    assert doubt in pages["differs"]
    assert "does not see this difference" not in pages["agrees"]
