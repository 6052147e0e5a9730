"""Exports of annotation tools, with several answers in a row: each is one rating, none is lost in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from prefmill.images.pair_sources import RatingsSource, collect

FILES = {"image_a": "a.png", "image_b": "b.png"}
Rated = list[tuple[str, str, str, str, str]]


def rated(folder: Path, rows: list[dict[str, Any]], suffix: str = ".json") -> Rated:
    """Left, right, rater, dimension and choice of every rating; none is set aside."""
    (folder / "images.csv").write_text("prompt,file\na cat,a.png\na cat,b.png\na cat,c.png\n")
    lines = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file = folder / f"export{suffix}"
    file.write_text(lines)
    source = RatingsSource(format="ratings", ratings=str(file), images=str(folder))  # type: ignore[arg-type]
    found = collect([source], [], folder / "work")
    assert found.quarantine.rows == []
    return [
        (row["left"][-1], row["right"][-1], row["rater"], row["dimension"], row["choice"]) for _, row in found.ratings
    ]


def task(*annotations: dict[str, Any], **data: str) -> dict[str, Any]:
    """Of Label Studio's JSON, as its guide on the format of tasks shows it."""
    return {"id": 1, "project": 2, "data": {**FILES, **data}, "annotations": list(annotations), "predictions": []}


def result(name: str, **value: Any) -> dict[str, Any]:
    return {"id": "x", "from_name": name, "to_name": "one,two", "type": "pairwise", "value": value}


def test_label_studio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upload = {"image_a": "/data/upload/7/1a2b3c4d-a.png", "image_b": "/data/local-files/?d=b.png"}
    remark = result("remark", text=["nice fur"])
    rows = [
        task({"completed_by": 1, "result": [result("pw", selected="left"), remark]}),
        task({"completed_by": {"id": 2, "email": "x@y.org"}, "result": [result("style", choices=["B"])]}, **upload),
        task({"completed_by": 3, "was_cancelled": True, "result": []}),
        task({"completed_by": 1, "result": [result("Style", choices=["tie"]), result("fidelity", choices=["a"])]}),
        task(),
    ]
    with caplog.at_level(logging.WARNING):
        assert rated(tmp_path, rows) == [
            ("a", "b", "1", "overall", "left"),
            ("a", "b", "x@y.org", "style", "right"),
            ("a", "b", "3", "overall", "skip"),
            ("a", "b", "1", "style", "tie"),
            ("a", "b", "1", "fidelity", "left"),
        ]
    assert "1 line has no answer" in caplog.text


@pytest.mark.parametrize("host", ["", "http://localhost:8080", "https://label.lab.org"])
def test_label_studios_addresses_of_files_on_its_disk(tmp_path: Path, host: str) -> None:
    """As its storage of local files writes them: its own host's name before, the path quoted as in addresses."""
    from urllib.parse import quote

    name = "mein Bild 1 (größer).png"
    (tmp_path / "images.csv").write_text(f"prompt,file\na cat,{name}\na cat,b.png\n")
    left, right = f"{host}/data/local-files/?d={quote(name)}", f"{host}/data/upload/3/0a1b2c3d-b.png"
    row = task({"completed_by": 1, "result": [result("pw", selected="left")]}, image_a=left, image_b=right)
    (tmp_path / "export.json").write_text(json.dumps([row]))
    source = RatingsSource(format="ratings", ratings=str(tmp_path / "export.json"), images=str(tmp_path))  # type: ignore[arg-type]
    found = collect([source], [], tmp_path / "work")
    assert found.quarantine.rows == []
    ((_, rating),) = found.ratings
    assert found.images[rating["left"]].path.name == name


def test_argilla(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its JSON of both major versions, and the columns of the data set that it makes."""
    answers = [{"user_id": "u", "value": "a"}, {"user_id": "v", "value": "b", "status": "submitted"},
               {"user_id": "w", "value": "a", "status": "discarded"}]  # fmt: skip
    wanted = [("a", "b", rater, "overall", choice) for rater, choice in (("u", "left"), ("v", "right"), ("w", "skip"))]
    assert rated(tmp_path, [{"fields": FILES, "responses": {"better": answers}, "metadata": {}}]) == wanted
    assert rated(tmp_path, [{**FILES, "better": answers, "better-suggestion": None}], ".jsonl") == wanted
    status = ["submitted", "submitted", "draft"]
    columns = {"better.responses": ["a", "b", "a"], "better.responses.users": ["u", "v", "w"]}
    assert rated(tmp_path, [{**FILES, **columns, "better.responses.status": status}], ".jsonl") == wanted

    nobody = {**FILES, **dict.fromkeys([*columns, "better.responses.status"])}  # its columns are null then
    for rows in ([nobody, {**FILES, **columns}], [{"fields": FILES, "responses": {}}]):
        caplog.clear()
        assert len(rated(tmp_path, rows)) == 3 * (len(rows) - 1)
        assert "1 line has no answer" in caplog.text

    def ranked(first: int, second: int) -> dict[str, Any]:
        ranks = [{"value": "image_a", "rank": first}, {"value": "image_b", "rank": second}]
        return {"fields": FILES, "responses": {"style": [{"user_id": "u", "value": ranks}]}}

    for ranks, choice in (((1, 2), "left"), ((2, 1), "right"), ((1, 1), "tie")):
        assert rated(tmp_path, [ranked(*ranks)]) == [("a", "b", "u", "style", choice)]


def test_prodigy(tmp_path: Path) -> None:
    def answered(*accept: Any, answer: str = "accept", num: int = 2) -> dict[str, Any]:
        options = [{"id": name, "image": f"{name}.png"} for name in "abc"[:num]] + [{"id": "tie", "text": "alike"}]
        return {"text": "a cat", "options": options, "accept": list(accept), "answer": answer, "_annotator_id": "ann"}

    rows = [answered("a"), answered("b"), answered("tie"), answered("a", "b"), answered(answer="ignore")]
    choices = ["left", "right", "tie", "tie", "skip"]
    assert rated(tmp_path, rows, ".jsonl") == [("a", "b", "ann", "overall", choice) for choice in choices]
    assert rated(tmp_path, [answered("b", num=3)]) == [
        ("a", "b", "ann", "overall", "right"),
        ("b", "c", "ann", "overall", "left"),
    ]
