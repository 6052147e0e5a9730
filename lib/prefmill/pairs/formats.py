"""The forms that preference data comes in: each one a pure function from a row to a preference, found by its keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER
from prefmill.pairs.forms import (
    SYSTEM_COLUMNS,
    Form,
    Found,
    Judgement,
    Kind,
    Parse,
    Preference,
    Row,
    Tags,
    words,
)
from prefmill.pairs.scored import SCORED_FORMS
from prefmill.pairs.turns import (
    Answer,
    BadRowError,
    Chat,
    Turn,
    alpaca_prompt,
    answer_to,
    as_answer,
    as_chat,
    as_prompt,
    asked_chat,
    is_transcript,
    parse_dialogue,
    place_images,
    refuse_untrained,
    sole_answer,
    split_prompt,
    tools_of,
)

# No template is given these by row: a row that needs them would lose them in silence.
_UNTRAINED = ("functions", "chat_template_kwargs")
_GOOD = ("true", "1", "1.0", "good", "chosen", "desirable")
_BAD = ("false", "0", "0.0", "bad", "rejected", "undesirable")
_LABELS = dict.fromkeys(_GOOD, True) | dict.fromkeys(_BAD, False)
# A list of messages that a table, or Python's str(), made text of.
_LISTED = re.compile(r"""['"](?:role|from)['"]\s*:\s*['"](?:system|user|human|assistant|gpt)['"]""")


def trl_messages(row: Row, tags: Tags) -> Preference:
    """`{prompt: [...], chosen: [...], rejected: [...]}`; chosen and rejected may repeat the prompt."""
    prompt = as_chat(row["prompt"], "prompt", tags)
    return _preference(row, prompt, *_sides(row, prompt.turns, tags))


def prompt_and_messages(row: Row, tags: Tags) -> Preference:
    """`{prompt: "...", chosen: [...], rejected: [...]}` with or without the prompt repeated (UltraFeedback)."""
    chats = [as_chat(row[side], side, tags) for side in ("chosen", "rejected")]
    # UltraFeedback repeats the prompt in both chats, other datasets hold the answers alone.
    if all(len(chat.turns) == 1 for chat in chats):
        prompt = Chat(as_prompt(row["prompt"]))
        return _preference(row, prompt, *_sides(row, prompt.turns, tags))
    turns, chosen, rejected = split_prompt(*(chat.turns for chat in chats))
    if turns[-1]["content"].strip() != row["prompt"].strip():
        raise BadRowError("the prompt is not the last user turn before chosen and rejected")
    return _preference(row, _prompt_of(chats[0], turns), chosen, rejected)


def _strings(asked: str) -> Parse:
    """One turn each: the prompt in the column `asked`, `chosen`, `rejected`."""
    return lambda row, tags: _preference(row, Chat(as_prompt(row[asked])), row["chosen"], row["rejected"])


def _alpaca(chosen: str, rejected: str) -> Parse:
    """`{instruction, input, system, history: [[said, answered], ...]}`, all but the first where there are any."""
    return lambda row, tags: _preference(row, Chat(alpaca_prompt(row)), row[chosen], row[rejected])


def _turn_each(asked: str) -> Parse:
    """A chat in the column `asked` that ends with a user's turn, `chosen` and `rejected` as a message each."""

    def parse(row: Row, tags: Tags) -> Preference:
        answers = [answer_to([], as_chat([row[side]], side, tags), side) for side in ("chosen", "rejected")]
        return _preference(row, as_chat(row[asked], asked, tags), *answers)

    return parse


def prompt_messages(row: Row, tags: Tags) -> Preference:
    """`{prompt: [...], chosen: "...", rejected: "..."}`: OpenRLHF."""
    return _preference(row, as_chat(row["prompt"], "prompt", tags), row["chosen"], row["rejected"])


def ms_swift(row: Row, tags: Tags) -> Preference:
    """`{messages: [...], rejected_response: "..."}`: the last turn is the chosen answer."""
    chat = as_chat(row["messages"], "messages", tags)
    chosen = sole_answer(chat.turns[-1:], "messages")
    return _preference(row, _prompt_of(chat, chat.turns[:-1]), chosen, row["rejected_response"])


def openai(row: Row, tags: Tags) -> Preference:
    """`{input: {messages}, preferred_output, non_preferred_output}`: OpenAI and Azure."""
    prompt = as_chat(row["input"].get("messages"), "input.messages", tags)
    return _preference(row, prompt, *_sides(row, prompt.turns, tags, "preferred_output", "non_preferred_output"))


def _implicit(good: str, bad: str) -> Parse:
    """Whole chats that begin alike, in the columns `good` and `bad`."""

    def parse(row: Row, tags: Tags) -> Preference:
        chats = [as_chat(row[side], side, tags) for side in (good, bad)]
        turns, chosen, rejected = split_prompt(*(chat.turns for chat in chats))
        return _preference(row, _prompt_of(chats[0], turns), chosen, rejected)

    return parse


def implicit_strings(row: Row, tags: Tags) -> Preference:
    """`{chosen, rejected}` as transcripts with `Human:` and `Assistant:` that begin alike: HH-RLHF."""
    turns, chosen, rejected = split_prompt(
        parse_dialogue(row["chosen"], "chosen"), parse_dialogue(row["rejected"], "rejected")
    )
    return _preference(row, Chat(turns), chosen, rejected)


def unpaired(row: Row, tags: Tags) -> Judgement:
    """`{prompt, completion, label}`: text or messages, good or not."""
    chat = asked_chat(row["prompt"], "prompt", tags)
    completion = row["completion"]
    answer: Answer = completion if isinstance(completion, str) else answer_to(
        chat.turns, as_chat(completion, "completion", tags), "completion"
    )  # fmt: skip
    return _judgement(row, chat, answer)


def unpaired_messages(row: Row, tags: Tags) -> Judgement:
    """`{messages, label}`: a chat that ends with the answer, good or not."""
    chat = as_chat(row["messages"], "messages", tags)
    answer = sole_answer(chat.turns[-1:], "messages")
    return _judgement(row, Chat(chat.turns[:-1], chat.images), answer)


# Implicit forms take the prompt from how both sides begin: a row with a prompt of its own is of another form.
_PROMPTS = ("prompt", "question", "instruction", "input", "conversations", "messages")
_OLD = ("chosen_messages", "rejected_messages")
_TEXTS: Mapping[str, Kind] = {"chosen": "text", "rejected": "text"}
FORMS: Mapping[str, Form] = {
    "trl_messages": Form({"prompt": "list", "chosen": "list", "rejected": "list"}, trl_messages),
    "prompt_and_messages": Form({"prompt": "text", "chosen": "list", "rejected": "list"}, prompt_and_messages),
    "prompt_messages": Form({"prompt": "list", **_TEXTS}, prompt_messages),
    "prompt_strings": Form({"prompt": "text", **_TEXTS}, _strings("prompt")),
    "system_question": Form({"question": "text", **_TEXTS}, _strings("question")),
    "system_input": Form({"input": "text", **_TEXTS}, _strings("input"), ["instruction"]),
    "instruction_responses": Form(
        {"instruction": "text", "chosen_response": "text", "rejected_response": "text"},
        _alpaca("chosen_response", "rejected_response"),
    ),
    "alpaca": Form({"instruction": "text", **_TEXTS}, _alpaca("chosen", "rejected")),
    "sharegpt": Form({"conversations": "list", "chosen": "dict", "rejected": "dict"}, _turn_each("conversations")),
    "axolotl": Form({"messages": "list", "chosen": "dict", "rejected": "dict"}, _turn_each("messages")),
    "ms_swift": Form({"messages": "list", "rejected_response": "text"}, ms_swift),
    "openai": Form({"input": "dict", "preferred_output": "list", "non_preferred_output": "list"}, openai),
    "llamafactory_v1": Form({"chosen_messages": "list", "rejected_messages": "list"}, _implicit(*_OLD)),
    "implicit_messages": Form(
        {"chosen": "list", "rejected": "list"}, _implicit("chosen", "rejected"), [*_PROMPTS[:-1], *_OLD]
    ),
    "implicit_strings": Form(_TEXTS, implicit_strings, _PROMPTS),
    "unpaired": Form({"prompt": "text or list", "completion": "text or list", "label": "label"}, unpaired),
    "unpaired_messages": Form({"label": "label", "messages": "list"}, unpaired_messages),
    **SCORED_FORMS,
}


def forms_of(row: Row, known: Mapping[str, Form]) -> list[str]:
    """The names of all forms that `row` could have by its keys."""
    return [name for name, form in known.items() if form.fits(row)]


def detect(row: Row, where: object, known: Mapping[str, Form] = FORMS) -> str:
    """The name of the one form that `row` has; raises InputError with the keys seen where none or several fit."""
    found = forms_of(row, known)
    if len(found) == 1:
        return found[0]
    keys = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items() if value is not None)
    # There are too many to list: those that lack the fewest keys.
    near = found or sorted(known, key=lambda name: (len(known[name].needs.keys() - row), -len(known[name].needs)))[:3]
    forms = "; ".join(f"{name}: {', '.join(known[name].needs)}" for name in near)
    raise InputError(
        "this form of preference data is not known" if not found else "this row has the keys of several forms",
        where=where, got=keys,
        expected=forms if found else f"{forms}; or one more of docs/bring-your-own-preferences.md",
        fix=(
            f"say which it is: pair_format={found[0]}" if found else
            "rename columns, as by columns={prompt: question, completion: answer}" if "prompt_completion" in known else
            "rename columns with columns={OURS: THEIRS}; rows without a preference cannot be used, image pairs go to "
            "sdxl_dpo"
        ),
    )  # fmt: skip


def parse(row: Row, name: str, tags: Tags, known: Mapping[str, Form] = FORMS) -> Found:
    """`row` read as the form `name`; raises BadRowError saying what is wrong with it."""
    form = known[name]
    if not form.fits(row):
        needs = ", ".join(f"{key} ({kind})" for key, kind in form.needs.items())
        keys = ", ".join(str(key) for key, value in row.items() if value is not None)
        raise BadRowError(f"not of the form {name}, which has {needs}; keys with a value are {keys or 'none'}")
    for values in (row, row.get("input")):  # OpenAI's rows have some in `input`
        refuse_untrained(values if isinstance(values, Mapping) else {}, _UNTRAINED)
    found = form.parse(row, tags)
    found = replace(found, messages=_with_system(row, found.messages), tools=tools_of(row))
    if not found.messages or found.messages[-1]["role"] not in ("user", "tool"):
        raise BadRowError("the prompt does not end with a user turn")
    answers = list(map(as_answer, found.answers))
    for turn in (*found.messages, *answers):
        _check_text(turn)
    if not all(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        raise BadRowError("an answer is empty")
    if found.messages[-1]["role"] == "user" and not found.messages[-1]["content"].strip():
        raise BadRowError("the prompt is empty")
    if not all(answer.get("train", True) for answer in answers):
        raise BadRowError("an answer has weight 0: nothing of the row is to be trained on")
    if any(map(is_transcript, answers)):
        raise BadRowError("an answer is a whole transcript: remove the prompt's own column, its turns are the prompt")
    # Sides that only look alike would teach white space, or how an accent is composed.
    if isinstance(found, Preference) and words(found.chosen) == words(found.rejected):
        raise BadRowError("chosen and rejected are the same, white space and Unicode's composition aside")
    return found


def _check_text(turn: Turn) -> None:
    if not isinstance(turn["content"], str):
        raise BadRowError("a turn of the prompt, or an answer, is not text")
    if turn["role"] != "tool" and turn["content"].lstrip().startswith("[") and _LISTED.search(turn["content"]):
        raise BadRowError("a list of messages as text: give it as a list, which .jsonl and .parquet can hold")
    try:
        # JSON can spell such halves and Python holds them, but no tokenizer takes them: training would end there.
        json.dumps(turn, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"half of a surrogate pair, which is no character: {error.object[error.start]!r}") from None


def _with_system(row: Row, turns: Sequence[Turn]) -> list[Turn]:
    """`turns` after the row's own system text, which stands beside them in a column."""
    own = [turn["content"] for turn in turns[:1] if turn["role"] == "system"]
    said = own + [row[column] for column in SYSTEM_COLUMNS if row.get(column)]
    if any(text != said[0] for text in said):
        raise BadRowError(f"the columns {' and '.join(SYSTEM_COLUMNS)} and the first turn say different things")
    return list(turns) if own or not said else [{"role": "system", "content": said[0]}, *turns]


def _prompt_of(chat: Chat, turns: Sequence[Turn]) -> Chat:
    if chat.images and sum(turn["content"].count(IMAGE_MARKER) for turn in turns) != len(chat.images):
        raise BadRowError("answers cannot hold images")
    return Chat(turns, chat.images)


def _sides(row: Row, prompt: Sequence[Turn], tags: Tags, good: str = "chosen", bad: str = "rejected") -> list[Answer]:
    return [answer_to(prompt, as_chat(row[side], side, tags), side) for side in (good, bad)]


def _preference(row: Row, prompt: Chat, chosen: Answer, rejected: Answer) -> Preference:
    turns, images = place_images(prompt, row)
    return Preference(turns, chosen, rejected, images)


def _judgement(row: Row, prompt: Chat, answer: Answer) -> Judgement:
    turns, images = place_images(prompt, row)
    return Judgement(turns, answer, _label(row["label"]), images)


def _label(value: Any) -> bool:
    """Whether the answer is good: true or false, 1 or 0, or a word for it, as tables have it."""
    # Not bool(): "false", -1 for a bad answer and a grade of 2 out of 5 are all true to Python.
    name = str(value).strip().lower()
    if name not in _LABELS:
        raise BadRowError(f"label is {value!r}; expected one of {', '.join(_LABELS)}")
    return _LABELS[name]
