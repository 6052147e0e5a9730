"""Chats as token ids: one way to split them into prompt and completion, for every stage that trains or scores.

What is trained is what the chat template makes of the whole conversation, tokenised as a whole. A template with which
that cannot be, or that would teach the model something else than the answer and its end, is refused with both texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import InputError
from prefmill.families.causal.chat_checks import (
    OTHER_TEMPLATE,
    REASONING,
    Turn,
    check_answer,
    require_said,
    require_shown,
    require_tools,
    text_of,
)
from prefmill.families.causal.templates import stop_clock
from prefmill.families.causal.token_ids import token_ids

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import GenerationConfig, PreTrainedTokenizerBase

Answer = str | Turn  # text alone, or a turn that also has `reasoning_content` or `tool_calls`
_PROBE = "probe"


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], tools: Sequence[Any] = ()) -> str:
    """The chat up to where the model's answer begins, assistant header included."""
    return _render(tokenizer, messages, tools, add_generation_prompt=True)


def image_paths(messages: Sequence[Turn]) -> list[str]:
    """The images that stand in `messages` as parts, in their order."""
    return [part["path"] for turn in messages if isinstance(turn["content"], list)
            for part in turn["content"] if part["type"] == "image"]  # fmt: skip


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], answer: Answer, tools: Sequence[Any] = ()
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion, end of turn included: together those of the whole conversation.

    Raises InputError as `encode_turns` does.
    """
    turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    ids, trained = encode_turns(tokenizer, [*messages, turn], [len(messages)], tools)
    start = trained.index(True)
    return ids[:start], ids[start:]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], places: Sequence[int], tools: Sequence[Any] = ()
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat as the template writes it whole, and whether each is of an assistant's turn at `places`.

    `places` are ascending and end with the last turn. Raises InputError for an empty answer, a prompt that is templated
    already, an answer that holds the token of its end, and a template that refuses the messages, leaves out tools or a
    part of the prompt, changes what was said before an answer, drops a part of the answer or its reasoning, doubles its
    thought, or never ends it.
    """
    for place in places:
        require_said(messages[place])
    before = [turn for place, turn in enumerate(messages) if place not in places]
    _refuse_templated(tokenizer, before)
    whole = _render(tokenizer, messages, tools, add_generation_prompt=False)
    require_tools(tools, whole)
    require_shown(before, whole)
    # In characters first: a part that is tokenised by itself may give other tokens than within the whole.
    spans = [_span(tokenizer, messages, place, tools, whole) for place in places]
    # LLaDA's template writes the next answer's header behind the last answer.
    whole = whole[: spans[-1][1]]
    ids = token_ids(tokenizer, whole)
    trained = [False] * len(ids)
    for (begin, end), place in zip(spans, places, strict=True):
        tokens = slice(_num_tokens(tokenizer, whole, begin, ids), _num_tokens(tokenizer, whole, end, ids))
        trained[tokens] = [True] * (tokens.stop - tokens.start)
        ends = [token for token in ids[tokens] if token in template_of(tokenizer).control]
        if ends and tokenizer.convert_ids_to_tokens(ends[-1]) in text_of(messages[place]):
            raise InputError(
                "an answer holds the token that ends it: the model would learn to stop there",
                got=whole[begin:end][-80:], expected="the answer alone", fix="remove the token from the data",
            )  # fmt: skip
        if not ends:
            raise InputError(
                "the chat template never ends an answer: the model would learn no stop", got=whole[begin:end][-80:],
                expected="an end token behind the answer", fix=OTHER_TEMPLATE,
            )  # fmt: skip
    return ids, trained


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], place: int, tools: Sequence[Any], whole: str
) -> tuple[int, int]:
    """Where in `whole` the turn at `place` begins, its header excluded, and ends."""
    prompt = prompt_text(tokenizer, messages[:place], tools)
    if not whole.startswith(prompt):
        raise _mismatch("the chat template rewrites the prompt once an answer follows", whole, prompt)
    is_last = place == len(messages) - 1
    through = whole if is_last else _render(tokenizer, messages[: place + 1], tools, add_generation_prompt=False)
    # A header that comes unasked would be learnt: a model that writes one answer after another. And a template may
    # write a turn otherwise once others follow (Qwen3, without an empty thought): what it writes then is trained.
    if template_of(tokenizer).appends_header or not whole.startswith(through):
        through = prompt + _until_its_end(tokenizer, prompt, whole[len(prompt) :])
    answer = text_of(messages[place]).strip()
    if is_last and answer not in through[len(prompt) :] and answer in whole[len(through) :]:
        raise InputError(
            "the chat template opens an answer with a header that it leaves out of a prompt", got=whole[-160:],
            expected="that header where add_generation_prompt asks for it", fix=OTHER_TEMPLATE,
        )  # fmt: skip
    check_answer(messages[place], through[len(prompt) :])
    return len(prompt), len(through)


def _num_tokens(tokenizer: PreTrainedTokenizerBase, whole: str, end: int, ids: Sequence[int]) -> int:
    """How many of the tokens of `whole`, `ids`, are of its first `end` characters."""
    if end == len(whole):
        return len(ids)
    before = token_ids(tokenizer, whole[:end])
    # Tokenizers may merge letters across the border: that token would be of both sides.
    if list(ids[: len(before)]) != before:
        raise _mismatch("the answer's first letters join the last token of the prompt", whole, whole[:end])
    return len(before)


def end_token_ids(stated: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the ends that the model states, the text's, and the turn's as the template writes it.

    A model that was never chatted with (Qwen2.5's base) states the text's alone, though its template ends turns.
    """
    ids = [*_ids_of(stated and stated.eos_token_id), tokenizer.eos_token_id, _turn_end(tokenizer)]
    return sorted({token for token in ids if token is not None})


def state_ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have whoever generates with the model in `folder` stop where its template ends an answer."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    stated, end = GenerationConfig.from_pretrained(folder), _turn_end(tokenizer)
    if end is not None and end not in _ids_of(stated.eos_token_id):
        stated.eos_token_id = end_token_ids(stated, tokenizer)
        stated.save_pretrained(folder)


def _ids_of(stated: int | list[int] | None) -> list[int | None]:
    return [*stated] if isinstance(stated, list) else [stated]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer's turn, tried on one answer; None without a template, or where it refuses it."""
    if not tokenizer.chat_template:
        return None
    try:
        _, ids = encode(tokenizer, [{"role": "user", "content": _PROBE}], _PROBE)
    except InputError:
        return None
    # The last: gpt-oss opens an answer with control tokens too.
    return [token for token in ids if token in template_of(tokenizer).control][-1]


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
    # By the text of the template: one that is put on the tokenizer later is tried anew.
    known: dict[str, Template] = tokenizer.__dict__.setdefault("_prefmill_templates", {})
    text = str(tokenizer.chat_template)
    if text not in known:
        probe = [{"role": "user", "content": _PROBE}]
        wants_parts = _PROBE not in apply_template(tokenizer, probe, True)
        shown = _as_parts(probe) if wants_parts else probe
        asked, unasked = (apply_template(tokenizer, shown, add) for add in (True, False))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        control = {int(place) for place, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        header = unasked.split(_PROBE)[0].strip()
        # A header without a control token (`User:`) is ordinary text, which a message may well hold.
        known[text] = Template(
            wants_parts, header if control.intersection(token_ids(tokenizer, header)) else "", asked == unasked != "",
            frozenset(control),
        )  # fmt: skip
    return known[text]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], tools: Sequence[Any], add_generation_prompt: bool
) -> str:
    given = _as_parts(messages) if template_of(tokenizer).wants_parts else list(messages)
    # None for no tools: Llama 3.1's template asks `tools is not none`, and would open its section for an empty list.
    return apply_template(
        tokenizer, list(map(_under_all_names, given)), add_generation_prompt, tools=list(tools) or None
    )


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], add_generation_prompt: bool, **variables: Any
) -> str:
    """What the template makes of `messages`, with its clock standing still; raises InputError where it refuses them."""
    from jinja2.exceptions import TemplateError

    try:
        stop_clock(tokenizer)
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
        )
    # A template that joins text and None raises TypeError, one that searches a text in vain ValueError.
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(
            "the chat template refuses these messages", got=str(error), expected="roles that the template takes",
            fix="leave the row out, or use a template that takes them",
        ) from None  # fmt: skip
    return text


def _under_all_names(turn: Turn) -> Turn:
    said = next((turn[name] for name in REASONING if turn.get(name)), None)
    return turn if said is None else {**turn, **dict.fromkeys(REASONING, said)}


def _as_parts(messages: Sequence[Turn]) -> list[dict[str, Any]]:
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} if isinstance(turn["content"], str) else
        dict(turn) for turn in messages
    ]  # fmt: skip


def _until_its_end(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> str:
    """`completion` up to the first control token, that included: the answer and the end of its turn."""
    ids, start = token_ids(tokenizer, prompt + completion), len(token_ids(tokenizer, prompt))
    ends = [token for token in ids[start:] if token in template_of(tokenizer).control]
    if not ends:
        return completion
    closing = str(tokenizer.convert_ids_to_tokens(ends[0]))
    return completion[: completion.index(closing) + len(closing)]


def _refuse_templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn]) -> None:
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
