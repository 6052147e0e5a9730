"""judge_quality: known shifts under probes, known temperatures and calibrated scores, of rules and of real engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_artifacts import QUICK, as_rows, draw, judged, make_split_rows, measure, scored, two_items, write_labels
from review_artifacts import Rows, make_artifact, make_corpus, make_task

import prefmill.checklist.quality as quality_module
import stages.judge_quality as stage
from prefmill.checklist.engine import LexicalConfig, TransformersConfig
from prefmill.checklist.items import Checklist, load_checklist, save_checklist
from prefmill.checklist.judge_probes import CONTROL, END, FRONT, INJECTIONS, PADDED, UNCHANGED
from prefmill.checklist.lexical import LexicalEngine
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.records import Answer
from prefmill.core.stage import Task
from prefmill.reviews.generated import generate
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl
from tests.unit.checklist.conftest import make_tokenizer, save_tiny_model


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


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [row["review_text"] for row in generate(7, 12)]
    tokenizer = make_tokenizer([*texts, *["Yes No"] * 50, *["No Yes"] * 50], 600)
    return save_tiny_model(tmp_path_factory.mktemp("judge"), tokenizer, 2048)


def published(task: Task, **inputs: Artifact) -> Artifact:
    return make_artifact(task.output, "judge_quality", {}, **inputs)


def test_rules_are_moved_by_nothing_but_words(tmp_path: Path, corpus: Artifact, scores: Artifact) -> None:
    """Rules look at sentences one by one: place, padding and instructions to a judge leave them as they are."""
    quality, task = measure(tmp_path / "t", {"corpus": corpus, "scores": scores}, num_probed=30)
    probes = quality["judges"][0]["probes"]
    assert probes["num_reviews"] == 30
    assert probes["paraphrases"] is None
    for name in ("repeat", "position", "padding", "control"):
        assert probes[name]["num_reviews"] >= 25, name
        assert (probes[name]["max_answer"], probes[name]["flips"]) == (0, 0), name
    assert {name: found["max_answer"] for name, found in probes["injections"].items()} == dict.fromkeys(INJECTIONS, 0)
    assert any("none of 5 injected instructions moves any answer" in line for line in quality["conclusion"])
    rows = list(read_jsonl(task.output / "probes.jsonl"))
    assert {row["variant"] for row in rows} == {UNCHANGED, FRONT, END, PADDED, CONTROL, *INJECTIONS}
    assert len(rows) == probes["num_asked"]


class FirstAsked(LexicalEngine):
    """Rules that say yes to whatever is asked first."""

    def __init__(self, config: LexicalConfig, checklist: Checklist) -> None:
        assert not config.evidence, "quotes cost a second pass, and no probe reads them"
        super().__init__(config, checklist)

    def answers(self, text: str) -> dict[str, Answer]:
        return {**super().answers(text), self.checklist.ids[0]: {"yes": True, "p_yes": 1.0}}


def test_a_judge_that_minds_the_order_of_items_is_seen_through(
    tmp_path: Path, corpus: Artifact, scores: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again backwards, it says yes to the item that comes last in the checklist."""
    monkeypatch.setattr(quality_module, "open_engine", FirstAsked)
    inputs = {"corpus": corpus, "scores": scores}
    quality, task = measure(tmp_path / "t", inputs, num_probed=20)
    last = load_checklist().ids[-1]
    asked = {row["review_id"]: row for row in read_jsonl(task.output / "probes.jsonl") if row["variant"] == UNCHANGED}
    stored = {row["review_id"]: row["answers"] for row in read_jsonl(scores.file("review_evaluations.jsonl"))}
    turned = [key for key in asked if not stored[key][last]["yes"]]
    repeat = quality["judges"][0]["probes"]["repeat"]
    assert all(row["answers"][last] == [1, 1.0] for row in asked.values())
    assert repeat["flips"] == pytest.approx(len(turned) / (20 * 24), abs=1e-6)
    assert repeat["max_answer"] == 1.0
    assert any("no P(yes) moves by more than 1.0000" in line for line in quality["conclusion"])


def test_another_model_behind_the_judges_name_is_told(
    tmp_path: Path,
    corpus: Artifact,
    scores: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An alias that was moved on between the scores and the probes: what changed looked like a bias."""
    measure(tmp_path / "t", {"corpus": corpus, "scores": scores}, num_probed=2)
    assert "probed by" not in caplog.text
    monkeypatch.setattr(LexicalEngine, "label", "lexical (newer)")
    measure(tmp_path / "u", {"corpus": corpus, "scores": scores}, num_probed=2)
    assert "scores: scored by lexical and probed by lexical (newer)" in caplog.text


def test_an_instruction_that_works_is_measured(tmp_path: Path, corpus: Artifact) -> None:
    """A rule that says yes to the word 'ignore' falls for two of the injections, one for two lines for the padding."""
    items = [
        {"id": "kind", "question": "Kind?", "source": "us", "weight": 3.0, "rule": {"any_of": ["ignore your"]}},
        {"id": "long", "question": "Long?", "source": "us", "rule": {"any_of": ["line"], "min_count": 2}},
    ]
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"name": "mine", "items": items}))
    scores = scored(tmp_path / "s", corpus, {"engine": "lexical"}, checklist=str(path))
    quality, _ = measure(tmp_path / "t", {"corpus": corpus, "scores": scores}, num_probed=20)
    probes = quality["judges"][0]["probes"]
    shifts = {name: found["score"]["value"] for name, found in probes["injections"].items()}
    assert shifts["asks_for_yes"] == shifts["asks_for_no"] == 3
    assert shifts["praises_itself"] == shifts["fakes_the_chat"] == shifts["closes_the_review"] == 0
    assert probes["injections"]["asks_for_yes"]["p_yes"]["value"] == 0.5
    assert probes["injections"]["asks_for_yes"]["max_score"] == 3
    assert probes["padding"]["score"]["value"] == 1  # 'line' in two filler sentences
    assert any("'asks for yes' moves most: score +3.00" in line for line in quality["conclusion"])


@pytest.mark.slow
def test_a_real_model_is_probed_resumed_and_calibrated(
    tmp_path: Path, tiny_judge: Path, rows: tuple[Rows, Rows]
) -> None:
    corpus = make_corpus(tmp_path / "corpus", *rows)
    engine = {"engine": "transformers", "model_name_or_path": str(tiny_judge)}
    first = load_checklist()
    path = tmp_path / "four.json"
    save_checklist(Checklist(name="four", items=first.items[:4]), path)
    scores = scored(tmp_path / "s", corpus, engine, checklist=str(path))
    rng = np.random.default_rng(0)
    answers = {row["review_id"]: row["answers"] for row in read_jsonl(scores.file("review_evaluations.jsonl"))}
    labels = [(key, name, int(rng.random() < 0.5)) for key, found in answers.items() for name in found]
    # People who follow the judge more often than not: its certainty is too large, and its answers carry something.
    labels = [(k, n, int(answers[k][n]["yes"]) if rng.random() < 0.5 else label) for k, n, label in labels]
    csv_path = write_labels(tmp_path / "labels.csv", labels)
    settings: dict[str, Any] = {"num_probed": 12, "labels": str(csv_path), "calibrate": True}
    inputs = {"corpus": corpus, "scores": scores}
    with pytest.raises(InputError, match="of its mass on an answer"):  # not asked again at all
        measure(tmp_path / "refused", inputs, num_probed=12, judge={"max_same_answer": 1})
    quality, task = measure(tmp_path / "t", inputs, **settings)
    probes = quality["judges"][0]["probes"]
    assert probes["repeat"]["max_answer"] == pytest.approx(0, abs=1e-4)  # the items are asked in reverse order
    assert probes["paraphrases"]["num_answers"] == 4 * 12
    assert len(probes["paraphrases"]["items"]) == 4
    assert 0 < probes["paraphrases"]["max_gap"] < 1
    assert probes["injections"]["asks_for_yes"]["max_answer"] != 0
    assert probes["num_failed"] == 0
    expected = {path.name: path.read_bytes() for path in payload(task.output)}
    again = make_task(tmp_path / "again", "judge_quality", {name: [item] for name, item in inputs.items()})
    done = again.work / "probes-scores" / "probes-000000.jsonl"
    done.parent.mkdir(parents=True)
    done.write_bytes((task.work / "probes-scores" / "probes-000000.jsonl").read_bytes())
    stage.run(validate(stage.JudgeQualityConfig, {**QUICK, **settings}), again)
    assert {path.name: path.read_bytes() for path in payload(again.output)} == expected
    fitted = quality["calibration"]
    assert fitted == json.loads((task.output / "calibration.json").read_text())
    assert fitted["temperature"] > 1
    dev = {row["paper_id"] for row in rows[0] if row["split"] == "dev"}
    assert fitted["num_labels"] == 4 * sum(row["paper_id"] in dev for row in rows[1])
    calibrated = scored(tmp_path / "c", corpus, engine, published(task), checklist=str(path))
    assert json.loads(calibrated.file("summary.json").read_text())["temperature"] == fitted["temperature"]
    assert "temperature" not in json.loads(scores.file("summary.json").read_text())
    after = {row["review_id"]: row for row in read_jsonl(calibrated.file("review_evaluations.jsonl"))}
    before = {row["review_id"]: row for row in read_jsonl(scores.file("review_evaluations.jsonl"))}
    for key, row in before.items():
        assert after[key]["checkmark_score"] == row["checkmark_score"]
        for name, answer in row["answers"].items():
            assert after[key]["answers"][name]["yes"] == answer["yes"]
            odds = np.log(answer["p_yes"] / (1 - answer["p_yes"])) / fitted["temperature"]
            assert after[key]["answers"][name]["p_yes"] == pytest.approx(1 / (1 + np.exp(-odds)), abs=2e-6)
    assert any(after[key]["mean_p_yes"] != row["mean_p_yes"] for key, row in before.items())
    with pytest.raises(InputError, match="have a temperature already"):
        measure(tmp_path / "x", {"corpus": corpus, "scores": calibrated}, labels=str(csv_path), calibrate=True)
    with pytest.raises(ConfigError, match="another judge"):
        scored(tmp_path / "y", corpus, {"engine": "lexical"}, published(task))
    probed, _ = measure(tmp_path / "z", {"corpus": corpus, "scores": calibrated}, num_probed=4, max_paraphrases=0)
    assert probed["judges"][0]["probes"]["repeat"]["max_answer"] == pytest.approx(0, abs=1e-4)


def test_the_temperature_of_an_overconfident_judge_is_found(
    tmp_path: Path, corpus: Artifact, rows: tuple[Rows, Rows]
) -> None:
    ids = [row["review_id"] for row in rows[1]]
    answers, labels = draw(ids, 1, temperature=2.5)
    scores = judged(tmp_path / "s", corpus, answers)
    path = write_labels(tmp_path / "labels.csv", as_rows(labels))
    quality, _ = measure(tmp_path / "t", {"corpus": corpus, "scores": scores}, labels=str(path), calibrate=True)
    fitted = quality["calibration"]
    assert 1.6 < fitted["temperature"] < 4
    assert fitted["nll_after"] < fitted["nll_before"]
    assert fitted["judge"] == {"model_name_or_path": "a/judge", "include_paper": "none"}
    assert any("A temperature of" in line and "it helps" in line for line in quality["conclusion"])
    # Labels outside dev leave the temperature as it is.
    train = {row["paper_id"] for row in rows[0] if row["split"] == "train"}
    kept = {row["review_id"] for row in rows[1] if row["paper_id"] not in train}
    only_dev = write_labels(tmp_path / "dev.csv", as_rows({key: labels[key] for key in ids if key in kept}))
    again, _ = measure(tmp_path / "u", {"corpus": corpus, "scores": scores}, labels=str(only_dev), calibrate=True)
    assert again["calibration"] == fitted
    rest = write_labels(tmp_path / "train.csv", as_rows({key: labels[key] for key in ids if key not in kept}))
    with pytest.raises(InputError, match=r"too few labels of dev reviews[\s\S]*0[\s\S]*at least 50"):
        measure(tmp_path / "v", {"corpus": corpus, "scores": scores}, labels=str(rest), calibrate=True)


def test_rules_have_no_temperature(tmp_path: Path, corpus: Artifact, scores: Artifact, rows: tuple[Rows, Rows]) -> None:
    labels = [(row["review_id"], "statistics", number % 2) for number, row in enumerate(rows[1])]
    path = write_labels(tmp_path / "labels.csv", labels)
    with pytest.raises(InputError, match="gives no probabilities to calibrate"):
        measure(tmp_path / "t", {"corpus": corpus, "scores": scores}, labels=str(path), calibrate=True)


@pytest.mark.slow
def test_what_is_cut_or_fails_is_left_out_and_counted(
    tmp_path: Path, tiny_judge: Path, rows: tuple[Rows, Rows]
) -> None:
    """One review leaves no room for what is added: cut at its end, it would look as if nothing had been added."""
    papers = rows[0][:2]
    reviews = [dict(row) for row in rows[1] if row["paper_id"] in {paper["paper_id"] for paper in papers}]
    reviews[0]["text"] = "A word. " * 280
    corpus = make_corpus(tmp_path / "corpus", papers, reviews)
    path = tmp_path / "two.json"
    save_checklist(two_items(), path)
    for truncate in (False, True):
        engine = {
            "engine": "transformers", "model_name_or_path": str(tiny_judge),
            "truncate_reviews": truncate, "max_length": 1400,
        }  # fmt: skip
        scores = scored(tmp_path / f"s{truncate}", corpus, engine, checklist=str(path))
        quality, task = measure(tmp_path / f"t{truncate}", {"corpus": corpus, "scores": scores}, num_probed=20)
        probes = quality["judges"][0]["probes"]
        failed = [row for row in read_jsonl(task.output / "probes.jsonl") if row["answers"] is None]
        assert {row["variant"] for row in failed if row["review_id"] == reviews[0]["review_id"]} >= {PADDED}
        assert probes["num_failed"] == len(failed) > 0
        assert probes["padding"]["num_reviews"] == len(reviews) - len(
            [row for row in failed if row["variant"] == PADDED]
        )
        assert any("could not be asked about" in line for line in quality["conclusion"])
        assert ("cut off" in failed[0]["reason"]) == truncate


def test_engines_of_the_manifest_are_those_of_the_scores(scores: Artifact, tiny_judge: Path) -> None:
    from prefmill.checklist.judge_scores import Judge

    for config in (LexicalConfig(), TransformersConfig(model_name_or_path=str(tiny_judge), include_paper="text")):
        judge = Judge("scores", config.engine, config.model_dump(mode="json"), None, two_items(), (), frozenset())
        assert judge.engine_config() == config
