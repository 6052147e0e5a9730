"""build_image_pairs: files of older scripts and other tools, pairs.jsonl and ratings.csv in their own columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from image_artifacts import draw
from image_rating_artifacts import NUM_PROMPTS, build_from, pairs, quarantine
from test_build_image_pairs_sources import own_images

from prefmill.core.errors import InputError
from prefmill.store.jsonl import write_jsonl


@pytest.mark.parametrize("names", [("preferred", "rejected"), ("chosen", "rejected"), ("winner", "loser")])
def test_pairs_come_back_as_they_were(tmp_path: Path, names: tuple[str, str]) -> None:
    """The better image stays the better one, labels stay by dimension, and what cannot be read is set aside by line."""
    rows: list[dict[str, Any]] = []
    for n in range(NUM_PROMPTS):
        files = [draw(tmp_path / "pics" / f"{n}" / f"{side}.png", 10 * n + side) for side in (0, 1)]
        sides = {name: file.relative_to(tmp_path).as_posix() for name, file in zip(names, files, strict=True)}
        rows.append({"prompt": f"bars {n}", **sides, "labels": {"style": 0.0, "fidelity": 0.5, "material": 1.0}})
    rows[0] = {**rows[0], "labels": None, "style": 1}  # columns will do
    bad = [{**rows[1], "prompt": ""}, {**rows[1], names[0]: None}, {**rows[1], "labels": {"style": 7}},
           {**rows[1], names[1]: "../secret.png"}]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, *bad])
    task = build_from(tmp_path, {"format": "pairs", "pairs": str(tmp_path / "pairs.jsonl")}, max_quarantined_share=0.5)
    found = {row["prompt"]: row for row in pairs(task)}
    assert len(found) == NUM_PROMPTS
    assert {Path(row["preferred"]).stem for row in found.values()} == {"0"}
    label = found["bars 1"]["labels"]
    assert (label["overall"], label["style"], label["fidelity"], label["material"], label["spatial"]) == (
        1.0, 0.0, 0.5, 1.0, None,
    )  # fmt: skip
    assert (found["bars 0"]["labels"]["style"], found["bars 0"]["labels"]["fidelity"]) == (1.0, None)
    assert quarantine(task) == [
        ("row", "no prompt"), ("row", "no two images"), ("row", "a label outside 0 to 1"),
        ("row", "images' names cannot be used"),
    ]  # fmt: skip


def test_our_own_pairs_are_a_source(tmp_path: Path) -> None:
    """What build_image_pairs wrote, read again, gives the same pairs."""
    folder, path = own_images(tmp_path / "mine"), tmp_path / "ratings.csv"
    lines = [f"p{n:02}a.png,p{n:02}b.png,{'a' if n % 2 else 'b'}" for n in range(NUM_PROMPTS)]
    path.write_text("\n".join(["image_a,image_b,preference", *lines]) + "\n")
    first = build_from(tmp_path / "one", {"format": "ratings", "ratings": str(path), "images": str(folder)})
    second = build_from(tmp_path / "two", {"format": "pairs", "pairs": str(first.output / "pairs.jsonl")})
    kept = ("prompt_id", "prompt", "preferred", "rejected", "labels", "split")
    assert [{key: row[key] for key in kept} for row in pairs(first)] == [
        {key: row[key] for key in kept} for row in pairs(second)
    ]
    assert {Path(row["preferred"]).stem[-1] for row in pairs(first)} == {"a", "b"}


def test_a_rating_may_have_a_column_for_each_dimension(tmp_path: Path) -> None:
    """An empty cell is no answer; another one that is no choice is set aside."""
    folder, path = own_images(tmp_path / "mine"), tmp_path / "ratings.csv"
    lines = [f"p{n:02}a.png,p{n:02}b.png,left,right,,tie" for n in range(NUM_PROMPTS)]
    lines[0] = "p00a.png,p00b.png,left,perhaps,,"
    path.write_text("\n".join(["left,right,overall,style,fidelity,material", *lines]) + "\n")
    task = build_from(tmp_path, {"format": "ratings", "ratings": str(path), "images": str(folder)})
    labels = {row["prompt_id"]: row["labels"] for row in pairs(task)}
    given = labels["p01"]
    assert (given["overall"], given["style"], given["fidelity"], given["material"]) == (1.0, 0.0, None, 0.5)
    assert labels["p00"]["style"] is None
    assert [what for what, _ in quarantine(task)] == ["rating"]
    path.write_text("left,right,rater\na,b,me\n")
    with pytest.raises(InputError, match="no column choice"):
        build_from(tmp_path / "x", {"format": "ratings", "ratings": str(path), "images": str(folder)})
