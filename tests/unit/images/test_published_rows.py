"""Rows of published sets of compared pictures, and rows that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefmill.core.errors import InputError
from prefmill.images.collection import Collection
from prefmill.images.pair_sources import (
    ImageRewardSource,
    PairsSource,
    PickAPicSource,
    collect,
)

PICK = {
    "caption": "a cat", "image_0_uid": "u0", "image_1_uid": "u1", "jpg_0": "a.png", "jpg_1": "b.png",
    "label_0": 1, "label_1": 0,
}  # fmt: skip
UNCHOSEN = "two images and no choice between them"
RANK = {"id": 7, "prompt": "a cat", "generations": ["a.png", "b.png"], "ranking": [1, 2]}


@pytest.mark.parametrize(
    "change",
    [
        {"label_0": None}, {"label_0": float("nan")}, {"label_0": "yes"}, {"label_0": 0}, {"label_0": 7},
        {"caption": ["a"]}, {"image_0_uid": None},
    ],
)  # fmt: skip
def test_a_published_row_without_a_label_or_a_name_is_set_aside(tmp_path: Path, change: dict[str, Any]) -> None:
    assert pick(tmp_path, {}).ratings
    found = pick(tmp_path, change)
    assert (found.ratings, len(found.quarantine.rows)) == ([], 1)


def pick(folder: Path, change: dict[str, Any]) -> Collection:
    (folder / "p.jsonl").write_text(json.dumps({**PICK, **change}) + "\n")
    return collect([PickAPicSource(format="pickapic", path=str(folder / "p.jsonl"))], [], folder / "work")  # type: ignore[arg-type]


def test_a_label_that_is_said_not_to_be_one_is_a_skip(tmp_path: Path) -> None:
    for said in ("False", False, None):
        ((_, rating),) = pick(tmp_path, {"has_label": said}).ratings
        assert rating["choice"] == "skip"


@pytest.mark.parametrize(
    "change",
    [
        {"ranking": [1, None]}, {"ranking": ["1", "best"]}, {"ranking": [1, float("nan")]}, {"ranking": [True, False]},
        {"id": None}, {"prompt": None}, {"prompt": 5}, {"generations": [1, 2]}, {"generations": ["/a.png", "b.png"]},
    ],
)  # fmt: skip
def test_a_ranking_that_is_none_is_set_aside(tmp_path: Path, change: dict[str, Any]) -> None:
    found = ranked(tmp_path, change)
    assert (found.ratings, len(found.quarantine.rows)) == ([], 1)
    ((_, rating),) = ranked(tmp_path, {}).ratings
    assert (rating["prompt_id"], rating["choice"]) == ("7", "left")
    for ranks, choice in ((["1", "2"], "left"), (["2nd", "1st"], "right"), (["1ST", 1], "tie")):
        ((_, rating),) = ranked(tmp_path, {"ranking": ranks}).ratings
        assert rating["choice"] == choice


def ranked(folder: Path, change: dict[str, Any]) -> Collection:
    (folder / "r.json").write_text(json.dumps([{**RANK, **change}]))
    source = ImageRewardSource(format="imagereward", rankings=str(folder / "r.json"), images=str(folder))  # type: ignore[arg-type]
    return collect([source], [], folder / "work")


@pytest.mark.parametrize(
    ("row", "choices"),
    [
        ({"image_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1], "user_hash": "u"}, ["right"]),
        ({"file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0], "user_hash": "u"}, ["left"]),
        ({"image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2, 1, 1]}, ["right", "right", "tie"]),
        ({"image_path": ["a.jpg", "b.jpg"], "human_preference": ["x", 1]}, []),
        ({"image_path": ["a.jpg", "b.jpg"]}, []),
    ],
)
def test_rows_of_hpdv2(tmp_path: Path, row: dict[str, Any], choices: list[str]) -> None:
    """Its train.json has a preference of 1 for the better image, its test.json ranks, the lower the better."""
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a cat", **row}]))
    source = ImageRewardSource(format="hpdv2", rankings=str(tmp_path / "train.json"), images=str(tmp_path))  # type: ignore[arg-type]
    found = collect([source], [], tmp_path / "work")
    assert [rating["choice"] for _, rating in found.ratings] == choices
    assert {rating["rater"] for _, rating in found.ratings} <= {row.get("user_hash", "ranking")}
    assert len(found.quarantine.rows) == (not choices)


@pytest.mark.parametrize(
    ("source", "name", "row"),
    [
        (PairsSource, "pairs", {"prompt": "a cat", "chosen": "pics\\a.png", "rejected": "pics\\b.png"}),
        (PickAPicSource, "path", {**PICK, "jpg_0": "pics\\a.png", "jpg_1": "pics\\b.png"}),
        (ImageRewardSource, "rankings", {**RANK, "generations": ["pics\\a.png", "pics\\b.png"]}),
    ],
)
def test_backslashes_of_windows_lead_to_the_file_and_not_out_of_the_folder(
    tmp_path: Path, source: Any, name: str, row: dict[str, Any]
) -> None:
    ranking = source is ImageRewardSource
    file = tmp_path / ("rows.json" if ranking else "rows.jsonl")
    format_ = {"pairs": "pairs", "path": "pickapic", "rankings": "imagereward"}[name]

    def read(row: dict[str, Any]) -> Collection:
        file.write_text(json.dumps([row] if ranking else row) + "\n")
        return collect([source(format=format_, **{name: str(file), "images": str(tmp_path)} if ranking else
                               {name: str(file)})], [], tmp_path / "work")  # fmt: skip

    assert {image.path for image in read(row).images.values()} == {tmp_path / "pics" / f"{x}.png" for x in "ab"}
    if source is not PickAPicSource:
        out = json.loads(json.dumps(row).replace("pics", ".."))
        assert read(out).quarantine.counts() == {f"{'ranking' if ranking else 'row'}: images' names cannot be used": 1}


@pytest.mark.parametrize(("votes", "choice"), [([12, 7], "left"), ([5, 5], "tie"), (None, "left")])
def test_a_row_of_hpdv3_with_as_many_votes_for_either_is_a_tie(tmp_path: Path, votes: Any, choice: str) -> None:
    row = {"prompt": "a cat", "path1": "a.png", "path2": "b.png", "confidence": 0.9, "choice_dist": votes}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    ((_, rating),) = collect([PairsSource(format="pairs", pairs=str(tmp_path / "p.jsonl"))], [], tmp_path).ratings  # type: ignore[arg-type]
    assert rating["choice"] == choice


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json"])
@pytest.mark.parametrize("more", [{"confidence": 0.95}, {"confidence": None, "choice_dist": [12, 7]}])
def test_rows_of_hpdv3_prefer_their_first_path(tmp_path: Path, suffix: str, more: dict[str, Any]) -> None:
    """With a confidence, as HPSv3's README shows them, or with the votes of the hub's file."""
    row = {"prompt": "a cat", "path1": "a.png", "path2": "b.png", **more}
    (tmp_path / f"train{suffix}").write_text(json.dumps(row) + "\n")
    found = collect([PairsSource(format="pairs", pairs=str(tmp_path / f"train{suffix}"))], [], tmp_path / "work")  # type: ignore[arg-type]
    (said,) = [rating for _, rating in found.ratings]
    assert found.images[said[said["choice"]]].path.name == "a.png"  # type: ignore[literal-required]
    # Two paths alone do not say which is the better one.
    (tmp_path / "other.jsonl").write_text(json.dumps({key: row[key] for key in ("prompt", "path1", "path2")}) + "\n")
    other = collect([PairsSource(format="pairs", pairs=str(tmp_path / "other.jsonl"))], [], tmp_path / "work")  # type: ignore[arg-type]
    assert other.quarantine.counts() == {f"row: {UNCHOSEN}": 1}


def test_rows_of_imagerewarddb_are_rankings(tmp_path: Path) -> None:
    """A row an image, as the hub has them: every two of a prompt are compared, whatever the order of the rows."""
    import pyarrow
    from pyarrow import parquet

    ranks = {"p1": [1, 2, 2], "p2": [2, 1]}
    rows = [
        {"image": {"bytes": f"{prompt}{n}".encode(), "path": f"{n}.webp"}, "prompt_id": prompt,
         "prompt": f"cat {prompt}", "image_amount_in_total": len(given), "rank": rank, "fidelity_rating": 4}
        for prompt, given in ranks.items() for n, rank in enumerate(given)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows[::2] + rows[1::2]), tmp_path / "rows.parquet")
    source = {"format": "imagereward", "images": str(tmp_path)}
    given = ImageRewardSource(**source, rankings=str(tmp_path / "rows.parquet"))  # type: ignore[arg-type]
    found = collect([given], [], tmp_path / "work")
    assert not found.quarantine.rows
    told = set()
    for _, rating in found.ratings:
        sides = [found.images[name].path.read_bytes().decode() for name in (rating["left"], rating["right"])]
        tie = rating["choice"] == "tie"
        told.add((tie, *(sorted(sides) if tie else sides if rating["choice"] == "left" else sides[::-1])))
    assert told == {(False, "p10", "p11"), (False, "p10", "p12"), (True, "p11", "p12"), (False, "p21", "p20")}
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "x"}]), tmp_path / "bad.parquet")
    bad = ImageRewardSource(**source, rankings=str(tmp_path / "bad.parquet"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"not a row of ImageRewardDB[\s\S]*bad.parquet:row 1"):
        collect([bad], [], tmp_path / "work")


@pytest.mark.parametrize(
    ("file", "reason"),
    [("https://x.org/a.png", "by its address"), ("data:image/png;base64,iVBO", "by its address"),
     ("iVBO" * 100 + "/" + "Rw0K" * 100, "as text")],
)  # fmt: skip
@pytest.mark.parametrize("form", ["pairs", "pickapic", "imagereward"])
def test_addresses_and_pictures_as_text_are_told_as_such(tmp_path: Path, form: str, file: str, reason: str) -> None:
    """Twice the same picture: a name that no disk can hold ended in a traceback."""
    rows = {
        "pairs": {"prompt": "a cat", "chosen": file, "rejected": "b.png"},
        "pickapic": {key: value for key, value in {**PICK, "jpg_0": file}.items() if "uid" not in key},
        "imagereward": {**RANK, "generations": [file, "b.png"]},
    }
    ranking = form == "imagereward"
    path = tmp_path / ("rows.json" if ranking else "rows.jsonl")
    lines = [rows[form], {**rows[form], "id": 8}]
    path.write_text(json.dumps(lines) if ranking else "".join(json.dumps(line) + "\n" for line in lines))
    kinds = {"pairs": (PairsSource, "pairs"), "pickapic": (PickAPicSource, "path"),
             "imagereward": (ImageRewardSource, "rankings")}  # fmt: skip
    source, key = kinds[form]
    given = {"format": form, key: str(path), **({"images": str(tmp_path)} if ranking else {})}
    found = collect([source(**given)], [], tmp_path / "work")  # type: ignore[arg-type]
    assert not found.images
    assert [reason in row["reason"] for row in found.quarantine.rows] == [True, True]


@pytest.mark.parametrize(
    ("sides", "more", "choice"),
    [
        # Columns as their cards on the hub list them: Rapidata's two kinds of sets, GenAI-Arena's (GenAI-Bench).
        (("image1", "image2"), {"votes_image1": 6, "votes_image2": 20, "model1": "flux"}, "image2"),
        (("image1", "image2"), {"votes_image1": 13, "votes_image2": 13}, "tie"),
        (("image1", "image2"),
         {"weighted_results_image1_preference": 0.8, "weighted_results_image2_preference": 0.2}, "image1"),
        (("left_image", "right_image"), {"vote_type": "rightvote", "left_model": "a"}, "right_image"),
        (("left_image", "right_image"), {"vote_type": "bothbad_vote"}, "tie"),
        # Nobody voted, a word nobody knows, and numbers of which nobody knows the meaning.
        (("image1", "image2"), {"votes_image1": 0, "votes_image2": 0}, None),
        (("left_image", "right_image"), {"vote_type": "other"}, None),
        (("image_1", "image_2"), {"label": 0}, None),
        # The number of the better one, as MJ-Bench's own code compares it (get_label of utils/rm_utils.py).
        (("image0", "image1"), {"label": 0}, "image0"),
        (("image0", "image1"), {"label": 1}, "image1"),
    ],
)  # fmt: skip
def test_votes_for_two_images_are_read_or_their_columns_named(
    tmp_path: Path, sides: tuple[str, str], more: dict[str, Any], choice: str | None
) -> None:
    row = {"text": "a cat", **{side: {"bytes": side.encode(), "path": "x.png"} for side in sides}, **more}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    found = collect([PairsSource(format="pairs", pairs=str(tmp_path / "p.parquet"))], [], tmp_path / "work")  # type: ignore[arg-type]
    if choice is None:
        (fault,) = found.quarantine.rows
        assert (fault["reason"], fault["row"]) == (UNCHOSEN, {**row, **dict.fromkeys(sides, "a picture")})
        return
    ((_, said),) = found.ratings
    shown = {side: found.images[said[side]].path.read_bytes().decode() for side in ("left", "right")}  # type: ignore[literal-required]
    assert {*shown.values()} == set(sides)
    assert shown.get(said["choice"], "tie") == choice


@pytest.mark.parametrize(
    ("sides", "said", "better"),
    [
        (("image_a", "image_b"), {"winner": "model_b"}, "b"),  # an arena's
        (("image_a", "image_b"), {"winner": "tie (bothbad)"}, "tie"),
        (("image_1", "image_2"), {"winner": 1.0}, "a"),
        (("left_image", "right_image"), {"preference": "right"}, "b"),
        (("image_a", "image_b"), {"winner": 1}, None),  # the first, or the second after 0
        (("image_1", "image_2"), {"label": 1}, None),
        (("image_1", "image_2"), {"winner": "skip"}, None),
    ],
)
def test_a_word_says_which_of_two_pictures_is_better(
    tmp_path: Path, sides: tuple[str, str], said: dict[str, Any], better: str | None
) -> None:
    """They were set aside as rows without two images."""
    row = {"prompt": "a cat", **dict(zip(sides, ("a.png", "b.png"), strict=True)), **said}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    found = collect([PairsSource(format="pairs", pairs=str(tmp_path / "p.jsonl"))], [], tmp_path)  # type: ignore[arg-type]
    if better is None:
        assert [row["reason"] for row in found.quarantine.rows] == [UNCHOSEN]
        return
    ((_, rating),) = found.ratings
    chosen = rating[rating["choice"]] if rating["choice"] in ("left", "right") else "tie"  # type: ignore[literal-required]
    assert chosen.rpartition("/")[2] == better


def test_raters_of_pairs_have_no_side(tmp_path: Path) -> None:
    """The better image always stood on the left: whoever made 20 pairs was said to answer by the side."""
    rows = [{"prompt": f"a cat {n}", "chosen": f"chosen/{n}.png", "rejected": f"rejected/{n}.png"} for n in range(400)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = collect([PairsSource(format="pairs", pairs=str(tmp_path / "p.jsonl"))], [], tmp_path)  # type: ignore[arg-type]
    assert all(
        found.images[rating[rating["choice"]]].path.parent.name == "chosen"  # type: ignore[literal-required]
        for _, rating in found.ratings
    )
    assert 150 < sum(rating["choice"] == "left" for _, rating in found.ratings) < 250
