"""Rows and files that are nearly right: read as meant, refused by name, or told; never another row in silence."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.families.causal.chat_rows import TrainedTurns
from prefmill.pairs.chats import CHAT_FORMS, ChatSource, write_chats
from prefmill.pairs.formats import parse
from prefmill.pairs.forms import Preference
from prefmill.pairs.sources import PairSource
from prefmill.pairs.turns import BadRowError
from prefmill.pairs.writing import write_pairs
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.unit.pairs.test_formats import SAME
from tests.unit.pairs.test_scored_forms import SCORED

PAIR = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
ODD = (None, 5, 0.5, True, "x", "", [], [5], [None], {}, {"a": 1}, [{}], [["a", 5]], {"role": ["user"]})
ROWS: dict[str, dict[str, Any]] = {
    **SAME,
    **{form: row for form, (row, *_) in SCORED.items()},
    "alpaca": {**SAME["alpaca"], "history": [["a", "b"]], "tools": [{"name": "f"}], "images": ["a.png"]},
    "unpaired": {"prompt": "Q?", "completion": "good", "label": True},
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
            {
                "role": "assistant", "content": "good", "reasoning": "so", "weight": 1,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
        ]
    },
    "instruction_output": {"instruction": "Q?", "input": "", "output": "good"},
}  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """`value` with each part of it, at any depth, replaced by odd ones."""
    yield from ODD
    if isinstance(value, dict):
        yield from ({**value, key: other} for key, item in value.items() for other in variants(item))
    if isinstance(value, list):
        yield from ([*value[:at], other, *value[at + 1 :]] for at, item in enumerate(value) for other in variants(item))


@pytest.mark.parametrize("form", ROWS)
def test_a_part_of_any_kind_is_read_or_the_rows_fault(form: str) -> None:
    rows = [row for row in variants(ROWS[form]) if isinstance(row, dict)]
    read = 0
    for row in rows:
        try:
            parse(row, form, {}, CHAT_FORMS)
        except BadRowError:
            continue
        read += 1
    assert 0 < read < len(rows)


def wrong(**values: Any) -> dict[str, Any]:
    return {**PAIR, **values}


@pytest.mark.parametrize(
    ("row", "form", "why"),
    [
        ({"prompt": "Q?", "completion": "a", "label": -1}, "unpaired", "label is -1"),
        ({"prompt": "Q?", "completion": "a", "label": 4}, "unpaired", "label is 4"),
        (wrong(prompt=" "), "prompt_strings", "prompt is empty"),
        (wrong(chosen=str([{"role": "assistant", "content": "a"}])), "prompt_strings", "as text"),
        (wrong(prompt=json.dumps([{"from": "human", "value": "a"}])), "prompt_strings", "as text"),
        (wrong(chosen="\n\nHuman: Q?\n\nAssistant: good"), "prompt_strings", "transcript"),
        (wrong(prompt="See <image>", images=[]), "prompt_strings", "1 <image> markers for 0 images"),
        (wrong(images=["data:image/png;base64,?"]), "prompt_strings", "not base64"),
        ({"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "a", "weight": 0}]},
         "messages", "weight 0"),
        ({"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "a", "loss": 0.5}]},
         "messages", "trained on"),
        ({**SAME["sharegpt"], "chosen": {"from": "gpt", "value": [{"type": "image", "image": "a.png"}]}},
         "sharegpt", "cannot hold images"),
    ],
)  # fmt: skip
def test_a_row_that_would_be_another_is_refused(row: dict[str, Any], form: str, why: str) -> None:
    with pytest.raises(BadRowError, match=why):
        parse(row, form, {}, CHAT_FORMS)


def test_what_stands_beside_an_instruction_or_inside_an_input_is_read() -> None:
    row = {**SAME["instruction_responses"], "input": "Text.", "history": [["a", "b"]]}
    found = parse(row, "instruction_responses", {})
    assert [turn["content"] for turn in found.messages] == ["Be brief.", "a", "b", "Q?\nText."]
    tools = [{"name": "f"}]
    row = {**SAME["openai"], "input": {**SAME["openai"]["input"], "tools": tools}}
    assert list(parse(row, "openai", {}).tools) == tools


def test_a_prompt_that_is_a_transcript_becomes_its_turns() -> None:
    asked = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Q?\n\nAssistant:"
    found = parse(wrong(prompt=asked), "prompt_strings", {})
    assert [(turn["role"], turn["content"]) for turn in found.messages] == [
        ("user", "Hi"), ("assistant", "Hello"), ("user", "Q?"),
    ]  # fmt: skip


@pytest.mark.parametrize("system", ["You are careful.", "System: You are careful.", "\n\nYou are careful."])
def test_what_stands_before_a_transcript_is_the_systems(system: str) -> None:
    """Anthropic's own prompts began so; the whole was trained as one turn of the user."""
    asked = f"{system}\n\nHuman: Q?\n\nAssistant:"
    turns = [{"role": "system", "content": "You are careful."}, {"role": "user", "content": "Q?"}]
    assert parse(wrong(prompt=asked), "prompt_strings", {}).messages == turns
    sides = {side: f"{asked} {side}" for side in ("chosen", "rejected")}
    found = parse(sides, "implicit_strings", {})
    assert isinstance(found, Preference)
    assert (found.messages, found.chosen, found.rejected) == (turns, "chosen", "rejected")
    plain = "Go on:\n\nAssistant:"
    assert parse(wrong(prompt=plain), "prompt_strings", {}).messages == [{"role": "user", "content": plain}]


def test_no_picture_may_be_written_as_empty_text_or_null() -> None:
    for images in ({"images": [None]}, {"image": ""}, {"images": ["", None]}, {"images": ""}):
        assert parse(wrong(**images), "prompt_strings", {}).images == ()


def test_roles_are_read_without_case() -> None:
    turns = [{"role": "User", "content": "Q?"}, {"role": "AI", "content": "a"}]
    assert parse({"messages": turns}, "messages", {}, CHAT_FORMS).messages == [{"role": "user", "content": "Q?"}]
    with pytest.raises(BadRowError, match="no known role"):
        parse({"messages": turns}, "messages", {"user": "user", "assistant": "AI"}, CHAT_FORMS)


def test_an_image_in_a_data_url_is_its_bytes() -> None:
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    found = parse(wrong(images=[url]), "prompt_strings", {})
    assert isinstance(found, Preference)
    assert found.images == (buffer.getvalue(),)


def test_a_turn_of_weight_0_is_not_trained(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1},
    ]  # fmt: skip
    write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}])
    path, _ = write_chats(ChatSource(dataset=str(tmp_path / "x.jsonl")), tmp_path / "o", tmp_path / "bad.json")
    (row,) = read_jsonl(path)
    assert TrainedTurns(train_on="all_assistant_turns").places(row["messages"]) == [3]


def written(path: Path, **settings: Any) -> list[dict[str, Any]]:
    source = PairSource(dataset=str(path), **settings)
    return list(read_jsonl(write_pairs(source, path.parent / "o", path.parent / "bad.json")[0]))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.csv", "prompt,chosen,rejected,system\nq,a,b\n", "x.csv:2"),
        ("x.csv", 'prompt,chosen,rejected\nq,a,"b\nq2,a,b\n', "quote that is not closed"),
        ("x.csv", "prompt,chosen,rejected,chosen\nq,a,b,c\n", "stands there twice"),
        ("x.jsonl", '{"prompt": "q", "chosen": "a", "chosen": "z", "rejected": "b"}\n', "'chosen' stands there twice"),
        ("x.jsonl", "", "give a file that has rows"),
        ("x.jsonl.gz", "no gzip", "not JSON"),
        ("x.parquet", "no table", "cannot read the file"),
        ("x.arrow", "no table", "cannot read the file"),
    ],
)
def test_a_file_that_would_give_other_rows_is_refused(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=why):
        written(tmp_path / name)


def test_json_may_be_lines_and_labels_numbers_of_a_table(tmp_path: Path) -> None:
    rows = [{"prompt": "Q?", "completion": text, "label": label} for text, label in (("a", 1.0), ("b", 0.0))]
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, rows)))
    assert [row["chosen"]["value"] for row in written(tmp_path / "x.json")] == ["a"]


def test_a_column_that_no_row_has_is_refused_and_keys_of_messages_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "Why is the sky blue in the morning?"
    chosen, rejected = ([{"role": "assistant", "content": f"{asked} {text}", "score": 1}] for text in ("a", "b"))
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": asked, "chosen": chosen, "rejected": rejected}])
    written(tmp_path / "x.jsonl")
    told = capsys.readouterr().out
    assert "not used: chosen.score, rejected.score" in told
    assert "1 rows have answers that begin with the whole prompt" in told
    with pytest.raises(InputError, match="systen"):
        written(tmp_path / "x.jsonl", columns={"system": "systen"})


def test_nulls_that_a_column_fills_in_are_not_trained(tmp_path: Path) -> None:
    """Two calls with other arguments: the column's type gives each the other's, as null."""
    calls = [{"function": {"name": "f", "arguments": given}} for given in ({"city": "Oslo"}, {"day": 3})]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Q{place}?"}],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": "bad", "tool_calls": None}],
        }
        for place, call in enumerate(calls)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = [row["chosen"]["tool_calls"][0]["function"]["arguments"] for row in written(tmp_path / "x.parquet")]
    assert found == [{"city": "Oslo"}, {"day": 3}]


@pytest.mark.parametrize("first", [{**PAIR, "prompt": None}, {**PAIR, "chosen": None}, {}])
def test_a_first_row_that_lacks_a_value_does_not_settle_the_form(tmp_path: Path, first: dict[str, Any]) -> None:
    """Without its prompt it looks like transcripts (HH-RLHF): all other rows were left out, or none was read at all."""
    write_jsonl(tmp_path / "a.jsonl", [first, PAIR, {**PAIR, "prompt": "R?"}])
    file = str(tmp_path / "a.jsonl")
    source = PairSource(dataset=file, on_bad_row="drop")
    train, _ = write_pairs(source, tmp_path / "out", tmp_path / "bad.json")
    assert [row["conversations"][0]["value"] for row in read_jsonl(train)] == ["Q?", "R?"]
    with pytest.raises(InputError, match=r"a.jsonl:1(.|\n)*prompt_strings"):
        write_pairs(PairSource(dataset=file), tmp_path / "out", tmp_path / "bad.json")


def test_a_column_system_prompt_is_the_systems(tmp_path: Path) -> None:
    """OpenOrca's name of it: such prompts were trained on without it, as a line of the log told."""
    said, asked = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q?"}
    row = {"system_prompt": "Be kind.", "prompt": "Q?", "chosen": "good", "rejected": "bad"}
    assert parse(row, "prompt_strings", {}).messages == [said, asked]
    assert parse({**row, "system_prompt": None}, "prompt_strings", {}).messages == [asked]
    assert parse({**row, "system": "Be kind."}, "prompt_strings", {}).messages == [said, asked]
    with pytest.raises(BadRowError, match="say different things"):
        parse({**row, "system": "Be short."}, "prompt_strings", {})
    write_jsonl(tmp_path / "x.jsonl", [{"system_prompt": "Be kind.", "question": "Q?", "response": "A."}])
    columns = {"prompt": "question", "completion": "response"}
    with pytest.raises(InputError, match=r"columns=\{prompt: question, completion: answer\}$"):
        write_chats(validate(ChatSource, {"dataset": str(tmp_path / "x.jsonl")}), tmp_path, tmp_path / "bad.json")
    source = validate(ChatSource, {"dataset": str(tmp_path / "x.jsonl"), "columns": columns})
    train, _ = write_chats(source, tmp_path, tmp_path / "bad.json")
    assert [row["messages"] for row in read_jsonl(train)] == [[said, asked, {"role": "assistant", "content": "A."}]]
