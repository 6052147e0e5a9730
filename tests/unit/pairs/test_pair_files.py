"""Files as people have them: encodings, packed files, Arrow, labels in words, columns that would be lost."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from pyarrow import feather, parquet

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.pairs.chats import ChatSource, write_chats
from prefmill.pairs.formats import parse
from prefmill.pairs.sources import PairSource
from prefmill.pairs.turns import BadRowError
from prefmill.pairs.writing import write_pairs, write_split
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.row_files import file_rows
from tests.conftest import REPOSITORY

CASES = REPOSITORY.parent / "shared" / "cases" / "text"


def case(name: str) -> Path:
    if not CASES.is_dir():
        pytest.skip("needs the cases beside the checkout (shared/cases/text)")
    return CASES / name


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.json.gz", "rows.jsonl.zst", "rows.arrow", "bom.csv"])
def test_the_same_rows_in_every_kind_of_file(name: str, tmp_path: Path) -> None:
    train, _ = write_pairs(validate(PairSource, {"dataset": str(case(name))}), tmp_path, tmp_path / "bad.json")
    rows = list(read_jsonl(train))
    assert [row["chosen"]["value"] for row in rows] == [f"Tree {n} gives shade in summer." for n in range(6)]
    assert [row["rejected"]["value"] for row in rows] == [f"I do not know, tree {n}." for n in range(6)]


ROWS = [{"prompt": "Q?", "chosen": " good", "rejected": "b\r\nad, é"}, {"prompt": "R?", "chosen": "c", "rejected": "d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(separator: str, before: str = "") -> str:
    with io.StringIO(newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)
        return before + stream.getvalue() + "\r\n" + separator * 2 + "\r\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl.xz", lzma.compress(LINES.encode())), ("x.JSONL.bz2", bz2.compress(LINES.encode())),
        ("packed.jsonl", gzip.compress(LINES.encode(), mtime=0)), ("plain.jsonl.gz", LINES.encode()),
        ("x.jsonl", LINES.encode("utf-16")), ("x.tsv", table("\t").encode()), ("x.CSV", table(";").encode()),
        ("x.csv", table(";", "sep=;\r\n").encode("utf-16")),
    ],
)  # fmt: skip
def test_other_packings_separators_and_names_give_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    source = validate(PairSource, {"dataset": str(tmp_path / name)})
    assert source.dataset_file == tmp_path / name
    assert [row.values for row in file_rows(tmp_path / name)] == ROWS


def test_feather_and_tables_of_pandas_are_read(tmp_path: Path) -> None:
    frame = pandas.DataFrame(ROWS)
    frame.to_feather(tmp_path / "x.feather")
    frame.to_csv(tmp_path / "x.csv", lineterminator="\n")
    assert [row.values for row in file_rows(tmp_path / "x.feather")] == ROWS
    found = [row.values for row in file_rows(tmp_path / "x.csv")]
    assert found == [{"Unnamed: 0": str(number), **row} for number, row in enumerate(ROWS)]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_with_pictures_is_never_whole_in_memory(tmp_path: Path, kind: str) -> None:
    table = pyarrow.table({"image": [bytes([n % 256]) * 20_000 for n in range(2_000)]})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "x.parquet")
    else:
        feather.write_feather(table, tmp_path / "x.arrow", chunksize=2_000)
    tracemalloc.start()
    count = sum(len(row.values["image"]) for row in file_rows(tmp_path / f"x.{kind}"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000_000
    assert peak < 15_000_000, peak


def test_a_packed_file_that_is_cut_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 99)[:-20])
    with pytest.raises(InputError, match="truncated gzip file"):
        list(file_rows(tmp_path / "x.jsonl.gz"))


def test_a_folder_saved_to_disk_is_read_by_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": "Q?", "chosen": "good", "rejected": "bad"}]
    DatasetDict({"train": Dataset.from_list(rows), "extra": Dataset.from_list(rows * 2)}).save_to_disk(tmp_path / "two")
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    for keys, count in (({"dataset": "one"}, 1), ({"dataset": "two"}, 1), ({"dataset": "two", "split": "extra"}, 2)):
        source = validate(PairSource, {**keys, "dataset": str(tmp_path / str(keys["dataset"]))})
        train, _ = write_pairs(source, tmp_path / "own", tmp_path / "bad.json")
        assert len(list(read_jsonl(train))) == count
    with pytest.raises(InputError, match="no split 'other'"):
        list(file_rows(tmp_path / "two", split="other"))


def test_a_table_in_another_encoding_names_the_key_and_is_read_with_it() -> None:
    with pytest.raises(InputError, match="encoding=latin-1"):
        list(file_rows(case("latin1.csv")))
    assert all("\ufffd" not in str(row.values) for row in file_rows(case("latin1.csv"), "latin-1"))


def test_a_cell_as_long_as_a_paper_is_read() -> None:
    assert max(len(value) for row in file_rows(case("long_cell.csv")) for value in row.values.values()) > 131_072


@pytest.mark.parametrize("name", ["x.zip", "x.xlsx", "x.txt", "x"])
def test_a_file_of_no_known_kind_is_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LINES)
    with pytest.raises(InputError, match=r"kind of file is not known(.|\n)*\.jsonl(.|\n)*unpack"):
        write_pairs(validate(PairSource, {"dataset": str(tmp_path / name)}), tmp_path, tmp_path / "bad.json")


def test_more_cells_than_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\nQ?,good, as said,bad\n")
    with pytest.raises(InputError, match="more cells") as caught:
        list(file_rows(tmp_path / "x.csv"))
    assert "x.csv:2" in str(caught.value)


def test_labels_as_text_are_read_as_said(tmp_path: Path) -> None:
    source = validate(PairSource, {"dataset": str(case("labels_as_text.jsonl"))})
    train, _ = write_pairs(source, tmp_path, tmp_path / "bad.json")
    assert all("shade" in row["chosen"]["value"] for row in read_jsonl(train))
    words = {True: ("good", "Chosen", "desirable"), False: ("bad", "rejected", " undesirable ")}
    for is_good, label in ((is_good, label) for is_good, labels in words.items() for label in labels):
        found = parse({"prompt": "Q?", "completion": "A", "label": label}, "unpaired", {})
        assert found.scores == (is_good,)
    with pytest.raises(BadRowError, match="'perhaps'"):
        parse({"prompt": "Q?", "completion": "A", "label": "perhaps"}, "unpaired", {})


@pytest.mark.parametrize("name", ["surrogate.jsonl", "same_after_trim.jsonl"])
def test_a_row_at_fault_is_named_and_can_be_left_out(name: str, tmp_path: Path) -> None:
    keys = {"dataset": str(case(name))}
    with pytest.raises(InputError, match=rf"{name}:1"):
        write_pairs(validate(PairSource, keys), tmp_path, tmp_path / "bad.json")
    source = validate(PairSource, {**keys, "on_bad_row": "drop"})
    train, _ = write_pairs(source, tmp_path, tmp_path / "bad.json")
    assert len(json.loads((tmp_path / "bad.json").read_text())) == 1
    assert list(read_jsonl(train))


@pytest.mark.parametrize("key", ["functions", "chat_template_kwargs"])
def test_what_would_be_left_out_is_refused_by_name(key: str) -> None:
    with pytest.raises(BadRowError, match=f"'{key}' is not trained on"):
        parse({"prompt": "Q?", "chosen": "A", "rejected": "B", key: {"x": 1}}, "prompt_strings", {})


def test_reasoning_and_tools_come_through_as_they_are(tmp_path: Path) -> None:
    for name in ("reasoning.jsonl", "tools.jsonl"):
        source = validate(ChatSource, {"dataset": str(case(name))})
        train, _ = write_chats(source, tmp_path / name, tmp_path / "bad.json")
        given, own = (list(read_jsonl(path)) for path in (case(name), train))
        for before, after in zip(given, own, strict=True):
            assert after["messages"] == before["messages"]
            assert after.get("tools") == before.get("tools")


def test_a_pair_keeps_reasoning_and_tools_of_its_sides(tmp_path: Path) -> None:
    from prefmill.training.data import read_pairs

    call = {"name": "area", "arguments": '{"side": 3}'}  # the older form, arguments as text
    tools = [{"type": "function", "function": {"name": "area"}}]
    asked = [{"role": "user", "content": "Area?"}]
    good = [{"role": "assistant", "content": None, "function_call": call}]
    bad = [{"role": "assistant", "content": "9", "thinking": "3 times 3"}]
    row = {"prompt": asked, "chosen": good, "rejected": bad, "tools": json.dumps(tools)}
    write_jsonl(tmp_path / "x.jsonl", [row])
    train, _ = write_pairs(
        validate(PairSource, {"dataset": str(tmp_path / "x.jsonl")}), tmp_path, tmp_path / "bad.json"
    )
    (pair,) = read_pairs(train)
    assert pair.tools == tuple(tools)
    function = {"name": "area", "arguments": {"side": 3}}
    assert pair.chosen == {
        "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]
    }  # fmt: skip
    assert pair.rejected == {"role": "assistant", "content": "9", "reasoning_content": "3 times 3"}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "assistant", "content": "9", "thinking": 3}, "reasoning is one text"),
        ({"role": "assistant", "content": "9", "thinking": "a", "reasoning": "b"}, "reasoning is one text"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments in JSON"),
        ({"role": "assistant", "content": "9", "thinking": "\ud83d"}, "surrogate"),
    ],
)
def test_reasoning_and_calls_that_are_none_are_the_rows_fault(message: dict[str, Any], why: str) -> None:
    turns = [{"role": "user", "content": "Q?"}, message]
    with pytest.raises(BadRowError, match=why):
        parse({"messages": turns, "label": True}, "unpaired_messages", {})


def test_files_are_mixed_by_weight_none_twice_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("a", 100), ("b", 40)):
        rows = [{"prompt": f"{name}{n}", "chosen": "good", "rejected": "bad"} for n in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = [{"file": str(tmp_path / "a.jsonl"), "weight": 1}, {"file": str(tmp_path / "b.jsonl"), "weight": 2}]
    made = []
    for folder, seed in (("one", 1), ("same", 1), ("other", 2)):
        source = validate(PairSource, {"mixture": files, "seed": seed})
        train, _ = write_pairs(source, tmp_path / folder, tmp_path / "bad.json")
        made.append([row["conversations"][0]["value"] for row in read_jsonl(train)])
    assert [sum(name.startswith(file) for name in made[0]) for file in "ab"] == [20, 40]
    assert len(set(made[0])) == 60
    assert made[0] == made[1] != made[2]
    assert "mixture: 20 of 100 rows of a.jsonl (33%)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing.png", "truncated.jpg", "not_an_image.png", "bomb.png"])
def test_an_image_that_cannot_be_used_is_the_rows_fault(name: str, tmp_path: Path) -> None:
    images = CASES.parent / "images"
    rows = [{"prompt": f"<image>{n}?", "chosen": "good", "rejected": "bad", "images": [n]} for n in ("grey.png", name)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    keys = {"dataset": str(tmp_path / "x.jsonl"), "image_folder": str(case("bom.csv").parents[1] / images.name)}
    with pytest.raises(InputError, match=name):
        write_pairs(validate(PairSource, keys), tmp_path, tmp_path / "bad.json")
    train, _ = write_pairs(validate(PairSource, {**keys, "on_bad_row": "drop"}), tmp_path, tmp_path / "bad.json")
    assert len(list(read_jsonl(train))) == 1
    assert name in (tmp_path / "bad.json").read_text()


def test_a_system_column_stands_before_the_messages(tmp_path: Path) -> None:
    source = validate(ChatSource, {"dataset": str(case("system_column.jsonl"))})
    train, _ = write_chats(source, tmp_path, tmp_path / "bad.json")
    rows = list(read_jsonl(train))
    assert rows
    assert all(row["messages"][0] == {"role": "system", "content": "Answer in one word."} for row in rows)
    turns = [{"role": role, "content": "Q"} for role in ("system", "user", "assistant")]
    with pytest.raises(BadRowError, match="say different things"):
        parse({"messages": turns, "label": True, "system": "B"}, "unpaired_messages", {})


def test_columns_that_nothing_reads_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "Q?", "chosen": "good", "rejected": "bad", "score": 3, "id": "a"}])
    write_pairs(validate(PairSource, {"dataset": str(tmp_path / "x.jsonl")}), tmp_path, tmp_path / "bad.json")
    assert "columns that are not used: score\n" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", ["score_chosen", "chosen-rating", "chosen_avg_rating"])
def test_scores_that_contradict_their_pair_are_told(
    chosen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As UltraFeedback and Argilla's sets have them; lengths and missing scores are no scores."""
    scores = [(8.0, 3.0), (3.0, 8.0), (5, 5), (None, 9.0)]
    rows = [
        {"prompt": f"Q{n}?", "chosen": "good", "rejected": "bad", "chosen_length": 1, "rejected_length": 9}
        | {chosen: good, chosen.replace("chosen", "rejected"): bad}
        for n, (good, bad) in enumerate(scores)
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    train, _ = write_pairs(
        validate(PairSource, {"dataset": str(tmp_path / "x.jsonl")}), tmp_path, tmp_path / "bad.json"
    )
    told = "by their own scores 1 of 3 pairs prefer the worse answer, and 1 have two equal ones"
    assert told in capsys.readouterr().out
    assert len(list(read_jsonl(train))) == len(rows)
    write_jsonl(tmp_path / "y.jsonl", rows[:1])
    write_pairs(validate(PairSource, {"dataset": str(tmp_path / "y.jsonl")}), tmp_path, tmp_path / "bad.json")
    assert "own scores" not in capsys.readouterr().out


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("beside", [{}, {"version": "1.0"}])
def test_a_list_that_an_export_puts_into_an_object_is_read(
    tmp_path: Path, indent: int | None, beside: dict[str, str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**beside, "data": ROWS}, indent=indent))
    assert [row.values for row in file_rows(path)] == ROWS
    # A row that has a list of that name, as the only line of a file, is a row.
    path.write_text(json.dumps({"data": ["a"], "rows": 3}))
    assert [row.values for row in file_rows(path)] == [{"data": ["a"], "rows": 3}]


def test_pairs_that_stand_there_again_or_the_other_way_round_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where several people judged the same two answers: what they undo of each other was trained without a word."""
    row = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
    turned = {"prompt": "Q?", "chosen": "bad ", "rejected": "good"}
    for rows, told in (([row, row, turned], "1 pairs stand there again and 1 both ways round"), ([row], "")):
        write_jsonl(tmp_path / "x.jsonl", rows)
        write_pairs(validate(PairSource, {"dataset": str(tmp_path / "x.jsonl")}), tmp_path, tmp_path / "bad.json")
        assert told in (said := capsys.readouterr().out)
        assert bool(told) == ("stand there" in said)


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    """All lines were held beside the rows, three times over; the bytes are the same."""
    source = validate(PairSource, {"dataset": "x.jsonl", "val_fraction": 0.25})
    rows = ((str(number), {"text": "word " * 1000 + str(number)}) for number in range(4000))
    tracemalloc.start()
    train, val = write_split(rows, source, tmp_path, "dpo")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20, f"20 MB of text took {peak >> 20} MB"
    assert val is not None
    numbers = [[int(row["text"].split()[-1]) for row in read_jsonl(path)] for path in (train, val)]
    assert sorted(numbers[0] + numbers[1]) == list(range(4000))
    assert all(found == sorted(found) for found in numbers)
    assert 0.2 < len(numbers[1]) / 4000 < 0.3
    with pytest.raises(InputError, match="too few prompts to hold some out"):
        write_split([("a", {"text": "x"})], source, tmp_path / "few", "dpo")
    assert not any(path.is_file() for path in (tmp_path / "few").rglob("*"))


@pytest.mark.parametrize("write", ["pairs", "chats"])
def test_pairs_are_not_held_in_memory(tmp_path: Path, write: str) -> None:
    """All of them were, until the last one was read."""
    rows = [
        {"prompt": f"Q{number}?", "chosen": f"good {number} " * 500, "rejected": "bad " * 500} for number in range(3000)
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    del rows
    given = {"dataset": str(tmp_path / "x.jsonl")}
    tracemalloc.start()
    if write == "pairs":
        write_pairs(validate(PairSource, given), tmp_path / "own", tmp_path / "bad.json")
    else:
        write_chats(validate(ChatSource, given), tmp_path / "own", tmp_path / "bad.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20, f"20 MB of text took {peak >> 20} MB"
