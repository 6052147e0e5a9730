"""Chats as token ids: one way to split them into prompt and completion, for every stage that trains or scores.

What is trained is what the chat template makes of the whole conversation, tokenised as a whole. A template with which
that cannot be, or that would teach the model something else than the answer and its end, is refused with both texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "probe"
_OTHER_TEMPLATE = "give the model's folder a chat template that does, as chat_template.jinja"


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    """The chat up to where the model's answer begins, assistant header included."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def image_paths(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The images that stand in `messages` as parts, in their order."""
    return [part["path"] for turn in messages if isinstance(turn["content"], list)
            for part in turn["content"] if part["type"] == "image"]  # fmt: skip


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion, end of turn included: together those of the whole conversation.

    Raises InputError for an empty answer, a prompt that is templated already, and a template that refuses the messages,
    changes what was said before the answer, drops a part of the answer, doubles its thought, or never ends it.
    """
    if not answer.strip():
        raise InputError("an empty answer cannot be trained on", got=repr(answer), fix="leave the row out")
    _refuse_templated(tokenizer, messages)
    prompt = prompt_text(tokenizer, messages)
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise _mismatch("the chat template rewrites the prompt once an answer follows", whole, prompt)
    completion = whole[len(prompt) :]
    if template_of(tokenizer).appends_header:  # a model that learnt it would write one answer after another
        completion = _until_its_end(tokenizer, prompt, completion)
    _check_answer(answer, completion)
    prompt_ids, ids = (_ids(tokenizer, text) for text in (prompt, prompt + completion))
    if ids[: len(prompt_ids)] != prompt_ids:
        raise _mismatch("the answer's first letters join the last token of the prompt", prompt + completion, prompt)
    if not template_of(tokenizer).control.intersection(ids[len(prompt_ids) :]):
        raise InputError(
            "the chat template never ends an answer: the model would learn no stop", got=completion[-80:],
            expected="an end token behind the answer", fix=_OTHER_TEMPLATE,
        )  # fmt: skip
    return prompt_ids, ids[len(prompt_ids) :]


@dataclass(frozen=True)
class Template:
    """What a tokenizer's chat template does, found by trying it once.

    `wants_parts`: it drops a content that is a string, and shows that of a list of parts (SmolVLM). `header` opens a
    user's turn. `appends_header`: the next answer's header comes unasked (LLaDA's). `control`: tokens that are no text.
    """

    wants_parts: bool
    header: str
    appends_header: bool
    control: frozenset[int]


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template as it behaves; a user's turn alone is tried, which every template takes."""
    known: dict[str, Template] = tokenizer.__dict__.setdefault("_prefmill_templates", {})
    text = str(tokenizer.chat_template)
    if text not in known:
        probe = [{"role": "user", "content": _PROBE}]
        wants_parts = _PROBE not in _apply(tokenizer, probe, True)
        shown = _as_parts(probe) if wants_parts else probe
        asked, unasked = (_apply(tokenizer, shown, add) for add in (True, False))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        control = {int(place) for place, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        header = unasked.split(_PROBE)[0].strip()
        known[text] = Template(
            wants_parts, header if control.intersection(_ids(tokenizer, header)) else "", asked == unasked != "",
            frozenset(control),
        )  # fmt: skip
    return known[text]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    given = _as_parts(messages) if template_of(tokenizer).wants_parts else list(messages)
    return _apply(tokenizer, given, add_generation_prompt)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Any], add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )  # fmt: skip
    except TemplateError as error:
        raise InputError(
            "the chat template refuses these messages", got=str(error), expected="roles that the template takes",
            fix="leave the row out, or use a model whose template takes them",
        ) from None  # fmt: skip
    return text


def _as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} if isinstance(turn["content"], str) else
        dict(turn) for turn in messages
    ]  # fmt: skip


def _until_its_end(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> str:
    """`completion` up to the first control token, that included: the answer and the end of its turn."""
    ids, start = _ids(tokenizer, prompt + completion), len(_ids(tokenizer, prompt))
    ends = [token for token in ids[start:] if token in template_of(tokenizer).control]
    if not ends:
        return completion
    closing = str(tokenizer.convert_ids_to_tokens(ends[0]))
    return completion[: completion.index(closing) + len(closing)]


def _check_answer(answer: str, completion: str) -> None:
    """Raise InputError where the completion lacks a part of the answer, white space aside, or has a second thought."""
    if "".join(answer.split()) not in "".join(completion.split()):
        raise InputError(
            "the chat template drops a part of the answer", got=completion[:160], expected=answer[:160],
            fix=_OTHER_TEMPLATE,
        )  # fmt: skip
    if 0 < answer.count("<think>") < completion.count("<think>"):
        raise InputError(
            "the chat template puts a thought before the answer's own", got=completion[:160], expected=answer[:160],
            fix=_OTHER_TEMPLATE,
        )  # fmt: skip


def _refuse_templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError for a message that holds the template's own header: it has been through a template before."""
    header = template_of(tokenizer).header
    for turn in messages:
        if header and isinstance(turn["content"], str) and header in turn["content"]:
            raise InputError(
                "the prompt has been through a chat template already", got=turn["content"][:80],
                expected="the message alone", fix=f"remove the markers, such as {header!r}, from the data",
            )  # fmt: skip


def _mismatch(fault: str, whole: str, prompt: str) -> InputError:
    same = next((place for place, pair in enumerate(zip(whole, prompt, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - 40)
    return InputError(
        fault, got=whole[start : start + 120], expected=prompt[start : start + 120],
        fix="use a template whose generation prompt is a prefix of the finished chat",
    )  # fmt: skip
