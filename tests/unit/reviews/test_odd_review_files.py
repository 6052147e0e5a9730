"""Files of reviews that are nearly right: other encodings, separators, packings, columns and marks of no value."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import pickle
import re
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from pandas._libs.parsers import STR_NA_VALUES
from pyarrow import parquet

from prefmill.core.errors import InputError
from prefmill.reviews import files
from prefmill.reviews.rows import (
    PaperRow,
    RawRow,
    ReviewRow,
    Skipped,
)
from tests.unit.reviews.read_sources import ROW, items_of, read, source, write


def test_a_folders_other_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.JSONL", "c.json", "notes.txt", ".hidden.json"):
        write(tmp_path / name, {**ROW, "review_id": name})
    with caplog.at_level(logging.WARNING):
        items = items_of(source(format="jsonl", path=tmp_path))
    assert [item.review_id for item in items if isinstance(item, ReviewRow)] == ["a.jsonl", "b.JSONL"]
    assert "1 files are of another kind and not read: c.json" in caplog.text


def test_a_folder_of_json_files_is_read_where_it_holds_no_lines(tmp_path: Path) -> None:
    """One file a paper, as many crawlers write: `convert its files` was the advice."""
    paper = {name: ROW[name] for name in ("paper_id", "title")}
    review = {name: value for name, value in ROW.items() if name not in paper}
    write(tmp_path / "a" / "1.json", json.dumps({**paper, "reviews": [review]}, indent=1))
    write(tmp_path / "b" / "2.json", json.dumps([{**ROW, "review_id": "r2"}]))
    ids = [item.review_id for item in items_of(source(format="jsonl", path=tmp_path)) if isinstance(item, ReviewRow)]
    assert ids == [ROW["review_id"], "r2"]


@pytest.mark.parametrize("indent", [None, 1])
def test_papers_by_their_ids_are_papers(tmp_path: Path, indent: int | None) -> None:
    """`{id: {..., reviews: [...]}}`, in one line or over many: its first paper was missing all fields."""
    review = {"review_text": "Fine.", "rating": 3}
    papers = {name: {"paper_id": name, "title": name, "reviews": [review]} for name in "pq"}
    path = write(
        tmp_path / "x.json", json.dumps({**papers, "s": {"review_text": "no title", "rating": 3}}, indent=indent)
    )
    items, problems = read(source(format="jsonl", path=path))
    reviews = [item for item in items if isinstance(item, ReviewRow)]
    assert [review.paper_id for review in reviews] == ["p", "q"]
    assert [(problem.place.item, problem.reason) for problem in problems] == [("s", "missing in the row: title")]


def test_a_table_with_another_separator_or_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "|".join(ROW) + "\n" + "|".join(map(str, ROW.values())) + "\n")
    _, problems = read(source(format="csv", path=path))
    assert "missing in the row: rating" in problems[0].reason
    path = write(tmp_path / "x.csv", ",".join(ROW) + "\n" + ",".join(map(str, ROW.values())) + "\n")
    _, problems = read(source(format="csv", path=path, columns={"abstract": "abstrct"}))
    assert [problem.reason for problem in problems] == ["columns names 'abstrct', which the file has not"]
    _, problems = read(source(format="csv", path=path, columns={"title": "titel"}))
    assert problems[0].reason == "columns names 'titel', which the file has not (did you mean 'title'?)"


ROWS = [{"a": 1, "b": "é\u2028"}, {"a": None, "b": "x\r\ny"}]


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "content",
    [
        LINES.replace("\n", "\r").encode(),
        *map(LINES.encode, ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")),
        gzip.compress(LINES.encode("utf-16-le"), mtime=0), bz2.compress(LINES.encode()), lzma.compress(LINES.encode()),
        # Two frames, as `zstd -c >> file` leaves them.
        b"".join(pyarrow.compress(f"{line}\n".encode(), codec="zstd", asbytes=True) for line in LINES.split("\n")[:-1]),
    ],
)  # fmt: skip
def test_lines_in_other_encodings_and_packings_are_the_same_rows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    rows = list(files.jsonl_rows(tmp_path / "x.jsonl", 0))
    assert [(row.place.line, row.values) for row in rows if isinstance(row, RawRow)] == list(enumerate(ROWS, 1))


def test_a_table_of_an_old_mac_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'a,b\r1,"two\nlines"\r2,"a, b"\r')
    rows = list(files.csv_rows(tmp_path / "x.csv", 0))
    assert [row.values for row in rows if isinstance(row, RawRow)] == [
        {"a": "1", "b": "two\nlines"}, {"a": "2", "b": "a, b"},
    ]  # fmt: skip


def test_parquet_is_read_as_json_lines_and_tables_are(tmp_path: Path) -> None:
    rows = [{**ROW, "review_id": f"r{number}", "sub_scores": {"clarity": number}} for number in range(3)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decimals = [{**row, "rating": Decimal(row["rating"])} for row in rows]  # as databases export numbers
    parquet.write_table(pyarrow.Table.from_pylist(decimals), tmp_path / "x.parquet")
    wanted = items_of(source(format="jsonl", path=tmp_path / "x.jsonl"))
    assert items_of(source(format="jsonl", path=tmp_path / "x.parquet")) == wanted
    flat = [{"sub_scores.clarity": row.pop("sub_scores")["clarity"], "score": row.pop("rating"), **row} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "flat.parquet")
    # A sub-score of 0 is one.
    assert items_of(source(format="csv", path=tmp_path / "flat.parquet", columns={"rating": "score"})) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lzma.compress(LINES.encode())[:-20], "truncated xz file"), (b"BZh" + b"junk" * 9, "damaged bzip2 file"),
        (pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True)[:-5], "damaged zstd file"),
        (LINES.encode("utf-16-le")[:-1], "invalid UTF-16"),
        (LINES.encode("utf-32")[:-1], "invalid UTF-32"), (b"PK\x03\x04", "save the sheet as CSV"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(files.jsonl_rows(tmp_path / "x.jsonl", 0))


def test_the_fix_for_parquet_under_another_name_is_accepted(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=r"name that ends in .parquet"):
        list(files.json_rows(tmp_path / "x.jsonl", 0))
    path = (tmp_path / "x.jsonl").rename(tmp_path / "x.parquet")
    assert [row.values for row in files.json_rows(path, 0) if isinstance(row, RawRow)] == [{"a": 1}]


def test_nan_is_no_value_and_counted(tmp_path: Path) -> None:
    nan = float("nan")
    optional = {"abstract": nan, "text": nan, "decision": nan, "venue": nan, "confidence": nan}
    row = {**ROW, **optional, "sub_scores": {"clarity": nan, "novelty": 3}}
    items = items_of(source(format="jsonl", path=write(tmp_path / "x.jsonl", row)))
    plain = items_of(source(format="jsonl", path=write(tmp_path / "y.jsonl", {**ROW, "sub_scores": {"novelty": 3}})))
    assert items[:2] == plain
    names = [*optional, "sub_scores.clarity"]
    assert items[2:] == [Skipped(f"NaN as no value: {name}") for name in names]
    for name in ("title", "review_text", "rating"):
        _, (problem,) = read(source(format="jsonl", path=write(tmp_path / "x.jsonl", {**ROW, name: nan})))
        assert f"(NaN in {name} is no value)" in problem.reason
    _, (problem,) = read(source(format="jsonl", path=write(tmp_path / "x.jsonl", {**ROW, "confidence": float("inf")})))
    assert problem.reason == "confidence is not a number: inf"


def test_words_for_missing_cells_are_those_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for word in sorted(STR_NA_VALUES - {""}):
        path.write_text(f"{','.join(ROW)},abstract,decision,confidence\np1,T,r1,Fine.,6,{word},{word},{word}\n")
        paper, review, *skipped = items_of(source(format="csv", path=path))
        assert isinstance(paper, PaperRow)
        assert isinstance(review, ReviewRow)
        assert (paper.abstract, paper.decision, review.confidence, len(skipped)) == ("", None, None, 3), word
    path.write_text(f"{','.join(ROW)}\np1,T,r1,Fine.,N/A\n")
    words = {"rating_words": {"N/A": 1}}
    assert [item.rating for item in items_of(source(format="csv", path=path, **words)) if isinstance(item, ReviewRow)]
    _, (problem,) = read(source(format="csv", path=path))
    assert "N/A in rating is no value" in problem.reason


@pytest.mark.parametrize("first", ["", "sep=;\r\n", "\ufeff", '\ufeff"sep=;"\r\n'])
def test_a_table_of_a_country_with_decimal_commas(tmp_path: Path, first: str) -> None:
    lines = [";".join(ROW), 'p1;T;r1;"a, b; ""c""\nd";6,5', ";;;;", "p1;T;r2;x, y;7", "p1;T;r3"]
    path = write(tmp_path / "x.csv", first + "\r\n".join(lines) + "\r\n")
    items, (problem,) = read(source(format="csv", path=path, decimal_comma=True))
    reviews = [(item.text, item.rating) for item in items if isinstance(item, ReviewRow)]
    assert reviews == [('a, b; "c"\nd', 6.5), ("x, y", 7.0)]
    assert problem.place.line == 6 + ("sep" in first)
    assert "fewer cells than the header's 5" in problem.reason
    assert "fill the row up with ';'" in problem.fix
    tabs = write(tmp_path / "x.tsv", "\t".join(ROW) + "\n" + "\t".join(map(str, ROW.values())) + "\n")
    assert items_of(source(format="csv", path=tabs)) == items_of(
        source(format="jsonl", path=write(tmp_path / "x.jsonl", ROW))
    )


def test_empty_cells_behind_the_last_column_are_no_fault(tmp_path: Path) -> None:
    """As sheets write them where a cell was once touched, and as pandas' reader refuses or shifts them."""
    lines = [",".join(ROW), "p1,T,r1,x,6,,", ",,,,,,", "p1,T,r2,y,7,,z"]
    items, (problem,) = read(source(format="csv", path=write(tmp_path / "x.csv", "\n".join(lines))))
    assert [item.text for item in items if isinstance(item, ReviewRow)] == ["x"]
    assert "more cells than the header's 5" in problem.reason
    assert problem.place.line == 4


def test_a_file_of_another_format_is_told_and_tables_with_tabs_lie_in_folders(tmp_path: Path) -> None:
    table = write(tmp_path / "f" / "x.tsv", "\t".join(ROW) + "\n" + "\t".join(map(str, ROW.values())) + "\n")
    assert items_of(source(format="csv", path=table.parent)) == items_of(source(format="csv", path=table))
    for name, given, right in (("x.csv.gz", "jsonl", "csv"), ("x.jsonl", "csv", "jsonl")):
        with pytest.raises(InputError, match=rf"another format(.|\n)*set format: {right}"):
            read(source(format=given, path=write(tmp_path / name, "")))


@pytest.mark.parametrize(
    ("text", "kind"),
    [("version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "Git LFS"), ("<!DOCTYPE html>", "page")],
)
def test_what_came_in_place_of_a_file_is_told(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(InputError, match=rf"of another kind(.|\n)*{kind}(.|\n)*download"):
        read(source(format="jsonl", path=write(tmp_path / "x.jsonl", text)))


def archive(mode: str) -> bytes:
    """One line of JSON in a tar: read as text, the archive's head stood before it in one line."""
    stream, content = io.BytesIO(), json.dumps(ROW).encode()
    with tarfile.open(fileobj=stream, mode=mode) as file:  # type: ignore[call-overload]
        entry = tarfile.TarInfo("x.jsonl")
        entry.size = len(content)
        file.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (archive("w"), "tar archive"), (archive("w:gz"), "tar archive"), (b"7z\xbc\xaf\x27\x1c", "an archive"),
        (b"%PDF-1.7\n", "PDF"), (b"SQLite format 3\0", "database"), (pickle.dumps([ROW]), "pickle"),
        (bytes(400), "zeros"),
    ],
)  # fmt: skip
def test_files_that_are_no_text_are_told(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match=rf"of another kind(.|\n)*{kind}"):
        read(source(format="jsonl", path=tmp_path / "x.jsonl.gz"))


def test_a_folder_with_an_archive_alone_names_it(tmp_path: Path) -> None:
    write(tmp_path / "x.tar.gz", "")
    with pytest.raises(InputError, match=r"without review files(.|\n)*x\.tar\.gz"):
        read(source(format="jsonl", path=tmp_path))


def test_json_that_is_nested_without_end_is_told(tmp_path: Path) -> None:
    """In an array it was a traceback (RecursionError)."""
    with pytest.raises(InputError, match="nested too deeply"):
        read(source(format="jsonl", path=write(tmp_path / "x.json", "[" * 9000 + "]" * 9000)))


def test_a_log_gives_a_terminal_nothing_to_obey(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "\x1b[2J\x1b]0;title\x07 no JSON")
    _, (problem,) = read(source(format="jsonl", path=path))
    assert problem.excerpt == r"\x1b[2J\x1b]0;title\x07 no JSON"


def test_the_conversion_that_is_advised_keeps_what_windows_writes(tmp_path: Path) -> None:
    text = f"{','.join(ROW)}\np1,T,r1,“Naïve” – it’s €5…,6\n"
    (tmp_path / "x.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(InputError, match="invalid UTF-8") as caught:
        read(source(format="csv", path=tmp_path / "x.csv"))
    encoding = re.search(r"iconv -f (\S+)", str(caught.value))
    assert encoding
    write(tmp_path / "x.csv", (tmp_path / "x.csv").read_bytes().decode(encoding[1]))
    reviews = [item.text for item in items_of(source(format="csv", path=tmp_path / "x.csv")) if hasattr(item, "rating")]
    assert reviews == ["“Naïve” – it’s €5…"]


@pytest.mark.parametrize("columns", [("rating", "final"), ("final", "rating")])
def test_a_column_that_is_named_wins_whatever_the_order(tmp_path: Path, columns: tuple[str, str]) -> None:
    cells = {"rating": "2", "final": "9"}
    text = (
        f"paper_id,title,review_id,review_text,{','.join(columns)}\np,T,r,Fine.,{','.join(map(cells.get, columns))}\n"
    )
    path, named = write(tmp_path / "x.csv", text), {"rating": "final"}
    _, problems = read(source(format="csv", path=path, columns=named))
    assert problems[0].reason.startswith("unknown field 'rating (the file's own)'")
    for form in ("csv", "jsonl"):
        if form == "jsonl":
            row = dict(zip(text.split("\n")[0].split(","), text.split("\n")[1].split(","), strict=True))
            path = write(tmp_path / "x.jsonl", json.dumps({**row, "review_id": 7}))
        (_, review) = items_of(source(format=form, path=path, columns=named, ignore_extra_fields=True))
        assert (review.rating, review.review_id) == (9.0, {"csv": "r", "jsonl": "7"}[form])


def test_one_column_may_stand_for_two_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps({"asin": "B1", "id": 1, "reviewText": "Fine.", "overall": 5.0}))
    _, problems = read(source(format="jsonl", path=path))
    assert "columns: {rating: overall, review_text: reviewText}" in problems[0].fix
    columns = {"paper_id": "asin", "title": "asin", "review_id": "id", "review_text": "reviewText", "rating": "overall"}
    paper, review = items_of(source(format="jsonl", path=path, columns=columns, rating_max=5))
    assert (paper.paper_id, paper.title, review.text) == ("B1", "B1", "Fine.")


@pytest.mark.parametrize("spell", [str.title, str.upper, lambda name: name.replace("_", " ").capitalize()])
def test_names_in_another_spelling_are_told_as_columns(tmp_path: Path, spell: Callable[[str], str]) -> None:
    """The fix named a column that the file has not."""
    names = ["paper_id", "title", "review_id", "review_text", "rating"]
    path = write(tmp_path / "x.csv", ",".join(map(spell, names)) + "\np1,T,r1,Fine.,6\n")
    _, (problem,) = read(source(format="csv", path=path))
    found = re.search(r"columns: \{([^}]+)\}", problem.fix)
    assert found
    columns = dict(pair.split(": ") for pair in found[1].split(", "))
    assert columns == {name: spell(name) for name in names}
    assert [type(item) for item in items_of(source(format="csv", path=path, columns=columns))] == [PaperRow, ReviewRow]
