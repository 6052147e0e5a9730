"""Chats of other people's datasets as prefmill's turns: `{"role", "content"}`, images as markers in the text.

An assistant's turn may also have `reasoning_content`, `tool_calls` and `train: False`, a tool's `name` and
`tool_call_id`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefmill.core.records import IMAGE_MARKER
from prefmill.families.causal.chat_checks import REASONING

Turn = dict[str, Any]
Answer = str | Turn  # text alone, or a whole turn where that has more than text
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "ai": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
_OF_TOOLS = ("name", "tool_call_id")
_WEIGHTS = ("weight", "loss_weight", "loss", "train", "training")  # OpenAI's, LLaMA-Factory's, ms-swift's, axolotl's
READ = {*REASONING, *_OF_TOOLS, *_WEIGHTS, "role", "content", "from", "value", "tool_calls", "function_call"}
# HH-RLHF begins a turn after a blank line: within a line the same word is text.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HELPSTEER = re.compile(r"\s*<extra_id_1>(User|Assistant)\s*")


class BadRowError(ValueError):
    """A row that is not what its form says; whoever reads the file adds where it stands."""


class Chat:
    """Turns, and the images that the markers in them stand for, in order."""

    def __init__(self, turns: Sequence[Turn], images: Sequence[Any] = ()) -> None:
        self.turns, self.images = list(turns), list(images)


def as_chat(messages: Any, what: str, tags: Mapping[str, str]) -> Chat:
    """A list of messages under `role`/`content`, `from`/`value`, or the names that `tags` gives.

    Content is text, or a list of text and image parts. Raises BadRowError naming `what` for anything else.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRowError(f"{what} is not a list of messages: {_shown(messages)}")
    chat = Chat([])
    for message in messages:
        turn, images = as_turn(message, what, tags)
        chat.turns.append(turn)
        chat.images += images
    return chat


def as_turn(message: Any, what: str, tags: Mapping[str, str]) -> tuple[Turn, list[Any]]:
    """One message and its images; raises BadRowError for a role nobody knows or content that is not text or images."""
    if not isinstance(message, Mapping):
        raise BadRowError(f"{what} holds something that is not a message: {_shown(message)}")
    role_key = tags.get("role") or ("role" if "role" in message else "from")
    content_key = tags.get("content") or ("content" if "content" in message else "value")
    said = message.get(role_key)
    if said == tags.get("function", "function_call"):  # ShareGPT's turn that is a call
        return as_turn({"role": "assistant", "tool_calls": _calls(message.get(content_key), what)}, what, {})
    # LLaMA-Factory forgets its own names of speakers once a registry gives some: its files are read so.
    roles = {
        tags[name]: ROLES[name] for name in ("user", "assistant", "system", "observation") if name in tags
    } or ROLES
    if roles is ROLES and isinstance(said, str):
        said = said.lower()
    known = isinstance(said, str) and said in roles
    turn: Turn = {"role": roles[str(said)], **_beside(message, what)} if known else {}
    if not turn or (content_key not in message and "tool_calls" not in turn):
        raise BadRowError(f"{what}: no known role and content in {_shown(message)}; roles are {', '.join(roles)}")
    content = message.get(content_key)
    # OpenAI's chats have null for content beside calls of tools.
    text, images = _content("" if content is None and "tool_calls" in turn else content, what)
    return {**turn, "content": text}, images


def _beside(message: Mapping[str, Any], what: str) -> Turn:
    """What a message has beside its content that templates write: reasoning, calls of tools, whose result it is."""
    said = [message[key] for key in REASONING if message.get(key)]
    if any(not isinstance(text, str) for text in said) or len(set(map(str, said))) > 1:
        raise BadRowError(f"{what}: reasoning is one text, not {_shown(said)}")
    # OpenAI's form before it had tool_calls: one call, without an id.
    old = message.get("function_call")
    calls = message.get("tool_calls") or ([{"function": old}] if old else [])
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise BadRowError(f"{what}: tool_calls are a list, not {_shown(calls)}")
    found: Turn = {"reasoning_content": said[0]} if said else {}
    weights = [message[key] for key in _WEIGHTS if message.get(key) is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise BadRowError(f"{what}: a turn is trained on (1) or not (0): {_shown(message)}")
    if 0 in weights:
        found["train"] = False
    if calls:
        found["tool_calls"] = [_call(call, what) for call in calls]
    return found | {key: message[key] for key in _OF_TOOLS if message.get(key)}


def _calls(text: Any, what: str) -> list[Any]:
    """One call or a list of them, in JSON."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        raise BadRowError(f"{what}: a function_call is JSON, not {_shown(text)}") from None
    return found if isinstance(found, list) else [found]


def _call(call: Any, what: str) -> Turn:
    """A call of a tool with its arguments as an object: templates write JSON of them, of text they would quote it."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    function = function if isinstance(function, Mapping) else {}
    try:
        given = function.get("arguments", {})
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        arguments = None
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        raise BadRowError(f"{what}: a call has a name and arguments in JSON, not {_shown(call)}")
    more = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", **more, "function": {"name": function["name"], "arguments": dict(arguments)}}


def tools_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The tools that a row offers, as a list or as its JSON; raises BadRowError for anything else."""
    asked = row.get("input")  # OpenAI's rows have them beside the messages
    given = (asked if isinstance(asked, Mapping) else row).get("tools") or []
    try:
        tools = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        tools = None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRowError(f"tools are a list of objects: {_shown(given)}")
    return tuple(tools)


def refuse_untrained(values: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise BadRowError for a key that holds something which training would leave out without a word."""
    for key in keys:
        if values.get(key):
            raise BadRowError(f"'{key}' is not trained on: {_shown(values[key])}; remove it where it is not wanted")


def place_images(prompt: Chat, row: Mapping[str, Any]) -> tuple[list[Turn], tuple[Any, ...]]:
    """The prompt with one marker for each image, and the images.

    Images without markers go before the first user turn's text, as TRL does; any other difference is a bad row.
    """
    # A table has the column in every row, and null where a row has no image.
    columns = [row[key] for key in ("images", "image") if key in row]
    column = next((value for value in columns if value is not None), None)
    listed = [image for image in (column if isinstance(column, (list, tuple)) else [column]) if image not in (None, "")]
    # TRL's image parts only hold a place: their pictures are in the column.
    images = [image for image in prompt.images if image is not None]
    if images and listed:
        raise BadRowError("images stand both in the messages and in a column of their own")
    images = list(map(_decoded, images or listed))
    markers = sum(turn["content"].count(IMAGE_MARKER) for turn in prompt.turns)
    if not images and prompt.images:
        raise BadRowError("an image part has no image")
    # Without a column for images `<image>` may be text, such as a tag's name.
    if markers == len(images) or (not images and not columns):
        return prompt.turns, tuple(images)
    if markers:
        raise BadRowError(f"{markers} {IMAGE_MARKER} markers for {len(images)} images")
    first = next((n for n, turn in enumerate(prompt.turns) if turn["role"] == "user"), None)
    if first is None:
        raise BadRowError("images, but no user turn to put them into")
    turns = [dict(turn) for turn in prompt.turns]
    turns[first]["content"] = IMAGE_MARKER * len(images) + turns[first]["content"]
    return turns, tuple(images)


def parse_dialogue(text: str, what: str) -> list[Turn]:
    r"""The turns of a transcript of `\n\nHuman: ...\n\nAssistant: ...`; raises BadRowError where it is none.

    What stands before the first is the system's, as Anthropic's own prompts had it.
    """
    system, *pieces = _SPEAKER.split(text)
    if not pieces or (system.strip() and pieces[0] != "Human"):
        raise BadRowError(f"{what} has no prompt of its own, and no 'Human:' and 'Assistant:' turns that hold one")
    said = zip(["system", *pieces[::2]], [system.strip().removeprefix("System:"), *pieces[1::2]], strict=True)
    turns = [{"role": ROLES[speaker.lower()], "content": words.strip()} for speaker, words in said]
    return turns if turns[0]["content"] else turns[1:]


def as_prompt(text: str) -> list[Turn]:
    """The user's turn, or the turns of a transcript that ends where the answer begins: HH-RLHF's, HelpSteer's."""
    first, *pieces = _HELPSTEER.split(text)
    if pieces:
        said = zip(["User", *pieces[::2]], [first, *pieces[1::2]], strict=True)
        return [{"role": ROLES[speaker.lower()], "content": words} for speaker, words in said]
    if "Human" in _SPEAKER.findall(text)[:1] and text.rstrip().endswith("\n\nAssistant:"):
        return parse_dialogue(text, "prompt")[:-1]
    return [{"role": "user", "content": text}]


def asked_chat(asked: Any, what: str, tags: Mapping[str, str]) -> Chat:
    """A prompt that is text, or a list of messages."""
    return Chat(as_prompt(asked)) if isinstance(asked, str) else as_chat(asked, what, tags)


def alpaca_prompt(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of Alpaca's `instruction`, `input`, `system`, `history`; raises BadRowError for a bad history."""
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    history = row.get("history") or []
    if not all(isinstance(part, str) for part in parts) or not isinstance(history, (list, tuple)):
        raise BadRowError("instruction and input are texts, history is a list")
    turns: list[Turn] = []
    for exchange in history:
        # A mapping or a text of two letters has two items as well.
        if not isinstance(exchange, (list, tuple)) or [type(said) for said in exchange] != [str, str]:
            raise BadRowError("history is a list of [what was said, what was answered]")
        turns += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), exchange, strict=True)]
    return [*turns, {"role": "user", "content": "\n".join(parts)}]


def is_transcript(answer: Turn) -> bool:
    """Whether an answer holds the turns before it as well."""
    return answer["content"].lstrip().startswith("Human:") and "\n\nAssistant:" in answer["content"]


def split_prompt(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> tuple[list[Turn], Answer, Answer]:
    """The turns that both chats begin with, and the one answer that each goes on with."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise BadRowError("chosen and rejected are the same")
    prompt = list(chosen[:shared])
    if not prompt:
        raise BadRowError("chosen and rejected share no prompt")
    return prompt, sole_answer(chosen[shared:], "chosen"), sole_answer(rejected[shared:], "rejected")


def answer_to(prompt: Sequence[Turn], side: Chat, what: str) -> Answer:
    """The answer in `side`, which may repeat the prompt before it."""
    repeats = len(side.turns) > len(prompt) and side.turns[: len(prompt)] == list(prompt)
    answer = sole_answer(side.turns[len(prompt) :] if repeats else side.turns, what)
    if side.images and IMAGE_MARKER in as_answer(answer)["content"]:
        raise BadRowError(f"{what}: answers cannot hold images")
    return answer


def sole_answer(turns: Sequence[Turn], what: str) -> Answer:
    """What must be one turn of the assistant."""
    if [turn["role"] for turn in turns] != ["assistant"]:
        found = ", ".join(turn["role"] for turn in turns) or "nothing"
        raise BadRowError(f"after the shared prompt {what} must be one assistant turn, but is: {found}")
    return turns[0]["content"] if turns[0].keys() == {"role", "content"} else turns[0]


def as_answer(answer: Answer) -> Turn:
    """An answer as a turn."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def _content(content: Any, what: str) -> tuple[str, list[Any]]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence):
        raise BadRowError(f"{what}: content is neither text nor a list of parts: {_shown(content)}")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            value = part.get("text") if part.get("text") is not None else part.get("value")
            texts.append(_text(value, what))
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_MARKER)
            images.append(_image(part))
        else:
            raise BadRowError(f"{what}: parts are text or images, not {_shown(part)}")
    return "".join(texts), images


def _decoded(image: Any) -> Any:
    """An image whose bytes stand in a `data:` URL as those bytes, any other as it is."""
    url = image.get("url", image) if isinstance(image, Mapping) else image
    if not isinstance(url, str) or not url.startswith("data:"):
        return url
    try:
        return base64.b64decode(url.partition(";base64,")[2], validate=True)
    except ValueError:
        raise BadRowError(f"an image's data are not base64: {_shown(url)}") from None


def _image(part: Mapping[str, Any]) -> Any:
    """What a part says of its image; None where the row's `images` says it."""
    values = (part.get(key) for key in ("image", "image_url", "value", "url", "path"))
    value = next((item for item in values if item is not None), None)
    return value.get("url") if isinstance(value, Mapping) and "url" in value else value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{what}: a text part without text: {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
