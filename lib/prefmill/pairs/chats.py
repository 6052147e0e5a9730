"""Chats from elsewhere to fine-tune on: turns, prompts with completions, and the chosen side of preferences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from prefmill.core.errors import InputError
from prefmill.pairs.formats import FORMS
from prefmill.pairs.forms import Form, Judgement, Parse, Row, Tags
from prefmill.pairs.pairing import FoundRow, Group, UnusableRow, grouped, prompt_of, row_name, unpaired
from prefmill.pairs.sources import PairSource, parsed_rows
from prefmill.pairs.turns import Chat, alpaca_prompt, as_answer, as_chat, place_images, sole_answer
from prefmill.pairs.writing import OwnRow, beside, own_rows, write_split

# Without these a row of a preference would have the keys of two forms, which is refused. LLaMA-Factory's `kto_tag` is a
# label: without it bad answers would be learnt.
_PREFERENCE_KEYS = ("chosen", "rejected", "label", "kto_tag")


def _chat(key: str) -> Parse:
    """A chat in the column `key` that ends with the answer."""

    def parse(row: Row, tags: Tags) -> Judgement:
        chat = as_chat(row[key], key, tags)
        # The last turn alone is the answer: whether earlier ones are trained is for `train_on` to say.
        answer = sole_answer(chat.turns[-1:], key)
        turns, images = place_images(Chat(chat.turns[:-1], chat.images), row)
        return Judgement(turns, answer, True, images)

    return parse


def prompt_completion(row: Row, tags: Tags) -> Judgement:
    """`{prompt, completion}` as text or messages: `unpaired` without its label."""
    found = FORMS["unpaired"].parse({**row, "label": True}, tags)
    assert isinstance(found, Judgement)
    return found


def instruction_output(row: Row, tags: Tags) -> Judgement:
    """`{instruction, input, output}`, `system` and `history` where there are any: Alpaca."""
    turns, images = place_images(Chat(alpaca_prompt(row)), row)
    return Judgement(turns, row["output"], True, images)


CHAT_FORMS: Mapping[str, Form] = {
    **FORMS,
    "messages": Form({"messages": "list"}, _chat("messages"), [*_PREFERENCE_KEYS, "rejected_response", "completion"]),
    "conversations": Form({"conversations": "list"}, _chat("conversations"), _PREFERENCE_KEYS),
    "prompt_completion": Form(
        {"prompt": "text or list", "completion": "text or list"}, prompt_completion, _PREFERENCE_KEYS
    ),
    "instruction_output": Form({"instruction": "text", "output": "text"}, instruction_output, _PREFERENCE_KEYS),
}


class ChatSource(PairSource):
    """A dataset to fine-tune on that build_datasets did not make: chats, or preferences, of which the chosen side."""

    forms: ClassVar[Mapping[str, Form]] = CHAT_FORMS


def write_chats(source: ChatSource, folder: Path, report: Path) -> tuple[Path, Path | None]:
    """Write the source's answers as prefmill's own rows into `folder`; returns the train file, and val where asked for.

    An answer that several pairs choose is written once, one that a label calls bad is left out. Raises InputError
    naming the first bad row, or with `on_bad_row: drop` lists them in `report` and raises where no answer is left.
    """
    problems: list[UnusableRow] = []
    chats = tqdm(_distinct(_good(source, problems)), desc="reading chats", unit=" chats")

    def own_row(name: str, chat: Judgement) -> OwnRow:
        return prompt_of(chat), _own_row(name, chat, source, folder)

    def rows() -> Iterator[OwnRow]:
        row = None
        for row in own_rows(chats, own_row, source, problems, report):
            yield row
        if row is None:
            raise InputError("no answers to train on", where=source.source_name, fix=f"see the rows in {report}")

    return write_split(rows(), source, folder, "sft")


def _good(source: ChatSource, problems: list[UnusableRow]) -> Iterator[tuple[str, Judgement]]:
    scored: list[FoundRow] = []  # rows of one answer, whose prompt's others stand anywhere
    for row, found in parsed_rows(source, problems):
        if isinstance(found, Judgement):
            yield from [(row_name(row), found)] if found.is_good else []
        elif len(found.answers) > 1:
            yield from _best(grouped([(row, found)]), problems)
        else:
            scored.append((row, found))
    yield from _best(grouped(scored), problems)


def _best(groups: Iterable[Group], problems: list[UnusableRow]) -> Iterator[tuple[str, Judgement]]:
    for group in groups:
        chat, answers = group
        best = max(score for *_, score in answers)
        if best == min(score for *_, score in answers):
            problems += unpaired(group)
            continue
        yield from (
            (row_name(row), Judgement(chat.messages, answer, True, chat.images, chat.tools))
            for row, answer, score in answers if score == best
        )  # fmt: skip


def _distinct(chats: Iterable[tuple[str, Judgement]]) -> Iterator[tuple[str, Judgement]]:
    seen: set[str] = set()
    for name, chat in chats:
        # The key holds images and tools too: the same words about another picture are another example.
        key = prompt_of(replace(chat, messages=[*chat.messages, as_answer(chat.answer)]))
        if key not in seen:
            seen.add(key)
            yield name, chat


def _own_row(name: str, chat: Judgement, source: PairSource, folder: Path) -> dict[str, Any]:
    messages = [*chat.messages, as_answer(chat.answer)]
    return {"id": name, "messages": messages, **beside(name, chat, source, folder)}
