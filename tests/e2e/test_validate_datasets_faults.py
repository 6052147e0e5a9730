"""validate_datasets: every planted fault stops the stage with its check and its place, and a bias is a warning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from review_artifacts import Rows, edit_rows, make_artifact, make_corpus, make_rows, read_rows
from validation_runs import Inputs, build, build_all, failures, report_of, validate

from prefmill.core.errors import PrefmillError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return build_all(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def plant(inputs: Inputs, tmp_path: Path) -> Callable[[Callable[[Path], None]], Inputs]:
    """The inputs with a fault planted in a copy of the datasets."""

    def changed(change: Callable[[Path], None]) -> Inputs:
        folder = tmp_path / "planted"
        shutil.copytree(inputs["datasets"][0].path, folder, ignore=shutil.ignore_patterns("manifest.json"))
        change(folder)
        return {**inputs, "datasets": (make_artifact(folder, "preference_datasets"),)}

    return changed


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
    del registry["sft_clean_train"]["tags"]["role_tag"]
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
    "tags": (incomplete_tags, "registry", "dataset_info.json", "entry 'sft_clean_train': tags.role_tag is missing"),
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
