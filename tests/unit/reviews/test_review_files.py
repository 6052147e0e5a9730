"""Files are read line by line or object by object, and every fault is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefmill.core.errors import InputError
from prefmill.reviews import files
from prefmill.reviews.files import csv_rows, json_file_row, json_rows, jsonl_rows
from prefmill.reviews.rows import RawRow, RowProblem


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(rows: Any) -> list[Any]:
    found = list(rows)
    assert all(isinstance(row, RawRow) for row in found), found
    return [row.values for row in found]


def test_json_lines_with_blanks_bom_and_gzip(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}'
    expected = [(1, {"a": 1}), (4, {"a": 2})]
    for path in (write(tmp_path / "x.jsonl", content), write(tmp_path / "odd.name", gzip.compress(content))):
        rows = list(jsonl_rows(path, 0))
        assert [(row.place.line, row.values) for row in rows if isinstance(row, RawRow)] == expected


def test_a_bad_line_is_a_problem_and_the_others_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b'{"a": 1}\n{"a": \n\xff{"a"}\n[1]\n{"a": 2}\n')
    rows = list(jsonl_rows(path, 3))
    problems = [row for row in rows if isinstance(row, RowProblem)]
    assert [row.values for row in rows if isinstance(row, RawRow)] == [{"a": 1}, {"a": 2}]
    assert [(problem.place.source, problem.place.line) for problem in problems] == [(3, 2), (3, 3), (3, 4)]
    assert "not JSON" in problems[0].reason
    assert "UTF-8" in problems[1].reason
    assert "list" in problems[2].reason


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_gzip_is_an_error_even_where_rows_could_be_read(tmp_path: Path, keep: float) -> None:
    whole = gzip.compress("".join(f'{{"a": "{index * 7919 % 10007}"}}\n' for index in range(5000)).encode())
    path = write(tmp_path / "x.jsonl.gz", whole[: int(len(whole) * keep)])
    with pytest.raises(InputError, match="truncated gzip file") as caught:
        list(jsonl_rows(path, 0))
    assert f"{path}, after line" in str(caught.value)
    assert "again" in str(caught.value)


def test_a_damaged_gzip_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b'{"a": 1}\n' * 1000))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(InputError, match="gzip file"):
        list(jsonl_rows(write(tmp_path / "x.gz", bytes(whole)), 0))
    with pytest.raises(InputError, match="no such file"):
        list(jsonl_rows(tmp_path / "absent", 0))
    with pytest.raises(InputError, match="a folder where a file is expected"):
        list(jsonl_rows(tmp_path, 0))


OBJECTS = [{"id": "a", "text": "x]{[,\n\"' é"}, {"id": "b", "nested": {"c": [1, {"d": []}]}}, {}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("chunk", [32, 41, 1 << 20])
def test_arrays_are_read_object_by_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, wrap: bool, chunk: int
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", chunk)  # the first piece must show what the file is
    content = json.dumps({"count": 3, "notes": OBJECTS} if wrap else OBJECTS, indent=indent, ensure_ascii=False)
    rows = list(json_rows(write(tmp_path / "x.json", content), 0))
    assert values(rows) == OBJECTS
    if indent:
        lines = content.split("\n")
        assert [lines[row.place.line - 1].strip()[0] for row in rows if row.place.line] == ["{", "{", "{"]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(), max_size=3), max_size=4), st.integers(32, 60))
def test_arrays_come_back_whatever_they_hold(tmp_path: Path, objects: list[dict[str, str]], chunk: int) -> None:
    path = write(tmp_path / "x.json", json.dumps(objects))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK_BYTES", chunk)
        assert values(json_rows(path, 0)) == objects


def test_json_rows_takes_lines_too(tmp_path: Path) -> None:
    content = "".join(json.dumps(row) + "\n" for row in OBJECTS)
    assert values(json_rows(write(tmp_path / "x.jsonl", content), 0)) == OBJECTS


def test_a_broken_array_names_the_line_where_its_object_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", '[\n{"a": 1},\n{"a": 2,\n "b" 3}\n]')
    with pytest.raises(InputError, match="not JSON, or cut short") as caught:
        list(json_rows(path, 0))
    assert f"{path}:3" in str(caught.value)


def test_a_broken_json_file_names_its_line(tmp_path: Path) -> None:
    problem = json_file_row(write(tmp_path / "x.json", '{"a": 1,\n"b" 2}'), 0)
    assert isinstance(problem, RowProblem)
    assert problem.place.line == 2


@pytest.mark.parametrize(
    ("content", "read", "line"),
    [
        ('{"a": 1}\n{"id": 1, "id": 2}\n{"a": 2}\n', jsonl_rows, 2),
        ('[{"a": 1},\n{"text": ": ", "id": 1, "id": 2},\n{"a": 2}]', json_rows, 2),
        ('{"notes": [{"a": 1},\n{"c": [{"id": 1, "id": 2}]}, {"a": 2}]}', json_rows, 2),
    ],
)
def test_a_key_that_stands_twice_is_a_problem_of_its_row(tmp_path: Path, content: str, read: Any, line: int) -> None:
    first, problem, last = read(write(tmp_path / "x.json", content), 0)
    assert [first.values, last.values] == [{"a": 1}, {"a": 2}]
    assert problem.reason == "not JSON: the key 'id' stands there twice"
    assert problem.place.line == line


def test_a_key_that_stands_twice_in_a_file_of_one_object(tmp_path: Path) -> None:
    problem = json_file_row(write(tmp_path / "x.json", '{"a": 1,\n"id": 1,\n"id": 2}'), 0)
    assert isinstance(problem, RowProblem)
    assert problem.reason == "not JSON: the key 'id' stands there twice"


def test_csv_with_quotes_and_lines_inside_cells(tmp_path: Path) -> None:
    content = '\ufeffid,text\nr1,"two\n\nlines, ""quoted"""\nr2,plain\n'
    rows = list(csv_rows(write(tmp_path / "x.csv", content), 0))
    assert values(rows) == [{"id": "r1", "text": 'two\n\nlines, "quoted"'}, {"id": "r2", "text": "plain"}]
    assert [row.place.line for row in rows] == [2, 5]


def test_csv_rows_of_another_length_are_problems(tmp_path: Path) -> None:
    rows = list(csv_rows(write(tmp_path / "x.csv", "id,text\nr1\nr2,b\nr3,c,d\n"), 0))
    assert [(type(row).__name__, row.place.line) for row in rows] == [
        ("RowProblem", 2),
        ("RawRow", 3),
        ("RowProblem", 4),
    ]


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        (b'id,text\nr1,"open\nr2,b\n', "unreadable CSV", ", in the row from line 2"),
        (b"id,id\n1,2\n", "stands there twice", ":1"),
        (b"id,text\nr1,ok\nr2,\xe9\n", "invalid UTF-8", ":3"),
    ],
)
def test_unreadable_csv_is_an_error(tmp_path: Path, content: bytes, message: str, line: str) -> None:
    path = write(tmp_path / "x.csv", content)
    with pytest.raises(InputError, match=message) as caught:
        list(csv_rows(path, 0))
    assert f"{path}{line}" in str(caught.value)
