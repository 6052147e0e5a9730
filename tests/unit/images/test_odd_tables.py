"""Tables and published rows of images that are nearly right: refused by line, set aside by row, or told."""

from __future__ import annotations

import codecs
import json
import logging
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prefmill.core.errors import InputError
from prefmill.images.collection import Collection
from prefmill.images.custom_images import read_own_images
from prefmill.images.pair_sources import (
    ImageRewardSource,
    PairsSource,
    RatingsSource,
    ScoresSource,
    collect,
)
from prefmill.images.prompts import is_safe, read_prompts
from prefmill.pairs.pictures import image_path

LISTING, RATING = (
    "prompt,file\na cat,a.png\na cat,b.png\n",
    "left,right,rater,dimension,choice\na.png,b.png,x,overall,left\n",
)


def written(folder: Path, **files: str) -> Path:
    for name, text in {"images_csv": LISTING, "ratings_csv": RATING, **files}.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def rated(folder: Path) -> Collection:
    source = RatingsSource(format="ratings", ratings=str(folder / "ratings.csv"), images=str(folder))  # type: ignore[arg-type]
    return collect([source], [], folder / "work")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"images_csv": "prompt,file,prompt_id\na cat,a.png,c\na cat,b.png\n"}, "fewer cells"),
        ({"images_csv": "prompt,file,File\na cat,a.png,b.png\n"}, "stands there twice"),
        ({"images_jsonl": "{}\n"}, "two lists"),
        ({"ratings_csv": RATING.replace(",left\n", "\n")}, "fewer cells"),
        ({"ratings_csv": RATING.replace("left\n", '"left\n')}, "quote that is not closed"),
    ],
)
def test_a_table_that_would_be_another_is_refused(tmp_path: Path, files: dict[str, str], why: str) -> None:
    assert rated(written(tmp_path)).ratings
    with pytest.raises(InputError, match=why):
        rated(written(tmp_path, **files))


@pytest.mark.parametrize("row", [[1], 5, {"prompt": ["a"], "file": "a.png"}, {"prompt": "a cat", "file": None}])
def test_a_row_of_another_kind_is_named(tmp_path: Path, row: Any) -> None:
    written(tmp_path, images_jsonl=json.dumps(row) + "\n")
    (tmp_path / "images.csv").unlink()
    with pytest.raises(InputError, match=r"images\.jsonl:1"):
        rated(tmp_path)


def test_a_file_with_two_spaces_in_its_name_is_that_file(tmp_path: Path) -> None:
    listing = "prompt,file,prompt_id,image_id\na cat,a  b.png,c,c/a\na cat,b.png,c,c/b\n"
    written(tmp_path, images_csv=listing, ratings_csv=RATING.replace("a.png", "a  b.png"))
    assert rated(tmp_path).images["c/a"].path.name == "a  b.png"


def test_pictures_that_are_links_elsewhere_are_told_with_a_copy_that_is_read(tmp_path: Path) -> None:
    """As in a snapshot of the hub's cache: `put it below the folder`, of a file that is there, helped nobody."""
    (tmp_path / "snapshot").mkdir()
    written(tmp_path / "snapshot")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"blob-{name}")
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / f"blob-{name}")
    with pytest.raises(InputError, match=r"outside its folder[\s\S]*a link to .*blob-a.png[\s\S]*cp -rL"):
        list(read_own_images(tmp_path / "snapshot"))
    subprocess.run(["cp", "-rL", str(tmp_path / "snapshot"), str(tmp_path / "copy")], check=True)
    assert len(list(read_own_images(tmp_path / "copy"))) == 2


def test_a_prompt_that_a_line_break_cuts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.CSV").write_text("prompt,prompt_id\na red\nboat,boat\n")
    with pytest.raises(InputError, match=r"fewer cells(.|\n)*p.CSV:2"):
        read_prompts(tmp_path / "p.CSV")


def test_columns_of_scores_that_are_no_dimension_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, scores_csv="image,overall,stlye\na.png,3,1\nb.png,1_0,2\n")
    source = ScoresSource(format="scores", scores=str(tmp_path / "scores.csv"), images=str(tmp_path))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        found = collect([source], [], tmp_path / "work")
    assert "stlye" in caplog.text
    assert [row["where"] for row in found.quarantine.rows] == ["scores.csv:3"]  # 1_0 is no number


def sides(found: Collection) -> list[tuple[str, str, str]]:
    """Dimension, the better file and the rater of every rating that has a better one."""
    return [
        (row["dimension"], Path(row[row["choice"]]).name, row["rater"])
        for _, row in found.ratings
        if row["choice"] in ("left", "right")
    ]


@pytest.mark.parametrize(
    ("table", "better"),
    [
        ("left;right;choice\na.png;b.png;left\n", ["a"]),
        ("left\tright\tchoice\na.png\tb.png\tright\n", ["b"]),
        ("left,right,choice\na.png,b.png,Left\n", ["a"]),
        ("left,right,choice,rater\na.png,b.png,1,x\na.png,b.png,2,y\n", ["a", "b"]),
        ("left,right,choice,rater\na.png,b.png,0,x\na.png,b.png,1,y\n", ["a", "b"]),
        ("image_1,image_2,choice\na.png,b.png,1\n", ["a"]),
        ("image_0,image_1,choice\na.png,b.png,1\n", ["b"]),
        ("image1,image2,choice,annotator\na.png,b.png,1.0,x\na.png,b.png,2.0,y\n", ["a", "b"]),
        ("Image A,Image B,Preference\na.png,b.png,Image A\n", ["a"]),
        ("left,right,winner\na.png,b.png,b.png\n", ["b"]),
        ("left,right,choice,rater\na.png,b.png,Image 2,x\na.png,b.png,image1,y\n", ["b", "a"]),
        ("image_a,image_b,choice,rater\na.png,b.png,A > B,x\na.png,b.png,B>A,y\na.png,b.png,A<B,z\n", ["a", "b", "b"]),
        ("image_1,image_2,choice\na.png,b.png,second\n", ["b"]),
        ("image1,image2,pairwise\na.png,b.png,left\n", ["a"]),  # Label Studio's, by its control's name
        ("image_a,image_b,choice\na.png,b.png,A > C\n", []),
        ("left,right,choice\na.png,b.png,1\n", []),  # the first of two, or the second of 0 and 1
    ],
)
def test_a_choice_is_read_as_its_table_writes_choices(tmp_path: Path, table: str, better: list[str]) -> None:
    found = rated(written(tmp_path, ratings_csv=table))
    assert [name for _, name, _ in sides(found)] == better
    assert len(found.quarantine.rows) == (not better)


@pytest.mark.parametrize("name", ["rater", "WorkerId", "user_id", "annotator_id", "PROLIFIC_PID"])
def test_two_raters_are_two_whatever_their_column_is_called(tmp_path: Path, name: str) -> None:
    """They were one person, named by the file, who repeats or contradicts itself: its answers were set aside."""
    found = rated(written(tmp_path, ratings_csv=f"left,right,choice,{name}\na.png,b.png,left,x\na.png,b.png,right,y\n"))
    assert [rater for _, _, rater in sides(found)] == ["x", "y"]


@pytest.mark.parametrize("tie", ["tie", "Equal", "draw", "same", "both", "neither", "A=B", "b = a"])
def test_every_word_for_a_tie_is_a_tie(tmp_path: Path, tie: str) -> None:
    ((_, rating),) = rated(written(tmp_path, ratings_csv=f"left,right,choice\na.png,b.png,{tie}\n")).ratings
    assert rating["choice"] == "tie"


def test_two_annotators_of_label_studio_are_two_raters(tmp_path: Path) -> None:
    """As one rater, named by the file, they said otherwise of the same pair, or the same twice: votes were lost."""
    header = "annotation_id,annotator,choice,created_at,id,image1,image2,lead_time"
    table = f"{header}\n1,7,left,x,1,a.png,b.png,3\n2,8,left,x,1,a.png,b.png,3\n"
    found = rated(written(tmp_path, ratings_csv=table))
    assert sides(found) == [("overall", "a", "7"), ("overall", "a", "8")]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_ratings_and_scores_may_be_rows_of_json(tmp_path: Path, form: str) -> None:
    folder = written(tmp_path)
    rows: dict[str, list[dict[str, Any]]] = {
        "ratings": [
            {"left": "a.png", "right": "b.png", "rater": 7, "choice": 1},
            {"left": "b.png", "right": "a.png", "rater": 8, "choice": 0},
        ],
        "scores": [{"file_name": "a.png", "overall": 1}, {"file_name": "b.png", "overall": 2.5}],
    }  # fmt: skip
    for name, given in rows.items():
        lines = [",".join(given[0]), *(",".join(map(str, row.values())) for row in given)]
        text = "\n".join(map(json.dumps, given) if form == "jsonl" else lines)
        (folder / f"{name}.{form}").write_text(text + "\n")
    images = {"images": str(folder)}
    ratings = RatingsSource(format="ratings", ratings=str(folder / f"ratings.{form}"), **images)  # type: ignore[arg-type]
    scores = ScoresSource(format="scores", scores=str(folder / f"scores.{form}"), **images)  # type: ignore[arg-type]
    assert sides(collect([ratings, scores], [], folder / "work")) == [
        ("overall", "b", "7"), ("overall", "b", "8"), ("overall", "b", "scores")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "prompts"),
    [
        ({"metadata.csv": "file_name,text\na.png,a cat\nb.png,a cat\n"}, {"a cat"}),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png", "text": "a dog"}'},
         {"a cat", "a dog"}),
        # The first line of a caption counts, for kohya's trainers as here.
        ({"a.txt": "a cat\n", "b.caption": "\ufeffa cat\nNegative prompt: dogs"}, {"a cat"}),
        ({"a.TXT": "a cat\r", "b.txt": "a dog", "b.caption": "a large dog", "._a.png": ""}, {"a cat", "a dog"}),
    ],
)  # fmt: skip
def test_captioned_folders_are_lists_of_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: dict[str, str], prompts: set[str]
) -> None:
    """ImageFolder's metadata, and kohya's captions in folders such as `10_cat`."""
    folder = tmp_path if any("metadata" in name for name in files) else tmp_path / "10_cat"
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    for name, text in files.items():
        (folder / name).write_text(text)
    found = list(read_own_images(tmp_path))
    assert [image.path for image in found] == [folder / "a.png", folder / "b.png"]
    assert {image.prompt for image in found} == prompts
    assert folder == tmp_path or {row["prompt"] for row in read_prompts(tmp_path)} == prompts
    assert ("of 1 captions not all is read, such as b.caption" in caplog.text) == ("b.caption" in files)
    if folder != tmp_path:
        (folder / "c.webp").touch()
        with pytest.raises(InputError, match=r"a picture without a caption[\s\S]*c.webp[\s\S]*1 of 3"):
            list(read_own_images(tmp_path))


def test_no_column_and_no_line_of_a_table_is_left_out_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The overall choice beside a column for each dimension, columns of another kind, and lines nobody answered."""
    table = "left,right,choice,fidelity,realism\na.png,b.png,left,right,left\na.png,b.png,,,\n"
    with caplog.at_level(logging.WARNING):
        found = rated(written(tmp_path, ratings_csv=table))
    assert sides(found) == [("fidelity", "b", "ratings"), ("overall", "a", "ratings")]
    assert "columns that are not used: realism" in caplog.text
    assert "1 line has no answer" in caplog.text
    assert not found.quarantine.rows


def paired(folder: Path, *rows: Any) -> Collection:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return collect([PairsSource(format="pairs", pairs=str(folder / "pairs.jsonl"))], [], folder / "work")  # type: ignore[arg-type]


def test_pairs_say_who_judged_them_and_their_other_columns_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two users counted as one who contradicts themselves; a tie in a column of its own was a win, without a word."""
    row = {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png", "tie": True}
    found = paired(tmp_path, {**row, "user_id": 7}, {**row, "chosen": "b.png", "rejected": "a.png", "user_id": 8})
    assert [rater for _, _, rater in sides(found)] == ["7", "8"]
    assert "columns that are not used: tie" in caplog.text


def test_pairs_of_files_in_two_folders_may_have_one_name(tmp_path: Path) -> None:
    for number, name in enumerate(("win/1.png", "lose/1.png", "lose/my cat 2.png", "lose/é.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]))
    others = ("lose/1.png", "lose/my cat 2.png", "lose/é.png", "lose/1.png")
    found = paired(tmp_path, *({"prompt": "a cat", "chosen": "win/1.png", "rejected": name} for name in others))
    assert not found.quarantine.rows
    assert sorted(image.listed_as for image in found.images.values()) == sorted({"win/1.png", *others})
    lost = [row["left" if row["choice"] == "right" else "right"] for _, row in found.ratings]
    assert [found.images[name].listed_as for name in lost] == list(others)
    assert all(is_safe(part) for name in found.images for part in name.split("/"))


def test_a_line_of_pairs_that_is_no_object_is_set_aside(tmp_path: Path) -> None:
    found = paired(tmp_path, [1, 2], {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"})
    assert [(row["what"], row["where"]) for row in found.quarantine.rows] == [("row", "pairs.jsonl:1")]
    assert len(found.ratings) == 1


def test_a_file_with_spaces_or_accents_needs_no_other_name(tmp_path: Path) -> None:
    listing, rating = (text.replace("a.png", "mon été 1.png") for text in (LISTING, RATING))
    ((_, row),) = rated(written(tmp_path, images_csv=listing, ratings_csv=rating)).ratings
    assert all(is_safe(part) for part in row["left"].split("/"))


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
def test_files_are_found_in_either_normal_form_of_accents(tmp_path: Path, disk: Any) -> None:
    """As unicodedata has them: names of macOS's disk in tables written elsewhere, and the reverse, were missing."""
    named = unicodedata.normalize("NFD" if disk == "NFC" else "NFC", "été/ü.png")
    file = tmp_path / unicodedata.normalize(disk, named)
    file.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(file)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    listing, rating = (text.replace("a.png", named) for text in (LISTING, RATING))
    found = [rated(written(tmp_path, images_csv=listing, ratings_csv=rating))]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", "chosen": named, "rejected": "b.png"}) + "\n")
    (tmp_path / "r.json").write_text(
        json.dumps([{"id": 7, "prompt": "a cat", "generations": [named, "b.png"], "ranking": [1, 2]}])
    )
    for source in (PairsSource(format="pairs", pairs=str(tmp_path / "p.jsonl")),
                   ImageRewardSource(format="imagereward", rankings=str(tmp_path / "r.json"))):  # fmt: skip
        found.append(collect([source], [], tmp_path / "work"))
    for one in found:
        assert {image.path for image in one.images.values()} == {file, tmp_path / "b.png"}
    assert image_path(named, "1", tmp_path, tmp_path) == str(file)


def test_a_backslash_may_be_part_of_a_files_name(tmp_path: Path) -> None:
    """As archives made on Windows unpack: `set\\a.png` is one file then, in no folder `set`."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set\\a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    listing, rating = (text.replace("a.png", "set\\a.png") for text in (LISTING, RATING))
    found = rated(written(tmp_path, images_csv=listing, ratings_csv=rating))
    assert [image.path.is_file() for image in found.images.values()] == [True, True]
    assert len(found.ratings) == 1


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: ("sep=;\r\n" + text.replace(",", ";").replace("\n", "\r\n")).encode("utf-8-sig"),
        lambda text: codecs.BOM_UTF16_LE + text.replace(",", "\t").encode("utf-16-le"),
    ],
)
def test_tables_of_windows_and_excel_are_the_same_tables(tmp_path: Path, encode: Callable[[str], bytes]) -> None:
    """Backslashes in a listing, a line that names the separator, UTF-16: each was refused, or its pictures missing."""
    plain, folder = rated(written(tmp_path)), tmp_path / "windows"
    listing = LISTING.replace("a.png", "pics\\a.png").replace("b.png", "pics\\b.png")
    ratings = RATING.replace("a.png", "pics\\a.png").replace("b.png", "pics/b.png")
    folder.mkdir()
    (folder / "images.csv").write_bytes(encode(listing))
    (folder / "ratings.csv").write_bytes(encode(ratings))
    found = rated(folder)
    assert [rating for _, rating in found.ratings] == [rating for _, rating in plain.ratings]
    assert [image.path for image in found.images.values()] == [folder / "pics" / name for name in ("a.png", "b.png")]


def test_the_line_of_a_fault_counts_the_line_that_names_the_separator(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("sep=;\nprompt;x\na cat;1\n;2\n")
    with pytest.raises(InputError, match=r"a prompt is empty[\s\S]*prompts.csv:4"):
        read_prompts(tmp_path / "prompts.csv")


def test_one_prompt_in_two_normal_forms_is_one_prompt(tmp_path: Path) -> None:
    """As unicodedata has it; macOS writes names, and what is made of them, with accents as signs of their own."""
    one, two = (unicodedata.normalize(form, "un café") for form in ("NFC", "NFD"))  # type: ignore[arg-type]
    assert one != two
    found = rated(written(tmp_path, images_csv=f"prompt,file\n{one},a.png\n{two},b.png\n"))
    assert {image.prompt for image in found.images.values()} == {one}
    assert len(found.ratings) == 1
    assert not found.quarantine.rows
    (tmp_path / "p.csv").write_text(f"prompt\n{two}\n")
    assert [row["prompt"] for row in read_prompts(tmp_path / "p.csv")] == [one]
    sides = {"chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text, **sides}) + "\n" for text in (one, two)))
    pairs = collect([PairsSource(format="pairs", pairs=str(tmp_path / "p.jsonl"))], [], tmp_path / "work")  # type: ignore[arg-type]
    assert len({rating["prompt_id"] for _, rating in pairs.ratings}) == 1
