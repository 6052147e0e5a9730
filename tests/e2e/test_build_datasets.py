"""build_datasets on generated corpora: what it selects, what it refuses, and that others can load it."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from dataset_builds import Inputs, build, make_inputs, summary_of
from review_artifacts import add_images, evaluate, make_rows, read_rows

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER
from prefmill.core.stage import Task

LLAMAFACTORY_TAGS = ("role", "content", "user", "assistant", "observation", "function", "system")


@pytest.fixture(scope="module")
def generated() -> tuple[list[Any], list[Any]]:
    return make_rows(200)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, generated: tuple[list[Any], list[Any]]) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), *generated)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Task:
    return build(tmp_path_factory.mktemp("built"), inputs)


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Task]:
    folder = tmp_path_factory.mktemp("images")
    papers, reviews = make_rows(80)
    add_images(folder / "corpus", papers)
    inputs = make_inputs(folder, papers, reviews)
    return inputs, build(folder, inputs, modalities=["clean", "clean_images", "vision"])


def test_sft_is_the_best_fifth_of_train_and_the_same_cut_elsewhere(built: Task, generated: Any) -> None:
    papers, reviews = generated
    split_of = {paper["paper_id"]: paper["split"] for paper in papers}
    scores = {review["review_id"]: evaluate(review) for review in reviews}
    train = [review["review_id"] for review in reviews if split_of[review["paper_id"]] == "train"]
    chosen = [row["id"] for row in read_rows(built.output / "sft_clean_train/data.jsonl")]
    assert len(chosen) == len(train) // 5
    worst = min(scores[item]["checkmark_score"] for item in chosen)
    assert worst == summary_of(built)["sft"]["cut"]["checkmark_score"]
    assert max(scores[item]["checkmark_score"] for item in set(train) - set(chosen)) <= worst
    val = {row["id"] for row in read_rows(built.output / "sft_clean_val/data.jsonl")}
    clearly_better = {
        review["review_id"]
        for review in reviews
        if split_of[review["paper_id"]] == "val" and scores[review["review_id"]]["checkmark_score"] > worst
    }
    assert clearly_better <= val
    assert min(scores[item]["checkmark_score"] for item in val) >= worst


def test_pairs_are_exactly_those_of_the_definition(built: Task, generated: Any) -> None:
    papers, reviews = generated
    by_paper = defaultdict(list)
    for review in reviews:
        by_paper[review["paper_id"]].append((review, evaluate(review)["checkmark_score"]))
    expected = {
        (split, a[0]["review_id"], b[0]["review_id"])
        for paper in papers
        if paper["decision"] == "accepted" and (split := paper["split"]) in ("train", "val")
        for pair in combinations(by_paper[paper["paper_id"]], 2)
        for a, b in (pair, pair[::-1])
        if a[0]["rating"] - b[0]["rating"] >= 2 and a[1] - b[1] >= 2
    }
    found = {
        (split, row["chosen_id"], row["rejected_id"])
        for split in ("train", "val")
        for row in read_rows(built.output / f"dpo_clean_{split}/data.jsonl")
    }
    assert found == expected
    assert len(found) > 20


def test_every_candidate_pair_is_kept_or_counted_as_dropped(built: Task, generated: Any) -> None:
    papers, reviews = generated
    accepted = {p["paper_id"] for p in papers if p["decision"] == "accepted" and p["split"] == "train"}
    sizes = [sum(review["paper_id"] == paper for review in reviews) for paper in accepted]
    dpo = summary_of(built)["dpo"]
    assert dpo["papers_considered"]["train"] == len(accepted)
    assert dpo["pairs"]["train"] + sum(dpo["dropped"]["train"].values()) == sum(n * (n - 1) // 2 for n in sizes)
    assert dpo["dropped"]["train"]["rating_and_checkmark_disagree"] > 0


def test_pairs_of_a_paper_stay_together(built: Task) -> None:
    groups = [row["group"] for row in read_rows(built.output / "dpo_clean_train/data.jsonl")]
    runs = [group for index, group in enumerate(groups) if index == 0 or groups[index - 1] != group]
    assert len(runs) == len(set(runs)) < len(groups)


def test_dev_and_test_papers_appear_nowhere(built: Task, generated: Any) -> None:
    papers, _ = generated
    allowed = {split: {p["paper_id"] for p in papers if p["split"] == split} for split in ("train", "val")}
    folders = sorted(path.parent for path in built.output.glob("*/data.jsonl"))
    assert [folder.name for folder in folders] == [
        "dpo_clean_train",
        "dpo_clean_val",
        "sft_clean_train",
        "sft_clean_val",
    ]
    for folder in folders:
        rows = read_rows(folder / "data.jsonl")
        assert {row.get("paper_id") or row["group"] for row in rows} <= allowed[folder.name.rsplit("_", 1)[1]]
    text = "".join(path.read_text() for path in built.output.rglob("*.jsonl"))
    held_out = [paper for paper in papers if paper["split"] in ("dev", "test")]
    assert held_out
    assert not [paper["paper_id"] for paper in held_out if paper["paper_id"] in text or paper["title"] in text]


def test_shards_another_run_and_a_second_time_make_the_same_bytes(tmp_path: Path, built: Task, generated: Any) -> None:
    one_shard = make_inputs(tmp_path, *generated, num_shards=1)
    again = build(tmp_path, one_shard, "other")
    again = build(tmp_path, one_shard, "other")  # over its own output, as after a kill
    names = sorted(path.relative_to(built.output) for path in built.output.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again.output) for path in again.output.rglob("*") if path.is_file())
    for name in names:
        assert (built.output / name).read_bytes() == (again.output / name).read_bytes()


def test_images_of_each_modality(with_images: tuple[Inputs, Task]) -> None:
    inputs, task = with_images
    papers = {row["paper_id"]: row for row in read_rows(inputs["corpus"][0].path / "papers.jsonl")}
    for modality, column in (("clean_images", "figures"), ("vision", "pages")):
        rows = read_rows(task.output / f"dpo_{modality}_train/data.jsonl")
        assert rows
        for row in rows:
            assert row["images"] == [f"images/{name}" for name in papers[row["group"]][column]]
            assert row["conversations"][0]["value"].count(IMAGE_MARKER) == len(row["images"])
            for name in row["images"]:
                original = inputs["corpus"][0].path / name.removeprefix("images/")
                assert (task.output / name).read_bytes() == original.read_bytes()
    ids = {m: {r["id"] for r in read_rows(task.output / f"sft_{m}_train/data.jsonl")} for m in ("clean", "vision")}
    assert ids["vision"] < ids["clean"]


def test_twelve_datasets_by_name(with_images: tuple[Inputs, Task]) -> None:
    _, task = with_images
    names = {
        f"{kind}_{modality}_{split}"
        for kind in ("sft", "dpo")
        for modality in ("clean", "clean_images", "vision")
        for split in ("train", "val")
    }
    assert set(json.loads((task.output / "dataset_info.json").read_text())) == names


def test_llamafactory_reads_every_dataset(with_images: tuple[Inputs, Task]) -> None:
    _, task = with_images
    for name in json.loads((task.output / "dataset_info.json").read_text()):
        examples = llamafactory_examples(task.output, name)
        assert examples
        for prompt, responses, images in examples:
            assert [turn["role"] for turn in prompt] == ["user"]
            assert [turn["role"] for turn in responses] == ["assistant"] * (2 if "dpo" in name else 1)
            assert all(turn["content"] for turn in [*prompt, *responses])
            text = "".join(turn["content"] for turn in [*prompt, *responses])
            assert text.count(IMAGE_MARKER) == len(images or [])
            assert all((task.output / image).is_file() for image in images or [])


@pytest.mark.slow
def test_datasets_library_loads_every_dataset(with_images: tuple[Inputs, Task], tmp_path: Path) -> None:
    from datasets import load_dataset

    _, task = with_images
    for path in sorted(task.output.glob("*/data.jsonl")):
        loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
        assert loaded.to_list() == read_rows(path)


def test_exclude_leaves_pairs_out(tmp_path: Path, inputs: Inputs, built: Task) -> None:
    before = [row["id"] for row in read_rows(built.output / "dpo_clean_train/data.jsonl")]
    (tmp_path / "exclude.txt").write_text(f"# suspects\n{before[0]}\n\n{before[3]}\n")
    task = build(tmp_path, inputs, exclude=str(tmp_path / "exclude.txt"))
    after = [row["id"] for row in read_rows(task.output / "dpo_clean_train/data.jsonl")]
    assert after == [item for item in before if item not in (before[0], before[3])]
    assert summary_of(task)["dpo"]["dropped"]["train"]["excluded"] == 2
    assert "warnings" not in summary_of(task)
    (tmp_path / "exclude.txt").write_text(f"{before[0]}\na:b\n", "utf-8-sig")  # as Windows' editor saves it
    [told] = summary_of(build(tmp_path / "other", inputs, exclude=str(tmp_path / "exclude.txt")))["warnings"]
    assert told == "1 of 2 ids in the exclude file name no pair that would be kept"


def test_exclude_file_of_other_pairs_is_refused(tmp_path: Path, inputs: Inputs) -> None:
    (tmp_path / "exclude.txt").write_text("a:b\n")
    with pytest.raises(InputError, match=r"names no pair.*\n.*'a:b'"):
        build(tmp_path, inputs, exclude=str(tmp_path / "exclude.txt"))


def test_max_pairs_per_paper_keeps_the_clearest(tmp_path: Path, inputs: Inputs, built: Task) -> None:
    clearest: dict[str, float] = {}
    for row in read_rows(built.output / "dpo_clean_train/data.jsonl"):
        clearest[row["group"]] = max(row["checkmark_diff"], clearest.get(row["group"], 0))
    rows = read_rows(build(tmp_path, inputs, max_pairs_per_paper=1).output / "dpo_clean_train/data.jsonl")
    assert {row["group"]: row["checkmark_diff"] for row in rows} == clearest
    assert len(rows) == len(clearest)


def llamafactory_examples(folder: Path, name: str) -> list[tuple[list[Any], list[Any], list[str] | None]]:
    """Dataset `name` as LLaMA-Factory reads it, written from its documented rules, strict where it skips and warns.

    Naming `columns` or `tags` makes every unnamed one None. Roles alternate from the user; a plain row has an even
    number of turns, a ranking row an odd number and two dictionaries. Images are found below the dataset folder.
    """
    entry = json.loads((folder / "dataset_info.json").read_text())[name]
    assert entry["formatting"] == "sharegpt"
    column, ranking = entry["columns"], entry.get("ranking", False)
    tag = {key: entry["tags"].get(f"{key}_tag") for key in LLAMAFACTORY_TAGS}
    assert None not in tag.values()
    roles = {tag["user"]: "user", tag["assistant"]: "assistant"}

    def turn(given: dict[str, str]) -> dict[str, str]:
        return {"role": roles[given[tag["role"]]], "content": given[tag["content"]]}

    examples = []
    for row in read_rows(folder / entry["file_name"]):
        turns = [turn(given) for given in row[column["messages"]]]
        assert [item["role"] for item in turns[::2]] == ["user"] * len(turns[::2])
        assert [item["role"] for item in turns[1::2]] == ["assistant"] * len(turns[1::2])
        assert len(turns) % 2 == (1 if ranking else 0)
        if ranking:
            turns += [turn(row[column["chosen"]]), turn(row[column["rejected"]])]
        split = -2 if ranking else -1
        images = column.get("images")
        examples.append((turns[:split], turns[split:], row[images] if images else None))
    return examples
