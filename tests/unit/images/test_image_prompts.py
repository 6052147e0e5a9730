"""Prompts: CSV and TSV, ids that follow from the prompt, and lines that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.core.errors import InputError
from prefmill.images.prompts import is_safe, prompt_id_of, read_prompts, read_table
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


def test_partiprompts(shared_data: Path) -> None:
    prompts = read_prompts(shared_data / "images" / "PartiPrompts.tsv")
    assert len(prompts) == 1632
    assert all(is_safe(row["prompt_id"]) for row in prompts)
    assert sum('"' in row["prompt"] for row in prompts) > 20


def test_the_shipped_prompts() -> None:
    prompts = read_prompts(REPOSITORY / "configs" / "generate_images" / "prompts.csv")
    assert len(prompts) == 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no column prompt[\s\S]*an empty file"),
        ("prompt\n", "no prompt in the file"),
        ("text\nA cat\n", r"no column prompt[\s\S]*prompts.csv:1[\s\S]*text"),
        ("prompt_id,prompt\na,  \n", r"a prompt is empty[\s\S]*prompts.csv:2"),
        ("prompt_id,prompt\n../a,A cat\n", r"cannot be a file name[\s\S]*prompts.csv:2[\s\S]*\.\./a"),
        ("prompt\nA cat\nA  cat\n", r"stands here twice[\s\S]*prompts.csv:3[\s\S]*first on line 2"),
        ("prompt_id,prompt\na,x\nA,y\n", "stands here twice"),
        ('prompt\n"A cat\n', "cannot read the table"),
        ("prompt\nA boat\nA cat, a dog\n", r"more cells than[\s\S]*prompts.csv:3[\s\S]*A cat,  a dog[\s\S]*quotes"),
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


def test_empty_cells_at_the_end_are_no_matter(tmp_path: Path) -> None:
    assert [row["prompt"] for row in read_prompts(write(tmp_path, "prompt\nA cat,,\n"))] == ["A cat"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt\n\xff\xfe\n")
    with pytest.raises(InputError, match="cannot read the table"):
        read_prompts(path)
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"read from \.csv or \.tsv"):
        read_prompts(write(tmp_path, "A cat", "p.txt"))
