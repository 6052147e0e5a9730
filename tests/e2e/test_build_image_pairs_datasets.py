"""Published sets of image pairs, in the forms in which they are found: Pick-a-Pic, ImageReward."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import draw
from image_rating_artifacts import (
    Rows,
    build_from,
    pairs,
    quarantine,
    summary,
)

from prefmill.core.errors import InputError
from prefmill.store.jsonl import write_jsonl


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


def test_sets_in_pick_a_pics_form_without_uids(tmp_path: Path) -> None:
    """As scripts of diffusers take them: two pictures, a caption and label_0; rows without a picture are set aside."""
    from pyarrow import Table, parquet

    rows = []
    for number in range(6):
        for side in "01":
            draw(tmp_path / f"{number}{side}.png", 100 * number + ord(side))
        both = {f"jpg_{side}": (tmp_path / f"{number}{side}.png").read_bytes() for side in "01"}
        rows.append({"caption": f"bars {number}", "label_0": float(number % 2), **both})
    rows.append({**rows[0], "jpg_1": None})
    parquet.write_table(Table.from_pylist(rows), tmp_path / "set.parquet")
    source = {"format": "pickapic", "path": str(tmp_path / "set.parquet")}
    task = build_from(tmp_path / "t", source, max_quarantined_share=0.2)
    assert quarantine(task) == [("row", "no two images")]
    for row in pairs(task):
        number = int(row["prompt"].split()[1])
        better, worse = (1 - number % 2, number % 2)
        files = [(task.output / row[side]).read_bytes() for side in ("preferred", "rejected")]
        assert files == [(tmp_path / f"{number}{side}.png").read_bytes() for side in (better, worse)]
    assert len(pairs(task)) == 6


def test_bytes_that_are_base64_are_no_path(tmp_path: Path) -> None:
    """A jsonl with the image itself in it is said to be a missing file, not read as something else."""
    content = base64.b64encode(draw(tmp_path / "a.png", 0).read_bytes()).decode()[:80]
    uids = {"image_0_uid": "u", "image_1_uid": "v"}
    row = {"caption": "a", **uids, "jpg_0": content, "jpg_1": content, "label_0": 1, "label_1": 0}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match="cannot be used"):
        build_from(tmp_path, {"format": "pickapic", "path": str(tmp_path / "rows.jsonl")})


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
