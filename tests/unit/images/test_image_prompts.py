"""Prompts: CSV and TSV, ids that follow from the prompt, and lines that cannot be used."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from prefmill.core.errors import InputError
from prefmill.images.prompts import is_safe, one_spelling, prompt_id_of, read_prompts, read_table
from tests.conftest import REPOSITORY


def write(folder: Path, text: str, name: str = "prompts.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_ids_are_given_or_follow_from_the_prompt(tmp_path: Path) -> None:
    given = read_prompts(write(tmp_path, 'prompt_id,prompt\nb,"A cat, asleep"\na,"Two ""old"" cups"\n'))
    assert given == [{"prompt_id": "a", "prompt": 'Two "old" cups'}, {"prompt_id": "b", "prompt": "A cat, asleep"}]
    derived = read_prompts(write(tmp_path, "\ufeffPrompt,Note\nA cat,x\n猫,\n"))
    assert {row["prompt"]: row["prompt_id"] for row in derived} == {
        "A cat": prompt_id_of("A cat"), "猫": prompt_id_of("猫")
    }  # fmt: skip
    assert prompt_id_of("A cat").startswith("a-cat-")
    assert all(is_safe(row["prompt_id"]) for row in derived)


def test_ids_do_not_depend_on_other_prompts(tmp_path: Path) -> None:
    few = read_prompts(write(tmp_path, "prompt\nB\n"))
    many = read_prompts(write(tmp_path, "prompt\nA\nB\nC\n"))
    assert few[0] in many


def test_quotes_in_a_tsv_are_text(tmp_path: Path) -> None:
    path = write(tmp_path, 'Prompt\tCategory\n"Fly" on a wall\tArts\n', "p.tsv")
    assert [row["prompt"] for row in read_prompts(path)] == ['"Fly" on a wall']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_that_a_program_wrote_says_its_quotes_twice(tmp_path: Path, quoting: Any) -> None:
    """As pandas and Python write it: the prompt was trained with the marks of the format in it."""
    prompts = ['"Open" on a door', 'a sign that says "open"', "a cat, asleep", 'a 5" disk']
    with (tmp_path / "p.tsv").open("w", newline="") as stream:
        csv.writer(stream, "excel-tab", quoting=quoting).writerows([["prompt"], *([prompt] for prompt in prompts)])
    assert sorted(row["prompt"] for row in read_prompts(tmp_path / "p.tsv")) == sorted(prompts)


@pytest.mark.parametrize(
    "mark",
    [
        "A cat, (hat:1.3)", "A cat, a dog BREAK a cat", "A cat, <lora:Style_v2:0.8>", "A cat --ar 16:9 --v 6",
        "A cat --n blurry --w 768", "# the second sample", "A {black|white} cat", "A __colour__ cat",
        "embedding:good, cat",
    ],
)  # fmt: skip
def test_marks_of_other_programs_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, mark: str) -> None:
    """As users of AUTOMATIC1111, ComfyUI, sd-scripts and Midjourney write them; diffusers has words alone."""
    read_prompts(write(tmp_path, f'prompt\n"A (red) cat #1: asleep -- or not, 2:1, break, snake_case"\n"{mark}"\n'))
    (told,) = caplog.messages
    assert "1 prompts have marks of another program, as (word:1.3), --w 768, {a|b} or <lora:name:1>" in told
    assert told.endswith(f"such as: {mark}")


def test_partiprompts(shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = read_prompts(shared_data / "images" / "PartiPrompts.tsv")
    assert not caplog.messages
    assert len(prompts) == 1632
    assert all(is_safe(row["prompt_id"]) for row in prompts)
    assert sum('"' in row["prompt"] for row in prompts) > 20


def test_the_shipped_prompts() -> None:
    prompts = read_prompts(REPOSITORY / "configs" / "generate_images" / "prompts.csv")
    assert len(prompts) == 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompt in the file"),
        ("prompt\n", "no prompt in the file"),
        ("words\nA cat\n", r"no column prompt[\s\S]*prompts.csv[\s\S]*words"),
        ("text,caption\nA cat,a\n", r"no column prompt[\s\S]*text, caption"),
        ("prompt_id,prompt\na,  \n", r"a prompt is empty[\s\S]*prompts.csv:2"),
        ("prompt_id,prompt\n../a,A cat\n", r"cannot be a file name[\s\S]*prompts.csv:2[\s\S]*\.\./a"),
        ("prompt\nA cat\nA  cat\n", r"stands here twice[\s\S]*prompts.csv:3[\s\S]*first on line 2"),
        ("prompt_id,prompt\na,x\nA,y\n", "stands here twice"),
        ('prompt\n"A cat\n', "quote that is not closed"),
        (
            "prompt\nA boat\nA cat, a dog\n",
            r"more cells than[\s\S]*prompts.csv:3[\s\S]*A cat'[\s\S]* a dog",
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "column", "line"),
    [
        ("prompts_comma.csv", "prompt", 2),
        ("prompts_two_columns.csv", "prompt", 2),
        ("ratings_surplus.csv", "choice", 3),
    ],
)
def test_surplus_cells_are_refused_by_line(name: str, column: str, line: int) -> None:
    cases = REPOSITORY.parent / "shared" / "cases" / "images"
    if not cases.is_dir():
        pytest.skip("needs the cases beside the checkout (shared/cases/images)")
    with pytest.raises(InputError, match=rf"more cells than[\s\S]*{name}:{line}[\s\S]*fix: +\w+"):
        list(read_table(cases / name, (column,)))


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet", "p.csv"])
def test_prompts_are_read_from_rows_too(tmp_path: Path, name: str) -> None:
    """As GenEval's and other benchmarks' files have them, and under the name that captioned sets give the column."""
    rows, path = [{"tag": ["x", 1], "Caption": "A cat, asleep"}, {"tag": [], "Caption": "A dog"}], tmp_path / name
    lines = [json.dumps(row) for row in rows]
    if name == "p.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"Caption": row["Caption"]} for row in rows]), path)
    else:
        table = 'Caption\n"A cat, asleep"\nA dog'
        path.write_text({"p.jsonl": "\n".join(lines), "p.json": f"[{','.join(lines)}]", "p.csv": table}[name])
    assert {row["prompt"] for row in read_prompts(path)} == {"A cat, asleep", "A dog"}


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"words": "A cat"}', r"no column prompt[\s\S]*p.jsonl:1"), ('{"prompt": ["A cat"]}', "a prompt is empty"),
     ('{"prompt": "A cat"}\n\n{"prompt": ""}', r"a prompt is empty[\s\S]*p.jsonl:3"), ("{", "not JSON")],
)  # fmt: skip
def test_a_row_that_has_no_prompt_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path, text, "p.jsonl"))


@pytest.mark.parametrize("sign", ["\0", "\u200b", "\ufeff", "\u00ad", "\u2060", "\u200e"])
def test_signs_that_show_nothing_make_no_second_prompt(tmp_path: Path, sign: str) -> None:
    """A web page's spaces without width: the same words, in two splits."""
    with pytest.raises(InputError, match="stands here twice"):
        read_prompts(write(tmp_path, f"prompt\nA cat\n{sign}A c{sign}at{sign}\n"))
    assert one_spelling("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"  # these join, and are seen


def test_the_rating_page_takes_a_prompts_direction_from_its_letters() -> None:
    """HTML's `dir`: Hebrew and Arabic began at the left, with their full stops on the wrong side."""
    page = (REPOSITORY / "lib" / "prefmill" / "images" / "rating_page.html").read_text(encoding="utf-8")
    assert re.findall('<h1 id="prompt"([^>]*)>', page) == [' dir="auto" tabindex="0"']


def test_empty_cells_at_the_end_are_no_matter(tmp_path: Path) -> None:
    assert [row["prompt"] for row in read_prompts(write(tmp_path, "prompt\nA cat,,\n"))] == ["A cat"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"not utf-8 text[\s\S]*save it as UTF-8"):
        read_prompts(path)
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "none.csv")
    with pytest.raises(InputError, match="prompts are read from a table"):
        read_prompts(write(tmp_path, "A cat", "p.doc"))


def test_prompts_may_be_lines_of_text_or_captions(tmp_path: Path) -> None:
    lines = write(tmp_path, '\ufeffA cat, sitting\r\n\nA "dog"; running\n', "p.txt")
    assert [row["prompt"] for row in read_prompts(lines)] == ["A cat, sitting", 'A "dog"; running']
    assert [row["prompt"] for row in read_prompts(write(tmp_path, "A cat\rA dog\x1a", "old.txt"))] == ["A cat", "A dog"]
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "1.txt").write_text("A cat\nwith more\n")
    (tmp_path / "c" / "d" / "2.caption").write_text("A dog")
    (tmp_path / "c" / "1.png").touch()
    (tmp_path / "c" / "._1.txt").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside a file
    (tmp_path / "c" / "3.txt").write_text("A  dog\n")  # a caption of two pictures is one prompt
    assert [row["prompt"] for row in read_prompts(tmp_path / "c")] == ["A cat", "A dog"]
    for text, told in (("A cat\nA  cat\n", r"stands here twice(.|\n)*p.txt:2"), ("\n", "no prompt in the file")):
        with pytest.raises(InputError, match=told):
            read_prompts(write(tmp_path, text, "p.txt"))
    (tmp_path / "p.txt").write_bytes(b"\xe9t\xe9\n")
    with pytest.raises(InputError, match=r"cannot read the text(.|\n)*UTF-8"):
        read_prompts(tmp_path / "p.txt")
