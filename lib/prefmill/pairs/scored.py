"""Published sets of answers with scores, ranks or a choice between two: each a line of its columns' names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from typing import Any

from prefmill.pairs.forms import Form, Kind, Row, ScoredAnswers, Tags
from prefmill.pairs.turns import (
    Answer,
    BadRowError,
    Chat,
    alpaca_prompt,
    as_chat,
    asked_chat,
    place_images,
    sole_answer,
)

Score = Callable[[Row, str], float]
# A row that has these beside its scores is of the form that they say.
_OTHERS = ("chosen", "rejected", "label")


def _higher(row: Row, key: str) -> float:
    """A finite number, or its text."""
    value = row.get(key)
    try:
        found = nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = nan
    if not isfinite(found):
        raise BadRowError(f"{key} is {value!r}; expected a number")
    return found


def _lower(row: Row, key: str) -> float:
    return -_higher(row, key)


def _choice(names: Mapping[str, float]) -> Score:
    """A score by the name of what was chosen."""

    def score(row: Row, key: str) -> float:
        value = +row[key] if isinstance(row[key], bool) else row[key]
        name = str(value).removesuffix(".0")  # as pandas writes whole numbers of a column with gaps
        if name not in names:
            raise BadRowError(f"{key} is {row[key]!r}; expected one of {', '.join(names)}")
        return names[name]

    return score


def _of_list(asked: str, listed: str, answer: str, key: str, score: Score = _higher) -> Form:
    """Rows with a list of answers, each with its score."""

    def parse(row: Row, tags: Tags) -> ScoredAnswers:
        answers = _listed_texts(row, listed, answer)
        return _compared(row, _prompt(row, asked, tags), answers, [score(item, key) for item in row[listed]])

    return Form({asked: "prompt", listed: "list"}, parse, _OTHERS, {listed: (answer, key)})


def _listed_texts(row: Row, listed: str, answer: str) -> list[str]:
    items = row[listed]
    if not items or not all(isinstance(item, Mapping) and isinstance(item.get(answer), str) for item in items):
        raise BadRowError(f"{listed} is no list of objects with `{answer}` as text")
    return [item[answer] for item in items]


def _of_columns(asked: str, scores: Mapping[str, str]) -> Form:
    """Rows with answers in columns, a score for each in another."""

    def parse(row: Row, tags: Tags) -> ScoredAnswers:
        found = [_higher(row, key) for key in scores.values()]
        return _compared(row, _prompt(row, asked, tags), [row[key] for key in scores], found)

    columns: dict[str, Kind] = {**dict.fromkeys(scores, "text"), **dict.fromkeys(scores.values(), "label")}
    return Form({asked: "prompt", **columns}, parse, _OTHERS, {asked: (_QUESTION,)})


def _of_two(asked: str, first: str, second: str, key: str, score: Score) -> Form:
    """Rows with two answers, and how much more the first is liked than the second."""

    def parse(row: Row, tags: Tags) -> ScoredAnswers:
        return _compared(row, _prompt(row, asked, tags), [row[first], row[second]], [score(row, key), 0])

    return Form({asked: "prompt", first: "text", second: "text", key: "label"}, parse, _OTHERS)


_WINNER = _choice({"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0})


def arena(row: Row, tags: Tags) -> ScoredAnswers:
    """`{conversation_a, conversation_b: [...], winner, turn}`: LMSYS's arena; MT-bench, judged up to an answer."""
    chats = [_up_to(row.get("turn"), as_chat(row[key], key, tags)) for key in ("conversation_a", "conversation_b")]
    if chats[0].turns[:-1] != chats[1].turns[:-1]:
        raise BadRowError("the two conversations differ before their last answers, so that they share no prompt")
    answers = [sole_answer(chat.turns[-1:], "a conversation") for chat in chats]
    return _compared(row, Chat(chats[0].turns[:-1], chats[0].images), answers, [_WINNER(row, "winner"), 0])


def _up_to(turn: Any, chat: Chat) -> Chat:
    """`chat` up to the answer that was judged, where it goes on after that."""
    ends = [place for place, said in enumerate(chat.turns, 1) if said["role"] == "assistant"]
    return Chat(chat.turns[: ends[turn - 1]], chat.images) if turn in range(1, len(ends)) else chat


def arena_lists(row: Row, tags: Tags) -> ScoredAnswers:
    """`{prompt, response_a, response_b, winner_model_a, winner_model_b}`, lists of a text a turn: the arena's 55k."""
    asked, first, second = (_sole_text(row[key], key) for key in ("prompt", "response_a", "response_b"))
    scores = [_higher(row, f"winner_model_{side}") for side in "ab"]
    return _compared(row, asked_chat(asked, "prompt", tags), [first, second], scores)


def _sole_text(value: Any, key: str) -> str:
    """What a list of one turn says, which CSV has as JSON; null, where a model said nothing, is empty."""
    texts = value
    if isinstance(value, str):
        try:
            texts = json.loads(value)
        except ValueError:
            texts = [value]
    if not isinstance(texts, (list, tuple)) or len(texts) != 1 or not isinstance(texts[0], str | None):
        raise BadRowError(f"{key} is not the text of one turn: after different answers no prompt is shared")
    return texts[0] or ""


_ARENA_LISTS: Mapping[str, Kind] = {
    "prompt": "text or list", "response_a": "text or list", "response_b": "text or list", "winner_model_a": "label",
    "winner_model_b": "label",
}  # fmt: skip
# As the models of that set were asked.
_POST = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
_ARTICLE = "Article:\n{article}\n\nTL;DR:"


def summaries(row: Row, tags: Tags) -> ScoredAnswers:
    """`{info: {subreddit, title, post} or {article}, summaries: [{text}, {text}], choice}`: the better one's place."""
    info = row["info"]
    try:
        asked = (_POST if info.get("post") else _ARTICLE).format_map(info)
    except KeyError as missing:
        raise BadRowError(f"info has no {missing}") from None
    answers, chosen = _listed_texts(row, "summaries", "text"), _choice({"0": 0, "1": 1})(row, "choice")
    return _compared(row, asked_chat(asked, "info", tags), answers, [place == chosen for place in range(len(answers))])


_QUESTION = "full_text"  # of a question that is an object


def _prompt(row: Row, key: str, tags: Tags) -> Chat:
    asked = row[key]
    if key == "instruction" and (row.get("input") or row.get("history")):
        return Chat(alpaca_prompt(row))
    return asked_chat(asked.get(_QUESTION) if isinstance(asked, Mapping) else asked, key, tags)


def _compared(row: Row, prompt: Chat, answers: Sequence[Answer], scores: Sequence[float]) -> ScoredAnswers:
    turns, images = place_images(prompt, row)
    return ScoredAnswers(turns, tuple(answers), tuple(scores), images)


SCORED_FORMS: Mapping[str, Form] = {
    "ultrafeedback": _of_list("instruction", "completions", "response", "overall_score"),
    "nectar": _of_list("prompt", "answers", "answer", "rank", _lower),
    "helpsteer": _of_columns("prompt", {"response": "helpfulness"}),
    "webgpt": _of_columns("question", {"answer_0": "score_0", "answer_1": "score_1"}),
    # From -3, the first is much better, to 3.
    "helpsteer2": _of_two("prompt", "response_1", "response_2", "preference_strength", _lower),
    "helpsteer3": _of_two("context", "response1", "response2", "overall_preference", _lower),
    "shp": _of_two("history", "human_ref_A", "human_ref_B", "labels", _choice({"1": 1, "0": -1})),
    "safe_rlhf": _of_two("prompt", "response_0", "response_1", "better_response_id", _choice({"0": 1, "1": -1})),
    "alpaca_farm": _of_two("instruction", "output_1", "output_2", "preference", _choice({"1": 1, "2": -1})),
    "summaries": Form(
        {"info": "dict", "summaries": "list", "choice": "label"}, summaries, _OTHERS, {"summaries": ["text"]}
    ),
    "arena_lists": Form(_ARENA_LISTS, arena_lists, _OTHERS, {"winner_tie": ()}),
    "arena": Form({"conversation_a": "list", "conversation_b": "list", "winner": "text"}, arena, _OTHERS, {"turn": ()}),
}
