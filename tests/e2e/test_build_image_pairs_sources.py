"""build_image_pairs: people's own images and listings, other people's formats, and what is wrong with them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import bomb, draw
from image_rating_artifacts import (
    NUM_PROMPTS,
    build_from,
    pairs,
    quarantine,
    rating,
    sure,
    write_ratings,
)
from PIL import Image

from prefmill.core.errors import InputError
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl, write_jsonl


def own_images(folder: Path, header: str = "prompt_id,prompt,file") -> Path:
    """A folder as people have it: images.csv and files beside it."""
    lines = [header]
    for n, side in itertools.product(range(NUM_PROMPTS), "ab"):
        draw(folder / f"p{n:02}{side}.png", 100 * n + ord(side))
        lines.append(f"p{n:02},bars {n},p{n:02}{side}.png")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_images_that_cannot_be_used_take_their_pairs_along(tmp_path: Path) -> None:
    folder = own_images(tmp_path / "mine")
    (folder / "p00a.png").unlink()
    (folder / "p01a.png").write_bytes((folder / "p01a.png").read_bytes()[:60])
    bomb(folder / "p02a.png")
    Image.open(folder / "p03a.png").save(folder / "p03b.png", compress_level=0)  # other bytes, the same picture
    names = [f"p{n:02}/p{n:02}" for n in range(NUM_PROMPTS)]
    ratings = write_ratings(tmp_path / "r.csv", [rating(f"{name}a", f"{name}b", "left") for name in names])
    source = {"format": "ratings", "ratings": str(ratings), "images": str(folder)}
    task = build_from(tmp_path, source, max_quarantined_share=0.3)
    assert [row["prompt_id"] for row in pairs(task)] == [f"p{n:02}" for n in range(4, NUM_PROMPTS)]
    assert quarantine(task) == [
        ("image", "missing image"), ("image", "damaged image"), ("image", "image too large to decode"),
        *[("rating", "its image cannot be used")] * 3, ("pair", "the same image twice"),
    ]  # fmt: skip
    assert str(tmp_path) not in (task.output / "quarantine.jsonl").read_text()
    assert len(list(task.output.rglob("*.png"))) == 2 * (NUM_PROMPTS - 4)


def test_own_ratings_may_name_files(tmp_path: Path) -> None:
    folder = own_images(tmp_path / "mine")
    path = tmp_path / "ratings.csv"
    path.write_text(
        "left,right,rater,dimension,choice\n"
        + "".join(f"p{n:02}a.png,p{n:02}b.png,me,overall,left\n" for n in range(NUM_PROMPTS))
    )
    task = build_from(tmp_path, {"format": "ratings", "ratings": str(path), "images": str(folder)})
    assert [row["preferred"] for row in pairs(task)] == [f"images/p{n:02}/p{n:02}a.png" for n in range(NUM_PROMPTS)]
    image = task.output / pairs(task)[0]["preferred"]
    assert image.read_bytes() == (folder / "p00a.png").read_bytes()
    assert not image.samefile(folder / "p00a.png")  # a later edit of theirs must not reach the artifact


def test_a_rating_may_name_files_as_other_systems_write_them(tmp_path: Path) -> None:
    """With ./ or the whole path, with backslashes, accents as macOS writes them; words in capitals."""
    folder, path = tmp_path / "mine", tmp_path / "ratings.csv"
    for side in "ab":
        draw(folder / "sub" / f"bild-\u00fc{side}.png", ord(side))
    (folder / "images.csv").write_text("prompt,file\nbars,sub/bild-\u00fca.png\nbars,sub/bild-\u00fcb.png\n", "utf-8")
    source = {"format": "ratings", "ratings": str(path), "images": str(folder)}
    for n, name in enumerate(
        ("./sub/bild-\u00fc", f"{folder}/sub/bild-\u00fc", "sub\\bild-\u00fc", "sub/bild-u\u0308")
    ):
        path.write_text(f"Left,Right,Rater,Dimension,Choice\n{name}a.png,{name}b.png,me,Overall,Left\n", "utf-8")
        (row,) = pairs(build_from(tmp_path / str(n), source, max_quarantined_share=0.0))
        assert (folder / "sub" / "bild-\u00fca.png").read_bytes() == (
            tmp_path / str(n) / "output" / row["preferred"]
        ).read_bytes()


@pytest.mark.parametrize("form", ["csv", "parquet", "folder", "saved"])
def test_pairs_of_a_table_or_a_dataset_are_those_of_lines(tmp_path: Path, form: str) -> None:
    """With the pictures as files or, as datasets keeps them, as bytes; written by other libraries."""
    import datasets
    import pandas

    folder = own_images(tmp_path / "mine")
    rows = [{"prompt": f"bars, {n}", "chosen": f"p{n:02}a.png", "rejected": f"p{n:02}b.png", "style": 0.25}
            for n in range(NUM_PROMPTS)]  # fmt: skip
    write_jsonl(folder / "pairs.jsonl", rows)
    given = [
        {**row, **{side: (folder / str(row[side])).read_bytes() for side in ("chosen", "rejected")}} for row in rows
    ]
    path = tmp_path / ("shards" if form == "folder" else f"pairs.{form}")
    if form == "csv":
        pandas.DataFrame(rows).to_csv(folder / "pairs.csv", index=False)
        path = folder / "pairs.csv"
    elif form == "saved":
        images = {side: datasets.Image() for side in ("chosen", "rejected")}
        features = datasets.Features({"prompt": datasets.Value("string"), **images, "style": datasets.Value("float64")})
        whole = [{**row, **{side: {"bytes": row[side], "path": None} for side in images}} for row in given]
        datasets.DatasetDict({"train": datasets.Dataset.from_list(whole, features)}).save_to_disk(str(path))
    else:
        path.mkdir() if form == "folder" else None
        pandas.DataFrame(given).to_parquet(path / "data-00000.parquet" if form == "folder" else path)
    expected = build_from(tmp_path / "lines", {"format": "pairs", "pairs": str(folder / "pairs.jsonl")})
    found = build_from(tmp_path / "table", {"format": "pairs", "pairs": str(path)})

    def shown(task: Task) -> list[Any]:
        sides = ("preferred", "rejected")
        return sorted(
            (row["prompt"], row["labels"]["style"], [(task.output / row[side]).read_bytes() for side in sides])
            for row in pairs(task)
        )

    assert shown(found) == shown(expected)
    assert len(shown(found)) == NUM_PROMPTS


def test_every_split_of_a_saved_dataset_is_read(tmp_path: Path) -> None:
    """As all files of a folder are; and a caption is a prompt."""
    from datasets import Dataset, DatasetDict

    rows = []
    for number in range(8):
        for side in ("chosen", "rejected"):
            draw(tmp_path / f"{side}{number}.png", 100 * number + ord(side[0]))
        both = {side: (tmp_path / f"{side}{number}.png").read_bytes() for side in ("chosen", "rejected")}
        rows.append({"caption": f"bars {number}", **both})
    DatasetDict({"validation": Dataset.from_list(rows[:5]), "test": Dataset.from_list(rows[5:])}).save_to_disk(
        str(tmp_path / "saved")
    )
    task = build_from(tmp_path / "t", {"format": "pairs", "pairs": str(tmp_path / "saved")})
    assert sorted(row["prompt"] for row in pairs(task)) == [f"bars {number}" for number in range(8)]


@pytest.mark.parametrize(("name", "between"), [("p.csv", ";"), ("p.tsv", "\t")])
def test_tables_of_pairs_are_read_as_those_of_prompts(tmp_path: Path, name: str, between: str) -> None:
    lines = [between.join(("Prompt", "Chosen", "Rejected"))]
    for number in range(4):
        for side in "ab":
            draw(tmp_path / f"{side}{number}.png", 100 * number + ord(side))
        lines.append(between.join((f"bars, {number}", f"a{number}.png", f"b{number}.png")))
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    task = build_from(tmp_path / "t", {"format": "pairs", "pairs": str(tmp_path / name)})
    assert sorted(row["prompt"] for row in pairs(task)) == [f"bars, {number}" for number in range(4)]


def test_archives_are_refused_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "00000.tar").write_bytes(b"\xff" * 600)
    with pytest.raises(InputError, match=r"got: +\.tar[\s\S]*load_dataset\('webdataset'"):
        build_from(tmp_path / "t", {"format": "pickapic", "path": str(tmp_path / "set")})
    with pytest.raises(InputError, match="this kind of file is not known"):
        build_from(tmp_path / "u", {"format": "pairs", "pairs": str(tmp_path / "set" / "00000.tar")})


def test_a_bad_row_with_its_pictures_is_set_aside(tmp_path: Path) -> None:
    import pandas

    data = draw(tmp_path / "a.png", 0).read_bytes(), draw(tmp_path / "b.png", 1).read_bytes()
    rows = [{"prompt": prompt, "chosen": data[0], "rejected": data[1]} for prompt in ("bars", "")]
    pandas.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet")
    source = {"format": "pairs", "pairs": str(tmp_path / "pairs.parquet")}
    assert quarantine(build_from(tmp_path / "run", source, max_quarantined_share=0.5)) == [("row", "no prompt")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"format": "scores", "scores": "s.csv"},
            r"no column of scores[\s\S]*got: +image, score\n[\s\S]*such as overall",
        ),
        ({"format": "ratings", "ratings": "mine"}, "this kind of file is not known"),
        ({"format": "ratings", "ratings": "s.csv", "images": "mine/images.csv"}, r"a file, not a folder[\s\S]*mine\n?"),
    ],
)
def test_what_was_meant_is_said(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    own_images(tmp_path / "mine")
    (tmp_path / "s.csv").write_text("image,score\np00a.png,1\np00b.png,2\n")
    paths = {key: str(tmp_path / value) for key, value in {"images": "mine", **keys}.items() if key != "format"}
    with pytest.raises(InputError, match=message):
        build_from(tmp_path, {"format": keys["format"], **paths})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("p00a.png,me,1,1", "scored twice by one rater"),
        ("p00a.png,her,nan,1", "no score, or one that is no number"),
        ("gone.png,me,1,1", "unknown image"),
    ],
)
def test_scores_become_comparisons_of_a_raters_images(tmp_path: Path, bad: str, reason: str) -> None:
    folder, path = own_images(tmp_path / "mine"), tmp_path / "scores.csv"
    lines = ["image,rater,overall,fidelity"]
    for n in range(NUM_PROMPTS):
        lines += [f"p{n:02}a.png,me,{6.0 + n / 10},3", f"p{n:02}b.png,me,{7.5 + n / 10},", f"p{n:02}b.png,you,9,1"]
    path.write_text("\n".join([*lines, bad]) + "\n")
    source = {"format": "scores", "scores": str(path), "images": str(folder)}
    task = build_from(tmp_path / "run", source)
    assert [row["preferred"] for row in pairs(task)] == [f"images/p{n:02}/p{n:02}b.png" for n in range(NUM_PROMPTS)]
    assert not any(row["labels"].get("fidelity") for row in pairs(task))  # one side has no score there
    (row,) = read_jsonl(task.output / "quarantine.jsonl")
    assert (row["where"], row["reason"]) == (f"scores.csv:{3 * NUM_PROMPTS + 2}", reason)
    with pytest.raises(InputError, match="no pair"):
        build_from(tmp_path / "ties", {**source, "tie_margin": 2.0})


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("prompt,file\nbars,\n", r"an image without a file[\s\S]*images.csv:2"),
        ("prompt,file\nbars,../secret.png\n", r"an id cannot|an image outside its folder"),
        ("prompt,file\nbars,sub/../../secret.png\n", "an image outside its folder"),
        ("prompt,file\nbars,a.png\nbars,x/a.png\n", r"two images have one id[\s\S]*images.csv:3"),
        ("prompt,file\nbars,a.png\nbars,a.png\n", r"an image is listed twice[\s\S]*images.csv:3[\s\S]*delete one"),
        ("prompt_id,prompt,file\na b,bars,a.png\n", "an id cannot be a file name"),
        ("prompt_id,prompt,file\np,bars,a.png\np,other,b.png\n", "one prompt_id means two things"),
        ("prompt\nbars\n", "no column file"),
    ],
)
def test_a_listing_that_cannot_be_used_is_explained(tmp_path: Path, listing: str, message: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "images.csv").write_text(listing)
    ratings = write_ratings(tmp_path / "r.csv", sure())
    with pytest.raises(InputError, match=message):
        build_from(tmp_path, {"format": "ratings", "ratings": str(ratings), "images": str(folder)})


def test_splits_follow_prompts_and_shared_images(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    lines, ratings = ["prompt_id,prompt,file"], []
    for n in range(60):
        for side in "ab":
            draw(folder / f"i{n}{side}.png", 1000 + 2 * n + (side == "b"))
            lines.append(f"q{n},bars {n},i{n}{side}.png")
        ratings.append(rating(f"q{n}/i{n}a", f"q{n}/i{n}b", "left"))
    for n in range(1, 20):  # the other half: an image of its neighbour, and the words of its neighbour
        shutil.copy(folder / "i0a.png", folder / f"i{n}a.png")
    lines += [f"twin{n},BARS  {n},twin{n}{side}.png" for n in range(20, 40) for side in "ab"]
    for n, side in itertools.product(range(20, 40), "ab"):
        draw(folder / f"twin{n}{side}.png", 5000 + 2 * n + (side == "b"))
    ratings += [rating(f"twin{n}/twin{n}a", f"twin{n}/twin{n}b", "left") for n in range(20, 40)]
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    source = {"format": "ratings", "ratings": str(write_ratings(tmp_path / "r.csv", ratings)), "images": str(folder)}
    task = build_from(tmp_path, source, splits={"train": 0.5, "val": 0.25, "test": 0.25})
    splits = {row["prompt_id"]: row["split"] for row in pairs(task)}
    assert set(splits.values()) == {"train", "val", "test"}
    assert len({splits[f"q{n}"] for n in range(20)}) == 1
    assert all(splits[f"twin{n}"] == splits[f"q{n}"] for n in range(20, 40))
    fewer = {**source, "ratings": str(write_ratings(tmp_path / "f.csv", ratings[30:]))}
    later = build_from(tmp_path / "f", fewer, splits={"train": 0.5, "val": 0.25, "test": 0.25})
    assert all(splits[row["prompt_id"]] == row["split"] for row in pairs(later))
