"""What a template must show of a chat: every turn of the prompt, its tools, and all of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefmill.core.errors import InputError

Turn = Mapping[str, Any]
OTHER_TEMPLATE = "give one that does with chat_template=FILE"
# One thing, under the names that templates and datasets give it: Qwen3's, OpenRouter's, gpt-oss'.
REASONING = ("reasoning_content", "reasoning", "thinking")


def text_of(turn: Turn) -> str:
    """What a turn says, images aside."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def require_said(turn: Turn) -> None:
    """Raise InputError for an answer without words and without a call."""
    if not text_of(turn).strip() and not turn.get("tool_calls"):
        raise InputError("an empty answer cannot be trained on", got=repr(turn["content"]), fix="leave the row out")


def require_tools(tools: Sequence[Any], whole: str) -> None:
    """Raise InputError for a tool that the template does not show the model."""
    for tool in tools:
        name = str(tool.get("function", tool).get("name"))
        if name not in whole:
            raise InputError(
                "the chat template leaves the tools out", got=whole[:160], expected=f"the tool '{name}'",
                fix=OTHER_TEMPLATE + ", or remove 'tools' from the rows",
            )  # fmt: skip


def require_shown(messages: Sequence[Turn], whole: str) -> None:
    """Raise InputError for a turn of the prompt that the template does not show the model, or shows in part."""
    squeezed = ""
    for turn in messages:
        for text in _said_in(turn):
            if text.strip() in whole:
                continue
            squeezed = squeezed or "".join(whole.split())
            # Tools' results are written as JSON by some templates.
            forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
            if not any("".join(form.split()) in squeezed for form in forms):
                raise InputError(
                    f"the chat template leaves out what a turn of the role {turn['role']} says", got=whole[:160],
                    expected=text[:160], fix=OTHER_TEMPLATE + ", or leave the row out",
                )  # fmt: skip


def _said_in(turn: Turn) -> Iterator[str]:
    """The texts of a turn of the prompt, and the tools that it calls; earlier thoughts are for the template to keep."""
    content = turn["content"]
    for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
        yield text.rpartition("</think>")[2] if turn["role"] == "assistant" else text
    yield from (call["function"]["name"] for call in turn.get("tool_calls") or ())


def check_answer(turn: Turn, completion: str) -> None:
    """Raise InputError where the completion lacks a part of the turn, white space aside, or has a second thought."""
    # Many templates strip an answer, which takes nothing that is to be learnt.
    found, answer = "".join(completion.split()), text_of(turn)
    for what, text in _parts_of(turn):
        if "".join(text.split()) not in found:
            raise InputError(
                f"the chat template drops {what}", got=completion[:160], expected=text[:160], fix=OTHER_TEMPLATE
            )
    if 0 < answer.count("<think>") < completion.count("<think>"):
        raise InputError(
            "the chat template puts a thought before the answer's own", got=completion[:160], expected=answer[:160],
            fix=OTHER_TEMPLATE,
        )  # fmt: skip


def _parts_of(turn: Turn) -> Iterator[tuple[str, str]]:
    """Everything in an assistant's turn that is to be learnt, with a name for messages."""
    yield "a part of the answer", text_of(turn)
    yield from ((f"the answer's {name}", str(turn[name])) for name in REASONING if turn.get(name))
    for call in turn.get("tool_calls") or ():
        yield "the answer's tool_calls", call["function"]["name"]
        yield from (("the arguments of a tool call", text) for text in _leaves(call["function"]["arguments"]))


def _leaves(value: Any) -> Iterator[str]:
    """Names and plain texts in the arguments of a call; how numbers and others are written is the template's matter."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    # Quotes and other letters are escaped by some templates and not by others: such a text could not be found.
    elif isinstance(value, str) and value.isalnum() and value.isascii():
        yield value
