"""Templates as people give them: a file or text of their own, variables, a clock; and what is trained with them."""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import identity, validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.demo.tokenizer import train_chat_tokenizer
from prefmill.families.causal.chat import encode, encode_turns, prompt_text
from prefmill.families.causal.chat_rows import TrainedTurns
from prefmill.families.causal.dpo import load_groups
from prefmill.families.causal.loading import load_tokenizer
from prefmill.families.causal.sft import load_chats
from prefmill.families.causal.templates import ChatTemplate, recorded_day
from prefmill.pairs.chats import ChatSource, write_chats
from prefmill.pairs.sources import PairSource
from prefmill.pairs.writing import write_pairs
from prefmill.store.jsonl import read_jsonl
from stages.dpo import DpoConfig
from stages.sft import SftConfig
from tests.conftest import REPOSITORY
from tests.e2e.training_artifacts import make_task

CASES = REPOSITORY.parent / "shared" / "cases" / "text"
USER = [{"role": "user", "content": "Say yes."}]
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ENDS = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS = TURN + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}" + ENDS
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + TURN + "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}" + ENDS
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_chat_tokenizer(
        ["Say yes. Yes, of course. No. Answer in one word. Tree gives shade."] * 3, 400
    ).save_pretrained(path)
    return path


def case(name: str) -> Path:
    if not CASES.is_dir():
        pytest.skip("needs the cases beside the checkout (shared/cases/text)")
    return CASES / name


def opened(folder: Path, today: date | None = None, **keys: Any) -> Any:
    return load_tokenizer(str(folder), template=validate(ChatTemplate, keys), today=today)


def test_a_file_or_a_text_takes_the_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    text = "{{ messages[0].content }}<|im_end|>"
    (tmp_path / "mine.jinja").write_text(text)
    (tmp_path / "marked.jinja").write_text(text, "utf-8-sig")  # each prompt began with its mark
    for given in (text, str(tmp_path / "mine.jinja"), str(tmp_path / "marked.jinja")):
        assert prompt_text(opened(folder, chat_template=given), USER) == "Say yes.<|im_end|>"
    assert prompt_text(opened(folder), USER) != "Say yes.<|im_end|>"


def test_a_templates_content_counts_and_a_default_changes_no_identity(tmp_path: Path) -> None:
    assert identity(ChatTemplate()) == {}
    said = []
    for name in ("a.jinja", "b.jinja"):
        (tmp_path / name).write_text("{{ messages }}")
        said.append(identity(validate(ChatTemplate, {"chat_template": str(tmp_path / name)})))
    (tmp_path / "b.jinja").write_text("{{ messages[0] }}")
    assert said[0] == said[1] != identity(validate(ChatTemplate, {"chat_template": str(tmp_path / "b.jinja")}))


def test_variables_are_given_and_go_out_with_the_model_as_defaults(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = (
        "{% macro f() %}{{ mood }}{% endmacro %}\n{{ messages[0].content }}{% for m in messages %}{{ f() }}{% endfor %}"
    )
    values = {"mood": 'it\'s "é" \\ 😀', "n": [1, None, {"a": True}]}
    tokenizer = opened(folder, chat_template=template + "{{ n[1] is none and n[2].a }}", chat_template_kwargs=values)
    assert prompt_text(tokenizer, USER) == f"Say yes.{values['mood']}True"
    tokenizer.save_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.apply_chat_template(USER, tokenize=False) == f"Say yes.{values['mood']}True"
    assert again.apply_chat_template(USER, tokenize=False, mood="x") == "Say yes.xTrue"


def test_a_variable_that_the_template_does_not_read_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`enable_thinking` of a model that has no such switch: its chats stayed as they were, and nothing was said."""
    keys = {
        "chat_template": load_tokenizer(str(folder)).chat_template,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    opened(folder, **keys)
    assert "template reads no enable_thinking" in caplog.text
    caplog.clear()
    opened(folder, **keys | {"chat_template": keys["chat_template"] + "{% if enable_thinking %}{% endif %}"})
    assert not caplog.text


def test_a_day_for_a_template_without_a_clock_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder, template_date="2026-01-02", chat_template="{{ strftime_now('%d') }}")
    assert not caplog.text
    opened(folder, template_date="2026-01-02")
    assert "template_date: no effect" in caplog.text


def test_templates_by_name_without_one_for_every_chat_are_refused(folder: Path, tmp_path: Path) -> None:
    """A folder with `additional_chat_templates` alone: transformers raised in the midst of the first row."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = {"tool_use": TOOLS, "rag": THINKS}
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"rag, tool_use(.|\n)*chat_template=FILE"):
        load_tokenizer(str(tmp_path))
    named = tmp_path / "additional_chat_templates" / "rag.jinja"
    assert prompt_text(opened(tmp_path, chat_template=str(named)), USER).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("template", ["\n  {% if true %}a{% endif %}", "  {% if true %}a{% endif %}", "\n\nb", " b"])
def test_variables_leave_a_templates_white_space_alone(template: str, folder: Path) -> None:
    plain, given = (
        opened(folder, chat_template=template + "{{ '' }}", chat_template_kwargs=kwargs) for kwargs in ({}, {"x": 1})
    )
    assert plain.apply_chat_template(USER, tokenize=False) == given.apply_chat_template(USER, tokenize=False)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "no variables"),
        ({"chat_template_kwargs": {"a b": 1}}, "no variables"),
        ({"template_date": "2026-02-30"}, "day"),
        ({"chat_template": "x.jinja", "chat_template_file": "x.jinja"}, "not both"),
    ],
)
def test_keys_that_say_nothing_are_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate(ChatTemplate, keys)


def test_the_clock_of_a_template_stands_still(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = str(case("template_date.jinja"))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        tokenizer = opened(folder, date(2024, 2, 29), chat_template=template)
        assert "Today is 29 Feb 2024." in prompt_text(tokenizer, USER)
        assert encode(tokenizer, USER, "Yes.")
        assert recorded_day(tokenizer) == {"template_date": "2024-02-29"}
        assert recorded_day(opened(folder, date(2024, 2, 29))) == {}, "a template without a clock"
        said = opened(folder, date(2024, 2, 29), chat_template=template, template_date="2020-01-01")
        assert "Today is 01 Jan 2020." in prompt_text(said, USER)
    finally:
        monkeypatch.undo()
        time.tzset()
    with pytest.raises(InputError, match="reads the clock") as caught:
        opened(folder, chat_template=template)
    assert "template_date=" in str(caught.value.details["fix"])


def test_a_task_remembers_the_day_it_began_on(tmp_path: Path) -> None:
    task = make_task("sft", tmp_path)
    (task.work / "started.json").write_text(json.dumps({"fingerprint": "f", "date": "2024-02-29"}))
    assert make_task("sft", tmp_path).began_on == date(2024, 2, 29)


def labelled(tokenizer: Any, messages: list[dict[str, Any]], **keys: Any) -> list[str]:
    """The runs of tokens that are trained, as text."""
    turns = validate(TrainedTurns, keys)
    ids, trained = encode_turns(tokenizer, messages, turns.places(messages))
    runs: list[list[int]] = []
    for place, (token, learnt) in enumerate(zip(ids, trained, strict=True)):
        if learnt:
            runs += [] if place and trained[place - 1] else [[]]
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


CALL = {"type": "function", "function": {"name": "area", "arguments": {"side": 3}}}
CHAT = [
    *USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Area?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "9"},
    {"role": "assistant", "content": "9."},
]  # fmt: skip


def test_train_on_says_which_turns_are_trained(folder: Path) -> None:
    tokenizer = opened(folder, chat_template=TOOLS)
    first, called, last = (
        "Yes.<|im_end|>\n", '<call>{"name": "area", "arguments": {"side": 3}}</call><|im_end|>\n', "9.<|im_end|>\n"
    )  # fmt: skip
    assert labelled(tokenizer, CHAT) == [called, last]
    assert labelled(tokenizer, CHAT, train_on="last_turn") == [last]
    assert labelled(tokenizer, CHAT, train_on="all_assistant_turns") == [first, called, last]


def test_an_earlier_turn_is_trained_as_the_whole_chat_has_it(folder: Path) -> None:
    """Qwen3's template writes an empty thought before the last answer alone."""
    empty = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    tokenizer = opened(folder, chat_template=TURN + empty + "{{ m.content }}" + ENDS)
    chat = [CHAT[0], CHAT[1], CHAT[2], CHAT[5]]
    trained = labelled(tokenizer, chat, train_on="all_assistant_turns")
    assert trained == ["Yes.<|im_end|>", "<think></think>9.<|im_end|>\n"]


def test_reasoning_is_trained_where_the_template_writes_it_else_refused(folder: Path, tmp_path: Path) -> None:
    source = validate(ChatSource, {"dataset": str(case("reasoning.jsonl"))})
    train, _ = write_chats(source, tmp_path / "own", tmp_path / "bad.json")
    for row in read_jsonl(train):
        (trained,) = labelled(opened(folder, chat_template=THINKS), row["messages"])
        assert trained.startswith(f"<think>{row['messages'][-1]['reasoning_content']}</think>")
        with pytest.raises(InputError, match="drops the answer's reasoning_content"):
            labelled(opened(folder), row["messages"])
    for name in ("thinking", "reasoning"):  # under the names that other templates read
        assert labelled(opened(folder, chat_template=THINKS.replace("reasoning_content", name)), row["messages"]) == [
            trained
        ]


def test_tools_are_trained_as_the_template_writes_them_else_refused(folder: Path, tmp_path: Path) -> None:
    source = validate(ChatSource, {"dataset": str(case("tools.jsonl"))})
    train, _ = write_chats(source, tmp_path / "own", tmp_path / "bad.json")
    rows = list(read_jsonl(train))
    assert rows
    for row in rows:
        tokenizer, last = opened(folder, chat_template=TOOLS), len(row["messages"]) - 1
        ids, _ = encode_turns(tokenizer, row["messages"], [last], row["tools"])
        assert all(tool["function"]["name"] in tokenizer.decode(ids) for tool in row["tools"])
        with pytest.raises(InputError, match="leaves the tools out"):
            encode_turns(opened(folder), row["messages"], [last], row["tools"])
        called = [place for place, turn in enumerate(row["messages"]) if turn.get("tool_calls")]
        with pytest.raises(InputError, match="drops the answer's tool_calls"):
            encode_turns(opened(folder), row["messages"], [*called, last])


def sft_config(**keys: Any) -> SftConfig:
    return validate(SftConfig, {"model_name_or_path": "none", **keys})


def test_the_system_column_is_in_every_prompt(folder: Path, tmp_path: Path) -> None:
    config, task = sft_config(dataset=str(case("system_column.jsonl"))), make_task("sft", tmp_path)
    train, _ = write_chats(config, tmp_path / "own", tmp_path / "bad.json")
    tokenizer = opened(folder)
    rows = load_chats(train, tokenizer, config, task, config)
    assert len(rows) == 4
    assert all("Answer in one word." in tokenizer.decode(row["input_ids"]) for row in rows)


def test_a_row_that_the_template_refuses_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    tokenizer = opened(folder, chat_template=str(case("template_no_system.jinja")))
    task = make_task("sft", tmp_path)
    kinds = [{"messages": [*start, *USER, {"role": "assistant", "content": "Yes."}]}
             for start in ([], [{"role": "system", "content": "Be kind."}])]  # fmt: skip
    path = tmp_path / "rows" / "data.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"id": f"r{n}", **row}) + "\n" for n, row in enumerate(kinds)))
    with pytest.raises(InputError, match="refuses these messages") as caught:
        load_chats(path, tokenizer, sft_config(), task, sft_config())
    assert "row r1" in str(caught.value)
    assert "on_bad_row=drop" in str(caught.value)
    config = sft_config(on_bad_row="drop")
    assert len(load_chats(path, tokenizer, config, task, config)) == 1
    (listed,) = json.loads((task.logs / "bad_rows.json").read_text())
    assert "row r1" in listed["where"]
    path.write_text(json.dumps({"id": "r1", **kinds[1]}) + "\n")
    with pytest.raises(InputError, match="refuses these messages"):  # no row is left: the first one's fault is said
        load_chats(path, tokenizer, config, task, config)


def test_sides_that_a_template_or_a_tokenizer_makes_equal_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    from prefmill.store.jsonl import write_jsonl

    given = json.loads(case("same_after_trim.jsonl").read_text().splitlines()[0])
    inside = {**given, "chosen": "Yes, of  course.", "rejected": "Yes, of course."}  # trimmed by this template alone
    write_jsonl(tmp_path / "x.jsonl", [inside, {**given, "rejected": "No."}])
    template = TURN + "{{ m.content.split() | join(' ') }}" + ENDS
    tokenizer = opened(folder, chat_template=template)
    source = {"dataset": str(tmp_path / "x.jsonl"), "model_name_or_path": "none"}
    train, _ = write_pairs(
        validate(PairSource, {"dataset": source["dataset"]}), tmp_path / "own", tmp_path / "bad.json"
    )
    task = make_task("dpo", tmp_path)
    with pytest.raises(InputError, match="the same tokens") as caught:
        load_groups(train, tokenizer, validate(DpoConfig, source), task)
    assert "row-0" in str(caught.value)
    (group,) = load_groups(train, tokenizer, validate(DpoConfig, {**source, "on_bad_row": "drop"}), task)
    assert len(group.pairs) == 1


def test_a_judges_open_thought_is_closed_before_it_answers(folder: Path) -> None:
    from prefmill.checklist.prompts import _template

    tokenizer = opened(folder, chat_template=str(case("template_open_thought.jinja")))
    assert _template(tokenizer)[1].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "</think>" not in _template(opened(folder))[1]


def test_every_case_of_text_is_named_in_a_test() -> None:
    said = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert {path.name for path in case(".").iterdir() if path.name not in said} == set()
