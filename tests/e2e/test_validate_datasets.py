"""validate_datasets: sound datasets pass, of generated and of real reviews, the same every time, tokens counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from review_artifacts import Rows, make_artifact, make_corpus, make_scores, make_task, read_rows
from validation_runs import Inputs, build_all, failures, report_of, validate

from prefmill.core.config import load
from stages import build_datasets


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return build_all(tmp_path_factory.mktemp("inputs"))


def test_sound_datasets_pass(tmp_path: Path, inputs: Inputs) -> None:
    task, metrics = validate(tmp_path, inputs)
    assert metrics["errors"] == 0
    report = json.loads((task.output / "report.json").read_text())
    assert {check["result"] for check in report["checks"].values()} <= {"passed", "warned", "not run"}
    assert [name for name, check in report["checks"].items() if check["result"] == "not run"] == ["tokens"]
    assert len(report["datasets"]) == 12
    assert "| leakage | passed |" in (task.output / "report.md").read_text()


def test_report_is_the_same_every_time_and_names_no_machine_path(tmp_path: Path, inputs: Inputs) -> None:
    first, second = (validate(tmp_path / name, inputs)[0] for name in ("a", "b"))
    for name in ("report.json", "report.md"):
        assert (first.output / name).read_bytes() == (second.output / name).read_bytes()
        assert str(inputs["datasets"][0].path) not in (first.output / name).read_text()


def test_without_corpus_and_scores_the_rest_is_checked(tmp_path: Path, inputs: Inputs) -> None:
    _, metrics = validate(tmp_path, {"datasets": inputs["datasets"]})
    assert metrics["errors"] == 0
    assert report_of(tmp_path)["checks"]["source"]["result"] == "not run"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words with a chat template, and a configuration with a context of 4,096."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"[U]": 0, "word": 1}, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    special = {"unk_token": "[U]", "pad_token": "[U]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special).save_pretrained(folder)
    LlamaConfig(max_position_embeddings=4096).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_token_lengths(tmp_path: Path, inputs: Inputs, model: Path) -> None:
    _, metrics = validate(tmp_path, inputs, model_name_or_path=str(model))
    tokens = report_of(tmp_path)["tokens"]
    assert tokens["max_length"] == 4096
    row = max(
        read_rows(inputs["datasets"][0].path / "sft_clean_train" / "data.jsonl"),
        key=lambda r: sum(len(turn["content"].split()) for turn in r["messages"]),
    )
    words = sum(1 + len(turn["content"].split()) for turn in row["messages"])
    assert tokens["longest"]["sft_clean_train"] in (words, words - 1)  # the template names no answer it does not have
    assert "sft_vision_train" not in tokens["longest"]
    assert any(
        f["check"] == "tokens" and "cannot show this model images" in f["what"] for f in report_of(tmp_path)["findings"]
    )
    assert metrics["errors"] == 0
    found = failures(tmp_path, inputs, model_name_or_path=str(model), max_length=120)
    assert "of the rows are too long" in found["tokens"]
    _, metrics = validate(tmp_path, inputs, model_name_or_path=str(model), max_length=120, max_too_long_fraction=1.0)
    assert metrics["warnings"] > 0


def read_real(path: Path) -> tuple[Rows, Rows, Rows]:
    """Papers, reviews and evaluations of the ICLR file; a review's score is a stand-in, its distinct words by 25."""
    papers, reviews, evaluations = {}, [], []
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        raw = sorted((json.loads(line) for line in stream), key=lambda row: (row["paper_id"], row["review_id"]))
    for row in raw:
        paper = {key: row[key] for key in ("paper_id", "title", "abstract", "decision", "venue")}
        split = "val" if len(papers) % 10 == 9 else "train"
        papers.setdefault(row["paper_id"], {**paper, "split": split, "text": "", "pages": [], "figures": []})
        ids = {"review_id": row["review_id"], "paper_id": row["paper_id"]}
        rest = {"rating": float(row["rating"]), "confidence": None, "venue": row["venue"], "sub_scores": {}}
        reviews.append({**ids, "text": row["review_text"], **rest})
        score = float(min(24, len(set(row["review_text"].split())) // 25))
        evaluations.append({**ids, "answers": {}, "checkmark_score": score, "mean_p_yes": score / 24, "engine": "e"})
    return list(papers.values()), reviews, evaluations


@pytest.mark.slow
@pytest.mark.reviews
def test_real_reviews_build_and_validate(tmp_path: Path, reviews_file: Path) -> None:
    """The known count: 1,325 same-paper pairs of accepted papers differ by 2 rating points or more."""
    papers, reviews, evaluations = read_real(reviews_file)
    corpus = make_corpus(tmp_path / "corpus", papers, reviews)
    inputs: Inputs = {"corpus": (corpus,), "scores": make_scores(tmp_path / "scores", corpus, evaluations)}
    task = make_task(tmp_path / "datasets", "build_datasets", inputs)
    build_datasets.run(load(build_datasets.BuildDatasetsConfig, {"modalities": ["clean"]}), task)
    summary = json.loads((task.output / "summary.json").read_text())
    dpo = summary["dpo"]
    later_filters = ("checkmark_diff_too_small", "rating_and_checkmark_disagree", "same_text")
    dropped_later = sum(dpo["dropped"][split][reason] for split in ("train", "val") for reason in later_filters)
    assert sum(dpo["pairs"].values()) + dropped_later == 1325
    assert summary["sft"]["selected"]["train"] == summary["reviews"]["train"] // 5
    datasets = make_artifact(task.output, "preference_datasets")
    _, found = validate(tmp_path, {**inputs, "datasets": (datasets,)})
    assert found["errors"] == 0
    assert found["length_bias"]["dpo_clean_train"]["low"] > 0.65, "the stand-in score grows with length"
