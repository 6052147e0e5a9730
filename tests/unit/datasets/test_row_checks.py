"""Each check of one row: the sound row passes, and the fault planted in it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.records import Modality, Paper
from prefmill.datasets.build import dpo_row, make_prompt, sft_row
from prefmill.datasets.examples import CheckedRow, read_examples
from prefmill.datasets.pairs import orient
from prefmill.datasets.registry import DatasetKey
from prefmill.datasets.structure_checks import contrast_problems, image_problems, marker_problems, rating_problems

Row = dict[str, Any]
SFT, DPO = DatasetKey("sft", "clean", "train"), DatasetKey("dpo", "clean", "train")
VISION = DatasetKey("dpo", "vision", "train")


@pytest.fixture
def make(paper: Paper, scored: Any) -> Any:
    """A sound row of a dataset."""

    def row(key: DatasetKey) -> Row:
        prompt = make_prompt(paper, key.modality)
        assert prompt is not None
        better, worse = scored("a", 8, 9), scored("b", 5, 4)
        made = sft_row(prompt, better) if key.kind == "sft" else dpo_row(prompt, orient(better, worse))
        return json.loads(json.dumps(made))

    return row


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """A row as the validator reads it back."""

    def example(key: DatasetKey, row: Row | bytes) -> CheckedRow | str:
        path = tmp_path / key.file_name()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
        ((line, found),) = read_examples(tmp_path, key)
        assert line == 1
        return found

    return example


@pytest.mark.parametrize("modality", ["clean", "clean_images", "vision"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_sound_rows_pass(kind: Any, modality: Modality, make: Any, read: Any) -> None:
    key = DatasetKey(kind, modality, "val")
    example = read(key, make(key))
    assert isinstance(example, CheckedRow), example
    problems = [*rating_problems(example), *contrast_problems(example, 2, 2), *marker_problems(example)]
    assert problems == []
    assert example.where == f"{kind}_{modality}_val/data.jsonl:1"
    assert [answer.rating for answer in example.answers] == ([8.0, 5.0] if kind == "dpo" else [8.0])


BLANK = {"role": "assistant", "content": " \n"}
FORMAT_FAULTS: dict[str, tuple[DatasetKey, Any, str]] = {
    "not json": (SFT, lambda row: b'{"id": ', "JSON"),
    "a list": (SFT, lambda row: b"[]", "object"),
    "invalid utf-8": (SFT, lambda row: json.dumps(row).encode().replace(b"A title", b"\xff"), "JSON"),
    "nan": (DPO, lambda row: json.dumps({**row, "rating_diff": float("nan")}).encode(), "rating_diff"),
    "missing field": (SFT, lambda row: {k: v for k, v in row.items() if k != "paper_id"}, "paper_id: Field required"),
    "extra field": (SFT, lambda row: {**row, "note": 1}, "note: Extra"),
    "wrong type": (DPO, lambda row: {**row, "rating_diff": "3"}, "rating_diff"),
    "empty id": (SFT, lambda row: {**row, "id": ""}, "id:"),
    "empty turn": (SFT, lambda row: {**row, "messages": [row["messages"][0], BLANK]}, "messages[1].content"),
    "no answer": (SFT, lambda row: {**row, "messages": row["messages"][:1]}, "turns are ['user']"),
    "answer first": (SFT, lambda row: {**row, "messages": row["messages"][::-1]}, "turns are ['assistant', 'user']"),
    "even turns": (DPO, lambda row: {**row, "conversations": row["conversations"] * 2}, "turns are ['human', 'human']"),
    "chosen as text": (DPO, lambda row: {**row, "chosen": row["chosen"]["value"]}, "chosen"),
    "chosen by human": (DPO, lambda row: {**row, "chosen": {**row["chosen"], "from": "human"}}, "chosen.from"),
    "images in text": (DPO, lambda row: {**row, "images": []}, "images: Extra"),
    "no images": (VISION, lambda row: {k: v for k, v in row.items() if k != "images"}, "images: Field required"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FORMAT_FAULTS)
def test_format_faults_are_named(fault: str, make: Any, read: Any) -> None:
    key, plant, message = FORMAT_FAULTS[fault]
    found = read(key, plant(make(key)))
    assert isinstance(found, str), "the fault went unseen"
    assert message in found


def test_one_system_turn_is_fine(make: Any, read: Any) -> None:
    row = make(DPO)
    row["conversations"].insert(0, {"from": "system", "value": "You review papers."})
    assert isinstance(read(DPO, row), CheckedRow)


@pytest.mark.parametrize(
    ("completion", "message"),
    [("Good.", "no last line"), ("Good.\nRating: 12", "no last line"), ("Rating: 8", "no review before")],
)
def test_rating_problems(completion: str, message: str, make: Any, read: Any) -> None:
    row = make(SFT)
    row["messages"][1]["content"] = completion
    (problem,) = rating_problems(read(SFT, row))
    assert message in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rating_diff": 2.0}, "rating_diff is 2, but the ratings are 8 and 5"),
        ({"checkmark_diff": 1.0}, "checkmark_diff is 1, under 2"),
        ({"checkmark_diff": -5.0}, "checkmark_diff is -5, under 2"),
    ],
)
def test_contrast_problems(changes: Row, message: str, make: Any, read: Any) -> None:
    assert list(contrast_problems(read(DPO, {**make(DPO), **changes}), 2, 2)) == [message]


def test_contrast_of_swapped_sides(make: Any, read: Any) -> None:
    row = make(DPO)
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    assert list(contrast_problems(read(DPO, row), 2, 2)) == ["rating_diff is 3, but the ratings are 5 and 8"]


def test_contrast_under_the_threshold_and_of_the_same_text(make: Any, read: Any) -> None:
    assert list(contrast_problems(read(DPO, make(DPO)), 4, 2)) == ["rating_diff is 3, under 4"]
    row = make(DPO)
    row["rejected"]["value"] = row["chosen"]["value"].replace("Rating: 8", "Rating: 5").replace(" ", "  ")
    assert list(contrast_problems(read(DPO, row), 2, 2)) == ["chosen and rejected are the same text"]


def test_marker_problems(make: Any, read: Any) -> None:
    row = make(VISION)
    row["images"] = row["images"][:1]
    assert list(marker_problems(read(VISION, row))) == ["2 <image> markers for 1 images"]
    row = make(DPO)
    row["rejected"]["value"] = "An <image> here.\nRating: 5"
    assert list(marker_problems(read(DPO, row))) == ["<image> in a completion"]


def test_image_problems(make: Any, read: Any, tmp_path: Path) -> None:
    from PIL import Image

    row = make(VISION)
    for number, name in enumerate(row["images"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 50 + number).save(tmp_path / name)
    assert list(image_problems(read(VISION, row), tmp_path)) == []


@pytest.mark.parametrize("fault", ["missing", "truncated", "text", "outside"])
def test_image_faults(fault: str, make: Any, read: Any, tmp_path: Path) -> None:
    from PIL import Image

    row = make(VISION)
    row["images"] = ["images/x.png"]
    path = tmp_path / "images" / "x.png"
    path.parent.mkdir()
    Image.effect_noise((64, 64), 50).save(path)
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "text":
        path.write_text("no image")
    else:
        row["images"] = ["images/../../x.png"]
    (problem,) = image_problems(read(VISION, row), tmp_path)
    expected = {"missing": "missing image", "outside": "not a path below", "truncated": "damaged image"}
    assert expected.get(fault, "not an image") in problem
