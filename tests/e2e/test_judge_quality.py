"""judge_quality: known agreement, shifts and temperatures; labels that are wrong; real engines; calibrated scores."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from review_artifacts import Rows, make_artifact, make_corpus, make_rows, make_task

import prefmill.checklist.quality as quality_module
import stages.judge_quality as stage
import stages.score_reviews as score_reviews
from prefmill.artifacts import Artifact, payload
from prefmill.checklist.engines import LexicalConfig, TransformersConfig
from prefmill.checklist.items import Checklist, load_checklist, save_checklist
from prefmill.checklist.judge_probes import CONTROL, END, FRONT, INJECTIONS, PADDED, UNCHANGED
from prefmill.checklist.lexical import LexicalEngine
from prefmill.config import validate
from prefmill.errors import ConfigError, InputError
from prefmill.records import Answer, read_jsonl, write_jsonl
from prefmill.reviews.generated import generate
from prefmill.stage import Task
from tests.unit.checklist.conftest import make_tokenizer, save_tiny_model

QUICK = {"num_probed": 0, "num_resamples": 1000}
NUM_PAPERS = 40
Answers = Mapping[str, Sequence[float]]


@pytest.fixture(scope="module")
def rows() -> tuple[Rows, Rows]:
    papers, reviews = make_rows(NUM_PAPERS)
    for index, paper in enumerate(papers):
        paper["split"] = "dev" if index % 2 else "train"
    return papers, reviews


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


def scored(
    folder: Path, corpus: Artifact, engine: dict[str, Any], calibration: Artifact | None = None, **settings: Any
) -> Artifact:
    """The stage's own scores, as an artifact."""
    inputs = {"corpus": [corpus], **({"calibration": [calibration]} if calibration else {})}
    task = make_task(folder, "score_reviews", inputs)
    config = validate(score_reviews.ScoreReviewsConfig, {"engine": engine, **settings})
    score_reviews.run(config, task)
    return make_artifact(task.output, "review_scores", config.model_dump(mode="json"), corpus=corpus)


def judged(
    folder: Path,
    corpus: Artifact,
    answers: Mapping[str, Answers],
    engine: str = "vllm",
    checklist: Checklist | None = None,
) -> Artifact:
    """Scores as a model would have left them: P(yes) by item for each review of the corpus that is named."""
    checklist = checklist or two_items()
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = [
        {
            "review_id": row["review_id"],
            "paper_id": row["paper_id"],
            "answers": {name: {"yes": p > 0.5, "p_yes": p} for name, p in answers[row["review_id"]].items()},
            "checkmark_score": float(sum(p > 0.5 for p in answers[row["review_id"]].values())),
            "mean_p_yes": float(np.mean(list(answers[row["review_id"]].values()))),
            "engine": engine,
        }
        for row in read_jsonl(corpus.file("reviews.jsonl"))
        if row["review_id"] in answers
    ]
    write_jsonl(folder / "review_evaluations.jsonl", evaluations)
    save_checklist(checklist, folder / "checklist.json")
    (folder / "summary.json").write_text("{}")
    config = {"engine": {"engine": engine, "model_name_or_path": "a/judge"}}
    return make_artifact(folder, "review_scores", config, corpus=corpus)


def two_items(**questions: str) -> Checklist:
    items = [
        {"id": name, "question": questions.get(name, f"Is it {name}?"), "source": "us"} for name in ("kind", "clear")
    ]
    return Checklist.model_validate_json(json.dumps({"name": "two", "items": items}))


def write_labels(
    path: Path, labels: Iterable[Sequence[Any]], columns: Sequence[str] = ("review_id", "item_id", "label")
) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *labels])
    return path


def measure(folder: Path, inputs: Mapping[str, Artifact], **settings: Any) -> tuple[dict[str, Any], Task]:
    task = make_task(folder, "judge_quality", {name: [item] for name, item in inputs.items()})
    stage.run(validate(stage.JudgeQualityConfig, {**QUICK, **settings}), task)
    return json.loads((task.output / "quality.json").read_text()), task


def published(task: Task, **inputs: Artifact) -> Artifact:
    return make_artifact(task.output, "judge_quality", {}, **inputs)


def draw(
    ids: Sequence[str], seed: int, temperature: float = 1.0
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, bool]]]:
    """P(yes) of a judge that is over-confident by `temperature`, and labels drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0.3, 1.5, (len(ids), 2))
    labels = rng.random(odds.shape) < 1 / (1 + np.exp(-odds))
    p_yes = np.round(1 / (1 + np.exp(-odds * temperature)), 6)
    names = ("kind", "clear")
    answers = {key: dict(zip(names, row, strict=True)) for key, row in zip(ids, p_yes.tolist(), strict=True)}
    return answers, {key: dict(zip(names, row, strict=True)) for key, row in zip(ids, labels.tolist(), strict=True)}


def as_rows(labels: Mapping[str, Mapping[str, bool]]) -> Rows:
    return [[key, name, "yes" if yes else "no"] for key, row in labels.items() for name, yes in row.items()]  # type: ignore[misc]


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
    assert found["statistics"]["kappa"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    wrong = sum(a != b for a, b in zip(labels, turned, strict=True))
    assert found["summary"]["accuracy"]["value"] == pytest.approx(1 - wrong / len(answers), abs=1e-6)
    assert found["summary"]["accuracy"]["low"] < 1 - wrong / len(answers) < found["summary"]["accuracy"]["high"]
    assert judge["labels"]["num_answers"] == quality["num_labels"] == 2 * len(answers)
    assert judge["labels"]["accuracy"]["value"] == pytest.approx(1 - wrong / len(labels), abs=1e-6)
    assert len(list(read_jsonl(task.output / "labelled.jsonl"))) == len(labels)
    assert f"over {len(labels)} labels of {NUM_PAPERS} papers" in quality["conclusion"][0]
    assert sorted(path.name for path in payload(task.output)) == [
        "between.jsonl", "labelled.jsonl", "probes.jsonl", "quality.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows_of_labels", "message"),
    [
        ([("R", "statistics", "maybe")], r"neither yes nor no[\s\S]*labels.csv:2[\s\S]*maybe"),
        ([("R", "statistics", "")], r"a label without its label[\s\S]*labels.csv:2"),
        ([("R", "", "yes")], r"a label without its item_id[\s\S]*labels.csv:2"),
        ([("", "statistics", "yes")], "a label without its review_id"),
        (
            [("R", "statistics", "yes"), ("nobody", "statistics", "no")],
            r"unknown review_id[\s\S]*labels.csv:3[\s\S]*nobody",
        ),
        ([("R", "statistic", "yes")], r"unknown item_id \(did you mean 'statistics'\?\)[\s\S]*labels.csv:2"),
        ([("R", "statistics", "yes"), ("R", "statistics", "no")], r"labels.csv:3[\s\S]*statistics of review .* again"),
        ([], "the file of labels holds none"),
        ([("R", "statistics")], "a label without its label"),
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
    with pytest.raises(InputError, match="unreadable CSV"):
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


def test_engines_of_the_manifest_are_those_of_the_scores(scores: Artifact, tiny_judge: Path) -> None:
    from prefmill.checklist.judge_scores import Judge

    for config in (LexicalConfig(), TransformersConfig(model_name_or_path=str(tiny_judge), include_paper="text")):
        judge = Judge("scores", config.engine, config.model_dump(mode="json"), None, two_items(), (), frozenset())
        assert judge.engine_config() == config
