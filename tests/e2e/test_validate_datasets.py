"""validate_datasets: sound datasets pass, and every planted fault stops the stage with its check and its place."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from review_artifacts import (
    Rows,
    add_images,
    edit_rows,
    evaluate,
    make_artifact,
    make_corpus,
    make_rows,
    make_scores,
    make_task,
    read_rows,
)

from prefmill.artifacts import Artifact
from prefmill.config import load
from prefmill.errors import PrefmillError
from prefmill.stage import Task
from stages import build_datasets, validate_datasets

Inputs = dict[str, tuple[Artifact, ...]]
ALL = ["clean", "clean_images", "vision"]


def build(folder: Path, papers: Rows, reviews: Rows, modalities: list[str]) -> Inputs:
    """The inputs of validation: a corpus, its scores and the datasets made from them."""
    corpus = make_corpus(folder / "corpus", papers, reviews)
    inputs: Inputs = {"corpus": (corpus,), "scores": make_scores(folder / "scores", corpus, map(evaluate, reviews))}
    task = make_task(folder / "datasets", "build_datasets", inputs)
    build_datasets.run(load(build_datasets.BuildDatasetsConfig, {"modalities": modalities}), task)
    return {**inputs, "datasets": (make_artifact(task.output, "preference_datasets"),)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    papers, reviews = make_rows(80)
    add_images(folder / "corpus", papers)
    return build(folder, papers, reviews, ALL)


@pytest.fixture
def plant(inputs: Inputs, tmp_path: Path) -> Callable[[Callable[[Path], None]], Inputs]:
    """The inputs with a fault planted in a copy of the datasets."""

    def changed(change: Callable[[Path], None]) -> Inputs:
        folder = tmp_path / "planted"
        shutil.copytree(inputs["datasets"][0].path, folder, ignore=shutil.ignore_patterns("manifest.json"))
        change(folder)
        return {**inputs, "datasets": (make_artifact(folder, "preference_datasets"),)}

    return changed


def validate(folder: Path, inputs: Inputs, **config: Any) -> tuple[Task, dict[str, Any]]:
    task = make_task(folder / "validation", "validate_datasets", inputs)
    return task, validate_datasets.run(load(validate_datasets.ValidateDatasetsConfig, config), task)


def report_of(task_folder: Path) -> dict[str, Any]:
    return json.loads((task_folder / "validation" / "logs" / "report.json").read_text())


def failures(folder: Path, inputs: Inputs, **config: Any) -> dict[str, str]:
    """The first error of each check, as `where: what`; the stage must have refused the datasets with that table."""
    with pytest.raises(PrefmillError) as caught:
        validate(folder, inputs, **config)
    report = report_of(folder)
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert report["errors"] >= len(errors) > 0
    for finding in errors:
        assert finding["where"] in str(caught.value)
        assert finding["what"] in str(caught.value)
    return {finding["check"]: f"{finding['where']}: {finding['what']}" for finding in reversed(errors)}


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


def rows_of(name: str, change: Callable[[Rows], Any]) -> Callable[[Path], None]:
    """A change of the rows of a dataset, in place or as what is returned."""

    def edit(folder: Path) -> None:
        edit_rows(folder / name / "data.jsonl", lambda rows: change(rows) or rows)

    return edit


def broken_line(folder: Path) -> None:
    path = folder / "dpo_clean_train" / "data.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2][:50] + "\n"
    path.write_text("".join(lines))


def lost_dataset(folder: Path) -> None:
    shutil.rmtree(folder / "dpo_vision_val")


def incomplete_tags(folder: Path) -> None:
    path = folder / "dataset_info.json"
    registry = json.loads(path.read_text())
    del registry["r_sft_clean_train"]["tags"]["role_tag"]
    path.write_text(json.dumps(registry))


def lost_image(folder: Path) -> None:
    (folder / read_rows(folder / "sft_vision_train" / "data.jsonl")[0]["images"][1]).unlink()


def val_rows_in_train(folder: Path) -> None:
    rows = read_rows(folder / "dpo_clean_val" / "data.jsonl")
    train = folder / "dpo_clean_train" / "data.jsonl"
    edit_rows(train, lambda kept: sorted(kept + rows[:1], key=lambda row: row["group"]))


def same_title(folder: Path) -> None:
    title = read_rows(folder / "dpo_clean_val" / "data.jsonl")[0]["conversations"][0]["value"].split("\n")[2]

    def change(rows: Rows) -> None:
        lines = rows[0]["messages"][0]["content"].split("\n")
        assert lines[2].startswith("Title: ")
        lines[2] = title.upper().replace("TITLE", "Title")
        rows[0]["messages"][0]["content"] = "\n".join(lines)

    rows_of("sft_clean_train", change)(folder)


def swapped(rows: Rows) -> None:
    rows[1]["chosen"], rows[1]["rejected"] = rows[1]["rejected"], rows[1]["chosen"]


def reversed_copy(rows: Rows) -> None:
    copy = json.loads(json.dumps(rows[0]))
    swapped([{}, copy])
    rows.insert(1, {**copy, "id": "reversed", "chosen_id": copy["rejected_id"], "rejected_id": copy["chosen_id"]})


def without_rating(rows: Rows) -> None:
    rows[4]["messages"][-1]["content"] = rows[4]["messages"][-1]["content"].rsplit("\n", 1)[0]


def edited_text(rows: Rows) -> None:
    rows[3]["messages"][-1]["content"] = "I changed my mind.\n" + rows[3]["messages"][-1]["content"]


def drop_id(rows: Rows) -> None:
    del rows[1]["id"]


def drop_image(rows: Rows) -> None:
    rows[0]["images"].pop()


def set_checkmark_diff(value: float) -> Callable[[Rows], Any]:
    return lambda rows: rows[0].update(checkmark_diff=value)


# The fault, the check that must find it, its place (dataset:line, or a file) and the beginning of what is said.
Fault = tuple[Callable[[Path], None], str, str, str]
FAULTS: dict[str, Fault] = {
    "broken JSON": (broken_line, "format", "dpo_clean_train:3", "row: Invalid JSON"),
    "missing field": (rows_of("sft_clean_val", drop_id), "format", "sft_clean_val:2", "id: Field required"),
    "extra field": (rows_of("sft_clean_val", lambda r: r[0].update(x=1)), "format", "sft_clean_val:1", "x: "),
    "lost row": (rows_of("sft_clean_train", lambda r: r[:-1]), "completeness", "summary.json", "sft_clean_train: "),
    "no rows": (rows_of("sft_clean_val", lambda r: r.clear()), "completeness", "summary.json", "sft_clean_val: 0 rows"),
    "lost dataset": (lost_dataset, "completeness", "summary.json", "dataset dpo_vision_val is missing"),
    "tags": (incomplete_tags, "registry", "dataset_info.json", "entry 'r_sft_clean_train': tags.role_tag is missing"),
    "no rating": (rows_of("sft_clean_train", without_rating), "ratings", "sft_clean_train:5", "no last line"),
    "order": (rows_of("sft_clean_train", lambda r: r.reverse()), "order", "sft_clean_train:", "paper "),
    "swapped": (rows_of("dpo_clean_train", swapped), "contrast", "dpo_clean_train:2", "rating_diff is "),
    "contrast": (rows_of("dpo_clean_val", set_checkmark_diff(1)), "contrast", "dpo_clean_val:1", "checkmark_"),
    "recorded": (rows_of("dpo_clean_val", set_checkmark_diff(40)), "source", "dpo_clean_val:1", "checkmark_"),
    "twice": (rows_of("dpo_clean_train", lambda r: r.insert(0, r[0])), "duplicates", "dpo_clean_train:2", "same id"),
    "reversed": (rows_of("dpo_clean_train", reversed_copy), "contradictions", "dpo_clean_train:2", "the reverse"),
    "leaked row": (val_rows_in_train, "leakage", "dpo_clean_train:", "paper of train is also in val: dpo_"),
    "leaked title": (same_title, "leakage", "sft_clean_train:1", "title of train is also in val"),
    "lost image": (lost_image, "images", "sft_vision_train:1", "images/pages/"),
    "lost marker": (rows_of("dpo_vision_train", drop_image), "images", "dpo_vision_train:1", "2 <image> markers"),
    "edited": (rows_of("sft_clean_train", edited_text), "source", "sft_clean_train:4", "the completion is not"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path: Path, plant: Any, fault: str) -> None:
    change, check, where, what = FAULTS[fault]
    found = failures(tmp_path, plant(change))[check]
    assert found.startswith(where.replace(":", "/data.jsonl:"))
    assert f": {what}" in found


def test_held_out_title_under_another_id(tmp_path: Path) -> None:
    papers, reviews = make_rows(60)
    inputs = build(tmp_path, papers, reviews, ["clean"])
    group = read_rows(inputs["datasets"][0].path / "dpo_clean_train" / "data.jsonl")[0]["group"]
    title = next(paper["title"] for paper in papers if paper["paper_id"] == group)
    next(paper for paper in papers if paper["split"] == "test")["title"] = title
    corpus = make_corpus(tmp_path / "changed", papers, reviews)
    found = failures(tmp_path, {**inputs, "corpus": (corpus,)})
    assert "title of train is also in test: corpus papers.jsonl:" in found["leakage"]


def test_held_out_paper_in_a_dataset(tmp_path: Path) -> None:
    papers, reviews = make_rows(60)
    inputs = build(tmp_path, papers, reviews, ["clean"])
    group = read_rows(inputs["datasets"][0].path / "dpo_clean_train" / "data.jsonl")[0]["group"]
    next(paper for paper in papers if paper["paper_id"] == group)["split"] = "dev"
    found = failures(tmp_path, {**inputs, "corpus": (make_corpus(tmp_path / "changed", papers, reviews),)})
    assert f"its paper {group} is of split dev" in found["source"]
    assert "paper of train is also in dev" in found["leakage"]


def test_one_part_only(tmp_path: Path, plant: Any) -> None:
    planted = plant(rows_of("dpo_clean_train", swapped))
    assert failures(tmp_path, planted, stage="dpo")
    _, metrics = validate(tmp_path, planted, stage="sft")
    assert metrics["errors"] == 0
    assert all(name.startswith("sft") for name in report_of(tmp_path)["datasets"])


def test_table_is_cut_but_counts_all(tmp_path: Path, plant: Any) -> None:
    planted = plant(rows_of("dpo_clean_train", lambda rows: [row.update(checkmark_diff=1.0) for row in rows] and None))
    with pytest.raises(PrefmillError, match="more of contrast"):
        validate(tmp_path, planted, max_listed=2, stage="dpo")
    assert report_of(tmp_path)["checks"]["contrast"]["errors"] > 2
    listed = [finding for finding in report_of(tmp_path)["findings"] if finding["check"] == "contrast"]
    assert len(listed) == 2


def length_findings(folder: Path) -> list[dict[str, Any]]:
    place = ("length_bias", "dpo_clean_train")
    return [found for found in report_of(folder)["findings"] if (found["check"], found["where"]) == place]


def test_length_bias_warns_but_does_not_fail(tmp_path: Path, plant: Any) -> None:
    def pad(rows: Rows) -> None:
        for row in rows:
            for side, words in (("chosen", 300), ("rejected", 0)):
                row[side]["value"] = "word " * words + row[side]["value"]

    planted = plant(rows_of("dpo_clean_train", pad))
    _, metrics = validate(tmp_path, {"datasets": planted["datasets"]}, stage="dpo", min_shared_characters=10**6)
    assert metrics["length_bias"]["dpo_clean_train"]["longer_is_chosen"] == 1.0
    assert "100.0% of" in length_findings(tmp_path)[0]["what"]


def test_length_bias_is_quiet_where_lengths_are_mixed(tmp_path: Path, plant: Any) -> None:
    def even(rows: Rows) -> None:
        for number, row in enumerate(rows):
            for side, words in (("chosen", number % 2), ("rejected", (number + 1) % 2)):
                row[side]["value"] = "word " * 300 * words + row[side]["value"]

    planted = plant(rows_of("dpo_clean_train", even))
    validate(tmp_path, {"datasets": planted["datasets"]}, stage="dpo", min_shared_characters=10**6)
    assert length_findings(tmp_path) == []


def test_damaged_summary_is_explained(tmp_path: Path, plant: Any) -> None:
    with pytest.raises(PrefmillError, match=r"summary cannot be read"):
        validate(tmp_path, plant(lambda folder: (folder / "summary.json").write_text("{}")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words with a chat template, and a configuration with a context of 4,096."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"[U]": 0}, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[U]", chat_template=template).save_pretrained(folder)
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
    assert any(f["check"] == "tokens" and "no image processor" in f["what"] for f in report_of(tmp_path)["findings"])
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
