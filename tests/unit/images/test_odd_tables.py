"""Tables and published rows of images that are nearly right: refused by line, set aside by row, or told."""

from __future__ import annotations

import codecs
import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import InputError
from prefmill.images.collection import Collection
from prefmill.images.pair_sources import (
    ImageRewardSource,
    PairsSource,
    PickAPicSource,
    RatingsSource,
    ScoresSource,
    collect,
)
from prefmill.images.prompts import is_safe, read_prompts

LISTING, RATING = (
    "prompt,file\na cat,a.png\na cat,b.png\n",
    "left,right,rater,dimension,choice\na.png,b.png,x,overall,left\n",
)
PICK = {
    "caption": "a cat", "image_0_uid": "u0", "image_1_uid": "u1", "jpg_0": "a.png", "jpg_1": "b.png",
    "label_0": 1, "label_1": 0,
}  # fmt: skip
RANK = {"id": 7, "prompt": "a cat", "generations": ["a.png", "b.png"], "ranking": [1, 2]}


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
        {"ranking": [1, None]}, {"ranking": ["1", "2"]}, {"ranking": [1, float("nan")]}, {"ranking": [True, False]},
        {"id": None}, {"prompt": None}, {"prompt": 5}, {"generations": [1, 2]}, {"generations": ["/a.png", "b.png"]},
    ],
)  # fmt: skip
def test_a_ranking_that_is_none_is_set_aside(tmp_path: Path, change: dict[str, Any]) -> None:
    found = ranked(tmp_path, change)
    assert (found.ratings, len(found.quarantine.rows)) == ([], 1)
    ((_, rating),) = ranked(tmp_path, {}).ratings
    assert (rating["prompt_id"], rating["choice"]) == ("7", "left")


def ranked(folder: Path, change: dict[str, Any]) -> Collection:
    (folder / "r.json").write_text(json.dumps([{**RANK, **change}]))
    source = ImageRewardSource(format="imagereward", rankings=str(folder / "r.json"), images=str(folder))  # type: ignore[arg-type]
    return collect([source], [], folder / "work")


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
        ("left,right,choice\na.png,b.png,1\n", []),  # the first of two, or the second of 0 and 1
    ],
)
def test_a_choice_is_read_as_its_table_writes_choices(tmp_path: Path, table: str, better: list[str]) -> None:
    found = rated(written(tmp_path, ratings_csv=table))
    assert [name for _, name, _ in sides(found)] == better
    assert len(found.quarantine.rows) == (not better)


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


def test_pairs_of_files_in_two_folders_may_have_one_name(tmp_path: Path) -> None:
    for number, name in enumerate(("win/1.png", "lose/1.png", "lose/my cat 2.png", "lose/é.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]))
    others = ("lose/1.png", "lose/my cat 2.png", "lose/é.png", "lose/1.png")
    found = paired(tmp_path, *({"prompt": "a cat", "chosen": "win/1.png", "rejected": name} for name in others))
    assert not found.quarantine.rows
    assert sorted(image.listed_as for image in found.images.values()) == sorted({"win/1.png", *others})
    assert [found.images[row["right"]].listed_as for _, row in found.ratings] == list(others)
    assert all(is_safe(part) for name in found.images for part in name.split("/"))


def test_a_line_of_pairs_that_is_no_object_is_set_aside(tmp_path: Path) -> None:
    found = paired(tmp_path, [1, 2], {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"})
    assert [(row["what"], row["where"]) for row in found.quarantine.rows] == [("row", "pairs.jsonl:1")]
    assert len(found.ratings) == 1


def test_a_file_with_spaces_or_accents_needs_no_other_name(tmp_path: Path) -> None:
    listing, rating = (text.replace("a.png", "mon été 1.png") for text in (LISTING, RATING))
    ((_, row),) = rated(written(tmp_path, images_csv=listing, ratings_csv=rating)).ratings
    assert all(is_safe(part) for part in row["left"].split("/"))


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


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json"])
def test_rows_of_hpdv3_prefer_their_first_path(tmp_path: Path, suffix: str) -> None:
    row = {"prompt": "a cat", "path1": "a.png", "path2": "b.png", "confidence": None, "choice_dist": [12, 7]}
    (tmp_path / f"train{suffix}").write_text(json.dumps(row) + "\n")
    found = collect([PairsSource(format="pairs", pairs=str(tmp_path / f"train{suffix}"))], [], tmp_path / "work")  # type: ignore[arg-type]
    (said,) = [rating for _, rating in found.ratings]
    assert (found.images[said["left"]].path.name, said["choice"]) == ("a.png", "left")
    # Two paths alone do not say which is the better one.
    (tmp_path / "other.jsonl").write_text(json.dumps({key: row[key] for key in ("prompt", "path1", "path2")}) + "\n")
    other = collect([PairsSource(format="pairs", pairs=str(tmp_path / "other.jsonl"))], [], tmp_path / "work")  # type: ignore[arg-type]
    assert other.quarantine.counts() == {"row: no two images": 1}


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
    with pytest.raises(InputError, match=r"not a row of ImageRewardDB[\s\S]*bad.parquet:1"):
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
