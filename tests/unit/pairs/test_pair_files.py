"""Files as people have them: encodings, packed files, Arrow, labels in words, columns that would be lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.pairs.chats import ChatSource, write_chats
from prefmill.pairs.formats import parse
from prefmill.pairs.sources import PairSource, write_pairs
from prefmill.pairs.turns import BadRowError
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


def test_more_cells_than_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\nQ?,good, as said,bad\n")
    with pytest.raises(InputError, match="more cells") as caught:
        list(file_rows(tmp_path / "x.csv"))
    assert "x.csv:2" in str(caught.value)


def test_labels_as_text_are_read_as_said(tmp_path: Path) -> None:
    source = validate(PairSource, {"dataset": str(case("labels_as_text.jsonl"))})
    train, _ = write_pairs(source, tmp_path, tmp_path / "bad.json")
    assert all("shade" in row["chosen"]["value"] for row in read_jsonl(train))
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


@pytest.mark.parametrize(("name", "key"), [("reasoning.jsonl", "reasoning_content"), ("tools.jsonl", "tools")])
def test_what_would_be_left_out_is_refused_by_name(name: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"'{key}' is not trained on"):
        write_chats(validate(ChatSource, {"dataset": str(case(name))}), tmp_path, tmp_path / "bad.json")


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
