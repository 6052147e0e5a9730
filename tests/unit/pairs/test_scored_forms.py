"""Published sets of answers with scores, ranks or choices between two: each becomes the pairs that it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.pairs.chats import ChatSource, write_chats
from prefmill.pairs.formats import FORMS, detect, parse
from prefmill.pairs.forms import ScoredAnswers
from prefmill.pairs.turns import BadRowError
from prefmill.store.jsonl import read_jsonl
from tests.unit.pairs.test_formats import SAME, USER, said, written

# Published sets, by the names and the meaning that their cards give: user "Q?", the better answer "good", else "bad".
SCORED: dict[str, list[dict[str, Any]]] = {
    "ultrafeedback": [{"source": "x", "instruction": "Q?", "models": ["m", "n"], "completions": [
        {"model": "m", "response": "bad", "overall_score": 4.0},
        {"model": "n", "response": "good", "overall_score": 7.5},
    ]}],
    "nectar": [{"prompt": "\n\nHuman: Q?\n\nAssistant: ", "turns": 1, "answers": [
        {"answer": "bad", "model": "m", "rank": 2.0}, {"answer": "good", "model": "n", "rank": 1.0},
    ]}],
    "helpsteer": [{"prompt": "Q?", "response": "bad", "helpfulness": 1, "verbosity": 4},
                  {"prompt": "Q?", "response": "good", "helpfulness": 3, "verbosity": 0}],
    "webgpt": [{"question": {"dataset": "eli5", "id": "1", "full_text": "Q?"}, "answer_0": "good", "answer_1": "bad",
                "score_0": 0.5, "score_1": -0.5}],
    "helpsteer2": [{"prompt": "Q?", "response_1": "good", "response_2": "bad", "preference_strength": -2}],
    "helpsteer3": [{"context": [USER], "response1": "bad", "response2": "good", "overall_preference": 1}],
    "shp": [{"post_id": "a", "history": "Q?", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9}],
    "safe_rlhf": [{"prompt": "Q?", "response_0": "bad", "response_1": "good", "better_response_id": 1}],
    "alpaca_farm": [{"instruction": "Q?", "input": "", "output_1": "bad", "output_2": "good", "preference": 2}],
    "summaries": [{"info": {"id": "t", "subreddit": "x", "title": "T", "post": "Q?"}, "choice": 1, "split": "train",
                   "summaries": [{"text": "bad", "policy": "p"}, {"text": "good", "policy": "q"}]}],
    "arena_lists": [{"model_a": "m", "prompt": '["Q?"]', "response_a": '["bad"]', "response_b": '["good"]',
                     "winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0"}],
    "arena": [{"conversation_a": [USER, said("bad")], "conversation_b": [USER, said("good")], "winner": "model_b"}],
}  # fmt: skip
TLDR = "SUBREDDIT: r/x\n\nTITLE: T\n\nPOST: Q?\n\nTL;DR:"  # as the set's authors asked their models


def test_every_form_has_its_test() -> None:
    assert set(FORMS) - set(SAME) - set(SCORED) == {"implicit_strings", "unpaired", "unpaired_messages"}


@pytest.mark.parametrize("form", SCORED)
def test_the_same_preference_in_every_set_of_scores(form: str, tmp_path: Path) -> None:
    """What is better is as the sets' own cards say it: the lower rank, the negative strength, labels of 1 for A."""
    rows = SCORED[form]
    assert {detect(row, "f:1") for row in rows} == {form}
    (pair,) = written(tmp_path, rows)
    asked = [{**USER, "content": TLDR}] if form == "summaries" else [USER]
    assert (pair.messages, pair.chosen, pair.rejected) == (asked, "good", "bad")
    chats = validate(ChatSource, {"dataset": str(tmp_path / "rows.jsonl")})
    train, _ = write_chats(chats, tmp_path / "sft", tmp_path / "bad.json")
    assert [row["messages"] for row in read_jsonl(train)] == [[*asked, said("good")]]


@pytest.mark.parametrize("form", ["ultrafeedback", "alpaca_farm"])
def test_the_input_of_an_instruction_is_part_of_the_prompt(form: str) -> None:
    """It was taken for read, and left out without a word."""
    row = {**SCORED[form][0], "input": "le chat", "history": [["Hi", "Hello"]], "system": "Be brief."}
    alpaca = {"instruction": "Q?", "chosen": "a", "rejected": "b"} | {
        key: row[key] for key in ("input", "history", "system")
    }
    assert parse(row, form, {}).messages == parse(alpaca, "alpaca", {}).messages
    assert parse(row, form, {}).messages[-1] == {"role": "user", "content": "Q?\nle chat"}


@pytest.mark.parametrize("form", SCORED)
def test_a_score_that_is_none_is_the_rows_fault(form: str) -> None:
    key, item = {"ultrafeedback": ("overall_score", "completions"), "nectar": ("rank", "answers")}.get(form, ("", ""))
    row = SCORED[form][0]
    wrong = {**row, item: [{**answer, key: "many"} for answer in row[item]]} if item else {
        **row, list(FORMS[form].needs)[-1]: "many",
    }  # fmt: skip
    with pytest.raises(BadRowError, match="'many'; expected"):
        parse(wrong, form, {})


@pytest.mark.parametrize(
    ("form", "changes"),
    [("helpsteer2", {"preference_strength": 0}), ("arena_lists", {"winner_model_b": 0, "winner_tie": 1}),
     ("arena", {"winner": "tie (bothbad)"}), ("arena", {"winner": "tie", "conversation_b": [USER, said("good")]}),
     ("webgpt", {"score_1": 0.5})],
)  # fmt: skip
def test_ties_are_counted_and_listed(
    form: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(written(tmp_path, [*SCORED[form], {**SCORED[form][0], **changes}])) == 1
    assert "1 ties" in capsys.readouterr().out
    assert [row["what"] for row in json.loads((tmp_path / "bad_rows.json").read_text())] == ["a tie: no pair"]
    with pytest.raises(InputError, match=r"1 rows: a tie(.|\n)*higher score") as caught:
        written(tmp_path, [{**SCORED[form][0], **changes}])
    assert "sft" not in str(caught.value), "it would refuse the file too"


def test_each_answer_is_held_against_each_of_a_lower_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"a": 9.0, "b": 7.5, "c": 7.5, "d": 2.0}
    completions = [
        {"response": said, "overall_score": score, "fine-grained_score": -score, "model": "m"}
        for said, score in scores.items()
    ]
    row = {"instruction": "Q?", "completions": completions, "models": ["m"], "id": "x"}
    # As InstructGPT (2022) takes a ranking: all pairs of k answers, without those that are equal.
    expected = {(one, other) for one in scores for other in scores if scores[one] > scores[other]}
    pairs = written(tmp_path, [row])
    assert {(pair.chosen, pair.rejected) for pair in pairs} == expected
    assert len(pairs) == 5
    assert pairs[0].pair_id == "x:0:1"
    told = capsys.readouterr().out
    assert "1 ties" in told
    assert "not used: completions.fine-grained_score, completions.model, models\n" in told
    other = written(tmp_path, [row], columns={"overall_score": "fine-grained_score"})
    assert {(pair.rejected, pair.chosen) for pair in other} == expected
    with pytest.raises(InputError, match="no row has"):
        written(tmp_path, [row], columns={"overall_score": "score"})


def test_mt_bench_is_judged_up_to_a_turn_and_helpsteers_prompts_are_transcripts() -> None:
    more = [{"role": "user", "content": "And?"}, said("more")]
    row = {**SCORED["arena"][0], "turn": 1}
    row |= {key: [*row[key], *more] for key in ("conversation_a", "conversation_b")}
    assert parse(row, "arena", {}) == ScoredAnswers([USER], ("bad", "good"), (-1, 0))
    assert "turn" in FORMS["arena"].keys
    for label in (True, 1, 1.0, "1"):
        assert parse({**SCORED["shp"][0], "labels": label}, "shp", {}).scores == (1, 0)
    with pytest.raises(BadRowError, match="share no prompt"):
        parse({**row, "turn": 2}, "arena", {})
    asked = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nQ?"
    turns = parse({**SCORED["helpsteer2"][0], "prompt": asked}, "helpsteer2", {}).messages
    assert turns == [{"role": "user", "content": "Hi"}, said("Hello"), USER]


@pytest.mark.parametrize(
    ("form", "changes", "fault"),
    [
        ("arena_lists", {"response_b": '["good", "more"]'}, "response_b is not the text of one turn"),
        ("arena_lists", {"prompt": [3]}, "prompt is not the text"),
        ("arena_lists", {"response_a": "[null]"}, "an answer is empty"),
        (
            "arena_lists",
            {"prompt": '["Q?", "And?"]', "response_a": '["a", "b"]', "response_b": '["c", "d"]'},
            "prompt is not the text of one turn",
        ),
        ("summaries", {"choice": 2}, "choice is 2; expected one of 0, 1"),
        ("summaries", {"info": {"post": "Q?"}}, "info has no 'subreddit'"),
        ("summaries", {"summaries": [{"note": "x"}]}, "`text` as text"),
    ],
)
def test_rows_that_say_no_preference_are_named(form: str, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadRowError, match=fault):
        parse({**SCORED[form][0], **changes}, form, {})


def test_rows_that_a_set_holds_out_are_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """HelpSteer2's file of preferences has both splits; its rows for validation were trained on."""
    row = SCORED["helpsteer2"][0]
    rows = [{**row, "prompt": split, "split": split} for split in ("train", "validation", "valid2", "test")]
    assert [pair.messages[0]["content"] for pair in written(tmp_path, rows)] == ["train"]
    told = capsys.readouterr().out
    assert "3 rows left out" in told
    assert "not used" not in told
    assert "`split` says valid2" in (tmp_path / "bad_rows.json").read_text()
    assert len(written(tmp_path, rows, columns={"part": "split"})) == 4, "the way to train on them all"
    with pytest.raises(InputError, match="1 rows: its column `split` says test"):
        written(tmp_path, rows[3:])
