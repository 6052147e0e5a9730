"""build_image_pairs: labels, weights, splits, ties and contradictions, other people's formats, and bad input."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import bomb, draw, publish_as, task_for

import stages.build_image_pairs as stage
from prefmill.artifacts import Artifact, payload
from prefmill.config import validate
from prefmill.errors import ConfigError, InputError
from prefmill.images.rows import DIMENSIONS, HEADS
from prefmill.records import read_jsonl, write_jsonl
from prefmill.stage import Task

Rows = list[dict[str, Any]]
FIELDS = ["prompt_id", "left", "right", "rater", "dimension", "choice"]
NUM_PROMPTS = 12


def rating(left: str, right: str, choice: str, rater: str = "ann", dimension: str = "overall") -> dict[str, str]:
    prompt_id = left.split("/")[0]
    return dict(zip(FIELDS, (prompt_id, left, right, rater, dimension, choice), strict=True))


def sure(prompts: Iterable[int] = range(NUM_PROMPTS)) -> Rows:
    """The first image of every prompt is better, whichever side it stands on."""
    pairs = [(f"p{n:02}/0", f"p{n:02}/1") for n in prompts]
    return [rating(a, b, "left") if n % 2 else rating(b, a, "right") for n, (a, b) in enumerate(pairs)]


def make_ratings(folder: Path, ratings: Rows, num_prompts: int = NUM_PROMPTS, num_seeds: int = 2) -> Artifact:
    """An image_ratings artifact."""
    rows = []
    for index, seed in itertools.product(range(num_prompts), range(num_seeds)):
        prompt_id, name = f"p{index:02}", f"images/p{index:02}/{seed}.png"
        draw(folder / name, 100 * index + seed)
        ids = {"image_id": f"{prompt_id}/{seed}", "prompt_id": prompt_id, "seed": seed}
        rows.append({**ids, "prompt": f"bars {index}", "file": name})
    write_jsonl(folder / "images.jsonl", rows)
    write_ratings(folder / "ratings.csv", ratings)
    return publish_as(folder, "image_ratings")


def write_ratings(path: Path, ratings: Rows) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(ratings)
    return path


def build(folder: Path, ratings: Rows, num_seeds: int = 2, **settings: Any) -> Task:
    artifact = make_ratings(folder / "ratings", ratings, num_seeds=num_seeds)
    task = task_for(folder, "build_image_pairs", ratings=artifact)
    stage.run(validate(stage.BuildImagePairsConfig, settings), task)
    return task


def build_from(folder: Path, source: dict[str, Any], **settings: Any) -> Task:
    task = task_for(folder, "build_image_pairs")
    stage.run(validate(stage.BuildImagePairsConfig, {"sources": [source], **settings}), task)
    return task


def pairs(task: Task) -> Rows:
    return list(read_jsonl(task.output / "pairs.jsonl"))


def quarantine(task: Task) -> list[tuple[str, str]]:
    return [(row["what"], row["reason"]) for row in read_jsonl(task.output / "quarantine.jsonl")]


def summary(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((task.output / "summary.json").read_text())
    return found


def test_the_preferred_image_does_not_depend_on_the_side(tmp_path: Path) -> None:
    task = build(tmp_path, sure())
    rows = pairs(task)
    assert [row["prompt_id"] for row in rows] == [f"p{n:02}" for n in range(NUM_PROMPTS)]
    for row in rows:
        assert row["preferred"] == f"images/{row['prompt_id']}/0.png"
        assert row["labels"] == {**dict.fromkeys(HEADS), "overall": 1.0}
        assert row["weight"] == 1.0
        assert row["prompt"].startswith("bars")
        assert all((task.output / row[side]).is_file() for side in ("preferred", "rejected"))
    names = {path.relative_to(task.output).as_posix() for path in payload(task.output)}
    assert len(names) == 2 * NUM_PROMPTS + 4
    assert names >= {"pairs.jsonl", "quarantine.jsonl", "strengths.jsonl", "summary.json"}
    assert publish_as(task.output, "image_pairs")


def test_the_same_ratings_in_another_order_give_the_same_bytes(tmp_path: Path) -> None:
    asked = itertools.product(range(NUM_PROMPTS), ((0, 1), (2, 1)), range(3), DIMENSIONS)
    ratings = [
        rating(
            f"p{n:02}/{a}", f"p{n:02}/{b}", random.Random(9 * n + a + r).choice(["left", "tie", "right"]), f"r{r}", d
        )
        for n, (a, b), r, d in asked
    ]
    shuffled = random.Random(0).sample(ratings, len(ratings))
    found = []
    for name, rows in (("a", ratings), ("b", shuffled)):
        task = build(tmp_path / name, rows, num_seeds=3, labels="bradley_terry")
        found.append({p.relative_to(task.output): p.read_bytes() for p in payload(task.output)})
        stage.run(validate(stage.BuildImagePairsConfig, {"labels": "bradley_terry"}), task)  # again, after a kill
        assert {p.relative_to(task.output): p.read_bytes() for p in payload(task.output)} == found[-1]
    assert found[0] == found[1]


def test_several_raters_make_soft_labels(tmp_path: Path) -> None:
    a, b = "p00/0", "p00/1"
    ratings = [
        *sure(range(1, NUM_PROMPTS)),
        rating(a, b, "left", "ann"), rating(b, a, "right", "ben"), rating(a, b, "left", "cid"),
        rating(a, b, "right", "dot"), rating(a, b, "tie", "ann", "style"), rating(a, b, "right", "ben", "style"),
        rating(a, b, "skip", "cid", "style"), rating(a, b, "right", "ann", "fidelity"),
    ]  # fmt: skip
    task = build(tmp_path, ratings)
    labels = {**dict.fromkeys(HEADS), "overall": 0.75, "style": 0.25, "fidelity": 0.0}
    assert pairs(task)[0]["labels"] == labels
    told = summary(task)
    assert told["dimensions"]["overall"]["agreement"] == 0.5  # 3 of the 6 couples of four raters
    assert told["raters"]["cid"] == {"num_left": 1, "num_right": 0, "num_ties": 0, "num_skips": 1}
    assert "style: only 1 of 12 pairs have a label" in told["warnings"]


def test_without_a_vote_overall_the_dimensions_decide(tmp_path: Path) -> None:
    choices = dict(zip(HEADS, ("right", "right", "right", "left", "tie"), strict=True))
    ratings = [rating("p00/0", "p00/1", choice, dimension=name) for name, choice in choices.items()]
    task = build(tmp_path, ratings)
    assert pairs(task)[0]["preferred"] == "images/p00/1.png"
    assert pairs(task)[0]["labels"] == {
        "spatial": 1.0, "iconographic": 1.0, "style": 1.0, "fidelity": 0.0, "material": 0.5, "overall": None
    }  # fmt: skip


def test_rankings_weigh_as_one_prompt(tmp_path: Path) -> None:
    ranked = [rating(f"p00/{a}", f"p00/{b}", "left") for a, b in itertools.combinations(range(4), 2)]
    task = build(tmp_path, ranked + sure([1]), num_seeds=4)
    weights: Counter[str] = Counter()
    for row in pairs(task):
        weights[row["prompt_id"]] += row["weight"]
    assert weights["p00"] == pytest.approx(1, abs=1e-5)
    assert weights["p01"] == 1
    strengths = [row["strengths"]["overall"] for row in read_jsonl(task.output / "strengths.jsonl")][:4]
    assert strengths == sorted(strengths, reverse=True)


def test_bradley_terry_softens_and_contradicts_a_vote_that_stands_alone(tmp_path: Path) -> None:
    """Three raters put 0 before 1 before 2; one vote says 2 before 0."""
    ratings = [rating(f"p00/{a}", f"p00/{b}", "left", rater) for a, b in ((0, 1), (1, 2)) for rater in "xyz"]
    task = build(tmp_path, [*ratings, rating("p00/2", "p00/0", "left", "x")], num_seeds=3, labels="bradley_terry")
    assert [row["pair_id"] for row in pairs(task)] == ["p00:0:1", "p00:1:2"]
    assert all(0.5 < row["labels"]["overall"] < 0.95 for row in pairs(task))
    assert quarantine(task) == [("pair", "the prompt's other votes say otherwise")]
    by_votes = build(tmp_path / "v", [*ratings, rating("p00/2", "p00/0", "left", "x")], num_seeds=3)
    assert len(pairs(by_votes)) == 3


def test_contradictions_ties_and_repetitions_are_set_aside(tmp_path: Path) -> None:
    ratings = [
        *sure(range(4, NUM_PROMPTS)),
        rating("p00/0", "p00/1", "left", "ann"), rating("p00/0", "p00/1", "right", "ben"),
        rating("p01/0", "p01/1", "tie", "ann"), rating("p01/0", "p01/1", "tie", "ben"),
        rating("p02/0", "p02/1", "left", "ann"), rating("p02/0", "p02/1", "left", "ann"),
        rating("p03/0", "p03/1", "left", "ann"), rating("p03/1", "p03/0", "left", "ann"),
    ]  # fmt: skip
    task = build(tmp_path, ratings, max_quarantined_share=0.2)
    assert [row["prompt_id"] for row in pairs(task)] == ["p02", *(f"p{n:02}" for n in range(4, NUM_PROMPTS))]
    assert quarantine(task) == [
        ("rating", "duplicate row"), ("rating", "the rater said otherwise"), ("pair", "raters contradict each other")
    ]  # fmt: skip
    assert summary(task)["num_ties"] == 1
    with pytest.raises(InputError, match=r"2 of 16 ratings cannot be used[\s\S]*ratings.csv:\d+[\s\S]*duplicate row"):
        build(tmp_path / "strict", ratings)


def test_an_all_ties_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every comparison is a tie[\s\S]*12 ratings, 12 ties"):
        build(tmp_path, [{**row, "choice": "tie"} for row in sure()])
    with pytest.raises(InputError, match=r"no pair is left"):
        build(tmp_path / "b", [rating("p00/0", "p00/1", side, side) for side in ("left", "right")])
    with pytest.raises(InputError, match="no ratings"):
        build(tmp_path / "c", [])


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bad = [
        rating("p00/0", "p00/9", "left"), rating("p00/0", "p01/0", "left"), rating("p00/0", "p00/0", "left"),
        rating("p00/0", "p00/1", "better"), rating("p00/0", "p00/1", "left", dimension="taste"),
        rating("p00/0", "p00/1", "left", rater=""),
    ]  # fmt: skip
    task = build(tmp_path, bad + sure(), max_quarantined_share=0.5)
    rows = list(read_jsonl(task.output / "quarantine.jsonl"))
    assert [row["reason"] for row in rows] == [
        "unknown image", "images of two prompts", "an image against itself", "unknown choice", "unknown dimension",
        "no rater",
    ]  # fmt: skip
    assert [row["where"] for row in rows] == [f"ratings.csv:{line}" for line in range(2, 8)]
    with pytest.raises(InputError, match=r"6 of 18 ratings cannot be used"):
        build(tmp_path / "strict", bad + sure())


def test_images_that_cannot_be_used_take_their_pairs_along(tmp_path: Path) -> None:
    folder = own_images(tmp_path / "mine")
    (folder / "p00a.png").unlink()
    (folder / "p01a.png").write_bytes((folder / "p01a.png").read_bytes()[:60])
    bomb(folder / "p02a.png")
    shutil.copy(folder / "p03a.png", folder / "p03b.png")
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


def own_images(folder: Path, header: str = "prompt_id,prompt,file") -> Path:
    """A folder as people have it: images.csv and files beside it."""
    lines = [header]
    for n, side in itertools.product(range(NUM_PROMPTS), "ab"):
        draw(folder / f"p{n:02}{side}.png", 100 * n + ord(side))
        lines.append(f"p{n:02},bars {n},p{n:02}{side}.png")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder


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


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("prompt,file\nbars,\n", r"an image without a file[\s\S]*images.csv:2"),
        ("prompt,file\nbars,../secret.png\n", r"an id cannot|an image outside its folder"),
        ("prompt,file\nbars,sub/../../secret.png\n", "an image outside its folder"),
        ("prompt,file\nbars,a.png\nbars,x/a.png\n", r"two images have one id[\s\S]*images.csv:3"),
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


def test_low_yield_is_a_warning(tmp_path: Path) -> None:
    task = build(tmp_path, sure(range(3)), splits={"train": 1.0, "val": 0.0, "test": 0.0})
    assert summary(task)["warnings"] == [
        "only 3 of 12 prompts gave a pair: rate more, or make more images a prompt"
    ]  # fmt: skip
    habit = [rating(f"p{n:02}/{a}", f"p{n:02}/{b}", "left") for n in range(NUM_PROMPTS) for a, b in ((0, 1), (2, 3))]
    told = summary(build(tmp_path / "b", habit, num_seeds=4))
    assert any(warning.startswith("rater ann answers by the side") for warning in told["warnings"])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_pick_a_pic(tmp_path: Path, form: str) -> None:
    labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    rows: Rows = []
    for n, (left, right) in enumerate(labels):
        files = [draw(tmp_path / "pics" / f"u{n}{side}.png", 10 * n + side) for side in (0, 1)]
        content: Sequence[Any] = [file.read_bytes() if form == "parquet" else f"pics/{file.name}" for file in files]
        rows.append(
            {
                "caption": f"bars {n}", "image_0_uid": f"u{n}0", "image_1_uid": f"u{n}1", "jpg_0": content[0],
                "jpg_1": content[1], "label_0": left, "label_1": right, "has_label": n != 3, "user_id": n,
                "model_0": "x",
            }
        )  # fmt: skip
    path = tmp_path / f"pick.{form}"
    if form == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    task = build_from(tmp_path, {"format": "pickapic", "path": str(path)})
    assert {row["prompt"]: Path(row["preferred"]).name for row in pairs(task)} == {
        "bars 0": "u00.png", "bars 1": "u11.png"
    }  # fmt: skip
    assert summary(task)["num_ties"] == 1
    del rows[1]["caption"]
    write_jsonl(tmp_path / "bad.jsonl", [{k: v for k, v in row.items() if k[:3] != "jpg"} for row in rows])
    with pytest.raises(InputError, match=r"not a row of Pick-a-Pic[\s\S]*bad.jsonl:1[\s\S]*jpg_0"):
        build_from(tmp_path / "b", {"format": "pickapic", "path": str(tmp_path / "bad.jsonl")})


def test_imagereward(tmp_path: Path, shared_data: Path) -> None:
    rows = json.loads((shared_data / "images" / "imagereward_test.json").read_bytes())[:12]
    rankings = tmp_path / "rankings.json"
    rankings.write_text(json.dumps([*rows, {"id": "x", "prompt": "y", "generations": ["a.png"], "ranking": []}]))
    for number, file in enumerate(file for row in rows for file in row["generations"]):
        draw(tmp_path / "files" / file, number)
    source = {"format": "imagereward", "rankings": str(rankings), "images": str(tmp_path / "files")}
    task = build_from(tmp_path, source)
    expected = {row["id"]: row for row in rows}
    found = pairs(task)
    count = sum(a != b for row in rows for a, b in itertools.combinations(row["ranking"], 2))
    assert len(found) == count
    for pair in found:
        row = expected[pair["prompt_id"]]
        ranks = {Path(file).stem: rank for file, rank in zip(row["generations"], row["ranking"], strict=True)}
        assert ranks[Path(pair["preferred"]).stem] < ranks[Path(pair["rejected"]).stem]
        assert pair["preferred"].endswith(".webp")
    assert sum(pair["weight"] for pair in found) == pytest.approx(len(rows), abs=1e-3)
    assert quarantine(task) == [("ranking", "as many ranks as images are needed")]


def test_several_artifacts_and_sources_add_up(tmp_path: Path) -> None:
    first = make_ratings(tmp_path / "a", sure())
    second = make_ratings(tmp_path / "b", [{**row, "rater": "ben"} for row in sure()])
    task = task_for(tmp_path, "build_image_pairs")
    given = {"ratings": (first, second)}
    task = Task(**{**vars(task), "inputs": given, "_last_progress": [0.0]})
    stage.run(validate(stage.BuildImagePairsConfig, {}), task)
    assert len(pairs(task)) == NUM_PROMPTS
    assert summary(task)["num_ratings"] == 2 * NUM_PROMPTS
    assert summary(task)["dimensions"]["overall"]["agreement"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": {"train": 0.5, "val": 0.1, "test": 0.1}}, r"train \+ val \+ test is 0.7"),
        ({"min_agreement": 0.5}, "min_agreement"),
        ({"sources": [{"format": "csv"}]}, "sources"),
        ({"labels": "majority"}, "labels"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.BuildImagePairsConfig, settings)


def test_bytes_that_are_base64_are_no_path(tmp_path: Path) -> None:
    """A jsonl with the image itself in it is said to be a missing file, not read as something else."""
    content = base64.b64encode(draw(tmp_path / "a.png", 0).read_bytes()).decode()[:80]
    uids = {"image_0_uid": "u", "image_1_uid": "v"}
    row = {"caption": "a", **uids, "jpg_0": content, "jpg_1": content, "label_0": 1, "label_1": 0}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match="cannot be used"):
        build_from(tmp_path, {"format": "pickapic", "path": str(tmp_path / "rows.jsonl")})
