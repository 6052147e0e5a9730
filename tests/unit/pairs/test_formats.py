"""Every form of preference data, by hand-made rows with known answers, the shared files with known counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import identity, validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.pairs.chats import ChatSource, write_chats
from prefmill.pairs.formats import detect, parse
from prefmill.pairs.forms import Preference
from prefmill.pairs.sources import PairSource
from prefmill.pairs.turns import BadRowError
from prefmill.pairs.writing import write_pairs
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.row_files import file_rows
from prefmill.training.data import read_pairs

USER, SYSTEM = {"role": "user", "content": "Q?"}, {"role": "system", "content": "Be brief."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def typed(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": 1.0}


# Every row says the same: system "Be brief.", user "Q?", chosen "good", rejected "bad".
SAME: dict[str, dict[str, Any]] = {
    "trl_messages": {"prompt": [SYSTEM, USER], "chosen": [said("good")], "rejected": [said("bad")]},
    "prompt_and_messages": {
        "prompt": "Q?", "prompt_id": "x", "score_chosen": 8.0, "score_rejected": 3.0,
        "chosen": [SYSTEM, USER, said("good")], "rejected": [SYSTEM, USER, said("bad")],
    },
    "prompt_strings": {"system": "Be brief.", "prompt": "Q?", "chosen": "good", "rejected": "bad"},
    "system_question": {"system": "Be brief.", "question": "Q?", "chosen": "good", "rejected": "bad"},
    "system_input": {"system": "Be brief.", "input": "Q?", "chosen": "good", "rejected": "bad", "rating": [9, 2]},
    "instruction_responses": {
        "system": "Be brief.", "instruction": "Q?", "chosen_response": "good", "rejected_response": "bad",
    },
    "alpaca": {"system": "Be brief.", "instruction": "Q?", "input": "", "chosen": "good", "rejected": "bad"},
    "sharegpt": {
        "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Q?"}],
        "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"},
    },
    "prompt_messages": {"prompt": [SYSTEM, USER], "chosen": "good", "rejected": "bad"},
    "axolotl": {"messages": [SYSTEM, USER], "chosen": said("good"), "rejected": said("bad")},
    "ms_swift": {"messages": [SYSTEM, USER, said("good")], "rejected_response": "bad"},
    "openai": {
        "input": {"messages": [SYSTEM, USER], "tools": []},
        "preferred_output": [said("good")], "non_preferred_output": [said("bad")],
    },
    "llamafactory_v1": {
        "chosen_messages": [typed("system", "Be brief."), typed("user", "Q?"), typed("assistant", "good")],
        "rejected_messages": [typed("system", "Be brief."), typed("user", "Q?"), typed("assistant", "bad")],
    },
    "implicit_messages": {"chosen": [SYSTEM, USER, said("good")], "rejected": [SYSTEM, USER, said("bad")]},
}  # fmt: skip


def source(path: Path, **keys: Any) -> PairSource:
    return validate(PairSource, {"dataset": str(path), **keys})


def written(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> list[Any]:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train, _ = write_pairs(source(tmp_path / "rows.jsonl", **keys), tmp_path / "own", tmp_path / "bad_rows.json")
    return list(read_pairs(train))


@pytest.mark.parametrize("form", SAME)
def test_the_same_preference_in_every_form(form: str) -> None:
    row = SAME[form]
    assert detect(row, "f:1") == form
    assert parse(row, form, {}) == Preference([SYSTEM, USER], "good", "bad")


def test_labels_without_two_answers_to_a_prompt_say_what_can_be_done(tmp_path: Path) -> None:
    """As KTO takes them: every prompt stands once. The way that the error names is taken."""
    rows = [{"prompt": f"P{n}", "completion": f"c{n}", "label": n % 3 == 0} for n in range(6)]
    with pytest.raises(InputError, match=r"4 rows: its prompt has bad(.|\n)*2 rows: its prompt has good(.|\n)*sft"):
        written(tmp_path, rows)
    chats = validate(ChatSource, {"dataset": str(tmp_path / "rows.jsonl")})
    train, _ = write_chats(chats, tmp_path / "sft", tmp_path / "bad.json")
    assert [row["messages"][1]["content"] for row in read_jsonl(train)] == ["c0", "c3"]


def test_bad_answers_by_llamafactorys_label_are_not_learnt(tmp_path: Path) -> None:
    rows = [{"messages": [USER, said(f"c{n}")], "kto_tag": n == 1} for n in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"kto_tag \(bool\)(.|\n)*unpaired_messages: label, messages"):
        write_chats(
            validate(ChatSource, {"dataset": str(tmp_path / "rows.jsonl")}), tmp_path / "a", tmp_path / "bad.json"
        )
    chats = validate(ChatSource, {"dataset": str(tmp_path / "rows.jsonl"), "columns": {"label": "kto_tag"}})
    train, _ = write_chats(chats, tmp_path / "sft", tmp_path / "bad.json")
    assert [row["messages"][1]["content"] for row in read_jsonl(train)] == ["c1"]


def test_other_ways_to_say_it() -> None:
    no_system = Preference([USER], "good", "bad")
    assert parse({"prompt": "Q?", "chosen": [said("good")], "rejected": [said("bad")]}, "prompt_and_messages", {}) == (
        no_system
    )
    repeated = {"prompt": [USER], "chosen": [USER, said("good")], "rejected": [USER, said("bad")]}
    assert parse(repeated, "trl_messages", {}) == no_system
    human = {"prompt": [{"from": "human", "value": "Q?"}], "chosen": [{"from": "gpt", "value": "good"}],
             "rejected": [{"from": "gpt", "value": "bad"}]}  # fmt: skip
    assert parse(human, "trl_messages", {}) == no_system
    alpaca = {"instruction": "Q", "input": "it?", "history": [["a", "b"]], "chosen": "good", "rejected": "bad"}
    assert parse(alpaca, "alpaca", {}).messages == [
        {"role": "user", "content": "a"}, said("b"), {"role": "user", "content": "Q\nit?"},
    ]  # fmt: skip
    tagged = {"conversations": [{"who": "A", "text": "Q?"}], "chosen": {"who": "B", "text": "good"},
              "rejected": {"who": "B", "text": "bad"}}  # fmt: skip
    tags = {"role": "who", "content": "text", "user": "A", "assistant": "B"}
    assert parse(tagged, "sharegpt", tags) == no_system


def test_hh_rlhf_strings() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nNot a turn: this.\n\nHuman: Q?\n\nAssistant:"
    row = {"chosen": f"{start} good", "rejected": f"{start} bad"}
    assert detect(row, "f:1") == "implicit_strings"
    found = parse(row, "implicit_strings", {})
    assert isinstance(found, Preference)
    assert found.messages == [
        {"role": "user", "content": "Hi"}, said("Hello.\n\nNot a turn: this."), {"role": "user", "content": "Q?"},
    ]  # fmt: skip
    assert (found.chosen, found.rejected) == ("good", "bad")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "good", "rejected": "bad"}, "no prompt of its own"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "share no prompt"),
        ({"chosen": [USER, said("a")], "rejected": [USER, said("a")]}, "are the same"),
        ({"chosen": [USER, said("a")], "rejected": [USER, said("b"), USER, said("c")]}, "must be one assistant turn"),
        ({"prompt": "Q?", "chosen": "good", "rejected": "  "}, "an answer is empty"),
        ({"prompt": "Q?", "chosen": "good", "rejected": "good"}, "are the same"),
        ({"prompt": [USER, said("x")], "chosen": [said("a")], "rejected": [said("b")]}, "does not end with a user"),
        ({"prompt": [{"role": "wizard", "content": "Q"}], "chosen": [said("a")], "rejected": [said("b")]}, "wizard"),
        ({"prompt": "Other?", "chosen": [USER, said("a")], "rejected": [USER, said("b")]}, "not the last user turn"),
        ({"prompt": "<image>Q", "images": ["a", "b"], "chosen": "x", "rejected": "y"}, "1 <image> markers for 2"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": [said("a")],
          "rejected": [said("b")]}, "an image part has no image"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}], "chosen": [said("a")],
          "rejected": [said("b")]}, "parts are text or images"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(BadRowError, match=why):
        parse(row, detect(row, "f:1"), {})
    write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=rf"rows\.jsonl:1(.|\n)*{why}(.|\n)*on_bad_row=drop"):
        write_pairs(source(tmp_path / "rows.jsonl"), tmp_path / "own", tmp_path / "bad.json")


def test_unknown_and_ambiguous_rows_list_the_forms_and_the_keys() -> None:
    with pytest.raises(InputError, match=r"text \(str\), stars \(int\)(.|\n)*docs/bring-your-own-preferences.md"):
        detect({"text": "a", "stars": 5}, "f:1")
    with pytest.raises(InputError, match=r"expected: helpsteer2: prompt, response_1, response_2, preference_strength;"):
        detect({"prompt": "a", "response_1": "b", "response_2": "c", "strength": 1}, "f:1")
    both = {"prompt": "a", "question": "b", "chosen": "x", "rejected": "y"}
    with pytest.raises(InputError, match="pair_format=prompt_strings"):
        detect(both, "f:1")
    assert parse(both, "system_question", {}).messages == [{"role": "user", "content": "b"}]
    with pytest.raises(InputError, match="image pairs go to"):
        detect({"caption": "a", "jpg_0": b"", "jpg_1": b"", "label_0": 0.5, "label_1": 0.5}, "f:1")


def test_a_config_names_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="did you mean 'sharegpt'"):
        source(path, pair_format="sharegtp")
    with pytest.raises(ConfigError, match="dataset or dataset_file"):
        source(path, dataset_file=str(path))
    with pytest.raises(ConfigError, match="unknown tags speaker"):
        source(path, tags={"speaker": "who"})
    with pytest.raises(ConfigError, match="number of rows"):
        source(path, subset="default")
    for keys in ({"split": "test"}, {"dataset_revision": "main"}):
        with pytest.raises(ConfigError, match="a file has none"):
            source(path, **keys)


def test_the_content_of_a_file_is_the_identity_not_its_path(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [SAME["prompt_strings"]])
    assert identity(source(tmp_path / "a.jsonl")) == identity(source(tmp_path / "b.jsonl"))
    write_jsonl(tmp_path / "b.jsonl", [SAME["trl_messages"]])
    assert identity(source(tmp_path / "a.jsonl")) != identity(source(tmp_path / "b.jsonl"))


def test_bad_rows_can_be_left_out_and_are_listed(tmp_path: Path) -> None:
    rows = [SAME["prompt_strings"], {"prompt": "Q?", "chosen": "a", "rejected": ""}, {"other": 1}]
    assert [pair.chosen for pair in written(tmp_path, rows, on_bad_row="drop")] == ["good"]
    listed = json.loads((tmp_path / "bad_rows.json").read_text())
    assert [Path(row["where"]).name for row in listed] == ["rows.jsonl:2", "rows.jsonl:3"]
    with pytest.raises(InputError, match="no pairs to train on"):
        written(tmp_path, rows[1:], on_bad_row="drop", pair_format="prompt_strings")


def test_pairs_of_one_prompt_share_a_group_and_names_stay_apart(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "P", "chosen": f"c{n}", "rejected": "r"} for n in range(2)]
    pairs = written(tmp_path, [*rows, {"prompt": "other", "chosen": "c", "rejected": "r"}])
    assert [pair.pair_id for pair in pairs] == ["a", "a~2", "row-2"]
    assert pairs[0].group == pairs[1].group != pairs[2].group


def test_columns_are_renamed_all_at_once(tmp_path: Path) -> None:
    rows = [{"ask": "Q?", "rejected": "good", "chosen": "bad"}]
    columns = {"prompt": "ask", "chosen": "rejected", "rejected": "chosen"}
    (pair,) = written(tmp_path, rows, columns=columns)
    assert (pair.messages, pair.chosen, pair.rejected) == ([USER], "good", "bad")


def test_held_out_prompts_take_all_their_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"P{n // 3}", "chosen": f"c{n}", "rejected": "r"} for n in range(300)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train, val = write_pairs(source(tmp_path / "rows.jsonl", val_fraction=0.2), tmp_path / "own", tmp_path / "bad")
    assert val is not None
    sides = [{pair.group for pair in read_pairs(path)} for path in (train, val)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 100
    assert 10 <= len(sides[1]) <= 30


def test_a_number_as_subset_draws_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"P{n}", "chosen": "c", "rejected": "r"} for n in range(50)]
    drawn = [pair.pair_id for pair in written(tmp_path, rows, subset=10)]
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn, key=lambda name: int(name.removeprefix("row-")))
    assert drawn == [pair.pair_id for pair in written(tmp_path, rows, subset=10)]
    assert drawn != [pair.pair_id for pair in written(tmp_path, rows, subset=10, seed=1)]
    with pytest.raises(InputError, match="1 to 50"):
        written(tmp_path, rows, subset=51)


def test_unpaired_judgements_become_pairs_of_the_same_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "P", "completion": "g1", "label": True}, {"prompt": "P", "completion": "g2", "label": True},
        {"prompt": "P", "completion": "b", "label": False}, {"prompt": "alone", "completion": "g", "label": True},
    ]  # fmt: skip
    pairs = written(tmp_path, rows)
    assert [(pair.pair_id, pair.chosen, pair.rejected) for pair in pairs] == [
        ("row-0:row-2", "g1", "b"), ("row-1:row-2", "g2", "b"),
    ]  # fmt: skip
    (listed,) = json.loads((tmp_path / "bad_rows.json").read_text())
    assert listed["what"] == "its prompt has good answers only: no pair"
    chats = [
        {"messages": [USER, said("good")], "label": True}, {"messages": [USER, said("bad")], "label": False},
    ]  # fmt: skip
    (pair,) = written(tmp_path, chats)
    assert (pair.messages, pair.chosen, pair.rejected) == ([USER], "good", "bad")


def test_one_answer_judged_both_ways_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "P", "completion": "a", "label": True}, {"prompt": "P", "completion": " a", "label": False}]
    with pytest.raises(InputError, match="2 rows: its answers say the same"):
        written(tmp_path, rows)


def test_images_of_every_form(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    parts = [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "and"},
             {"type": "image_url", "image_url": {"url": "b.png"}}]  # fmt: skip
    rows = [
        {"prompt": "<image>and<image>", "images": ["a.png", "b.png"], "chosen": "c", "rejected": "r"},
        {"prompt": "and", "images": ["a.png", "b.png"], "chosen": "c", "rejected": "r"},
    ]
    marked, unmarked = written(tmp_path, rows)
    assert marked.messages[0]["content"] == "<image>and<image>"
    assert unmarked.messages[0]["content"] == "<image><image>and", "where TRL puts them"
    images = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert marked.images == unmarked.images == tuple(images)
    (pair,) = written(tmp_path, [{"prompt": [{"role": "user", "content": parts}], "chosen": [said("c")],
                                  "rejected": [said("r")]}])  # fmt: skip
    assert (pair.messages, pair.images) == (marked.messages, marked.images)
    turns = [[typed("user", ""), typed("assistant", text)] for text in ("c", "r")]
    for chat in turns:
        chat[0]["content"] = parts
    (pair,) = written(tmp_path, [{"chosen_messages": turns[0], "rejected_messages": turns[1]}])
    assert (pair.messages, pair.images) == (marked.messages, marked.images)
    with pytest.raises(InputError, match=r"no such image(.|\n)*image_folder"):
        written(tmp_path, [{"prompt": "Q", "image": "https://example.com/a.png", "chosen": "c", "rejected": "r"}])


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [("llamafactory_dpo_en_demo.json", "sharegpt", 300), ("llamafactory_v1_dpo_demo.jsonl", "llamafactory_v1", 10)],
)
def test_shared_pair_files(shared_data: Path, tmp_path: Path, name: str, form: str, count: int) -> None:
    path = shared_data / "pairs" / name
    assert {detect(row.values, row.where) for row in file_rows(path)} == {form}
    train, _ = write_pairs(source(path), tmp_path, tmp_path / "bad.json")
    pairs = list(read_pairs(train))
    assert len(pairs) == len({pair.pair_id for pair in pairs}) == count
    if form == "sharegpt":
        raw = json.loads(path.read_text())
        turns = Counter(len(pair.messages) for pair in pairs)
        assert turns == {1: 114, 2: 80, 5: 57, 7: 46, 9: 1, 13: 1, 3: 1}
        assert sum(pair.messages[0]["role"] == "system" for pair in pairs) == 80
        assert [pair.chosen for pair in pairs] == [row["chosen"]["value"] for row in raw]
    else:
        assert {tuple(turn["role"] for turn in pair.messages) for pair in pairs} == {("system", "user")}


def test_shared_chats_without_a_preference_are_refused(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "pairs" / "llamafactory_v1_multimodal_demo.jsonl"
    with pytest.raises(InputError, match=r"multimodal_demo\.jsonl:1(.|\n)*messages \(list\)"):
        write_pairs(source(path), tmp_path, tmp_path / "bad.json")


def test_files_of_every_kind_and_hub_folders(tmp_path: Path) -> None:
    import gzip

    from datasets import Dataset

    rows = [{"prompt": "Q?", "chosen": "good", "rejected": "bad"}] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "b.jsonl", rows)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    (tmp_path / "hub").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected\nQ?,good,bad\nQ?,good,bad\n")
    for name in ("a.json", "b.jsonl", "c.jsonl.gz", "d.csv", "hub/train.parquet"):
        assert [row.values for row in file_rows(tmp_path / name)] == rows, name
    hub = validate(PairSource, {"dataset": str(tmp_path / "hub")})
    train, _ = write_pairs(hub, tmp_path / "own", tmp_path / "bad.json")
    assert [row["chosen"]["value"] for row in read_jsonl(train)] == ["good", "good"]
    with pytest.raises(InputError, match="cannot load the dataset"):
        write_pairs(
            validate(PairSource, {"dataset": str(tmp_path / "hub"), "split": "nosuch"}), tmp_path / "x", tmp_path
        )
    with pytest.raises(InputError, match=r"expected: +\.jsonl"):
        list(file_rows(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n\n{"a"\n')
    with pytest.raises(InputError, match=r"b\.jsonl:3"):
        list(file_rows(tmp_path / "b.jsonl"))
