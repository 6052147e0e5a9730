"""The pages on one's own reviews, preferences and images: what they say of a file's form is what the stages read.

Their commands are run as they stand by test_commands.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.core.image_rows import Dimension
from prefmill.core.stage import Task, load_stage
from prefmill.pairs.formats import FORMS, detect
from prefmill.store.jsonl import read_jsonl
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
YOUR_REVIEWS = (DOCS / "your-reviews.md").read_text()
(EXAMPLE,) = re.findall(r"^```json\n(.*?)\n```", YOUR_REVIEWS, re.MULTILINE | re.DOTALL)
(OPTIONAL,) = re.findall(r"a row of Parquet\. (.*?) may be\s+left out", YOUR_REVIEWS)
FREE = re.findall(r"`(\w+)`", OPTIONAL)


def run(name: str, folder: Path, keys: dict[str, Any]) -> Path:
    """A stage without inputs."""
    stage = load_stage(name)
    folder.mkdir(parents=True)
    stage.run(validate(stage.config, keys), Task("r", name, "all", {}, {}, {}, folder, folder.with_suffix(".logs")))
    return folder


def ingest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run("ingest_reviews", folder / "corpus", {"sources": [{"format": "jsonl", "path": str(file)}]})


def test_reviews_of_the_pages_form_are_read(tmp_path: Path) -> None:
    example = json.loads(EXAMPLE)
    rows = [{**example, "paper_id": f"p{n}", "review_id": f"r{n}", "title": f"Title {n}"} for n in range(12)]
    corpus = ingest(tmp_path, rows)
    found = list(read_jsonl(corpus / "reviews.jsonl"))
    assert {row["review_id"] for row in found} == {row["review_id"] for row in rows}
    assert {row["rating"] for row in found} == {float(example["rating"])}
    assert {row["decision"] for row in read_jsonl(corpus / "papers.jsonl")} == {example["decision"]}


@pytest.mark.parametrize("field", json.loads(EXAMPLE))
def test_fields_are_required_but_for_those_the_page_says_are_not(tmp_path: Path, field: str) -> None:
    row = json.loads(EXAMPLE)
    del row[field]
    if field in FREE:
        ingest(tmp_path, [row])
        return
    with pytest.raises(InputError, match=rf"mine\.jsonl(.|\n)*{field}|{field}(.|\n)*mine\.jsonl"):
        ingest(tmp_path, [row])


def test_the_pages_forms_of_preferences_are_the_codes() -> None:
    page = (DOCS / "bring-your-own-preferences.md").read_text()
    table = page[page.index("| `pair_format` | keys |") :].split("\n\n")[0]
    listed = {}
    for row in table.splitlines()[2:]:
        names, keys = row.split("|")[1:3]
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", names), re.findall(r"\b\w+\b", keys))
    assert set(listed) == set(FORMS)
    for name, keys in listed.items():
        assert set(FORMS[name].needs) <= set(keys), name


def test_the_example_file_is_of_one_of_the_forms() -> None:
    forms = {detect(row, "example") for row in read_jsonl(REPOSITORY / "examples" / "preferences.jsonl")}
    assert len(forms) == 1
    assert forms <= set(FORMS)


def test_images_and_ratings_of_the_pages_columns_are_read(tmp_path: Path) -> None:
    """Pictures, images.csv and ratings.csv with the columns and choices of the page's tables, and nothing else."""
    page = (DOCS / "bring-your-own-images.md").read_text()
    columns = {name: value for row in re.findall(r"^\| `.*", page, re.MULTILINE) if "message" not in row
               for name in re.findall(r"`(\w+)`", row.split("|")[1]) for value in [row.split("|")[2]]}  # fmt: skip
    assert {"prompt", "file", "prompt_id", "left", "right", "rater", "dimension", "choice"} <= set(columns)
    dimensions, choices = (re.findall(r"`(\w+)`", columns[name]) for name in ("dimension", "choice"))
    assert set(dimensions) == set(get_args(Dimension))
    with (tmp_path / "images.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["prompt", "file", "prompt_id"])
        for prompt in range(4):
            for side in "ab":
                name = f"{prompt}{side}.png"
                Image.new("RGB", (64, 64), (60 * prompt, 100 if side == "a" else 200, 0)).save(tmp_path / name)
                table.writerow([f"a picture of {prompt}", name, f"q{prompt}"])
    with (tmp_path / "ratings.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["left", "right", "rater", "dimension", "choice"])
        for prompt in range(4):
            for dimension in dimensions:
                table.writerow([f"{prompt}a.png", f"q{prompt}/{prompt}b", "me", dimension, choices[prompt]])
    source = {"format": "ratings", "ratings": str(tmp_path / "ratings.csv"), "images": str(tmp_path)}
    made = run("build_image_pairs", tmp_path / "pairs", {"sources": [source]})
    pairs = [row for path in made.rglob("*.jsonl") if "pair" in path.name or path.name == "data.jsonl"
             for row in read_jsonl(path)]  # fmt: skip
    assert pairs
    assert not list(read_jsonl(made / "quarantine.jsonl"))
