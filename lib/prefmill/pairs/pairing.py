"""Preferences from answers with scores: every answer against each of a lower score to the same chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, permutations
from typing import NamedTuple

from prefmill.core.files import digest_json
from prefmill.pairs.forms import Found, Judgement, Preference, words
from prefmill.pairs.pictures import image_key
from prefmill.pairs.turns import Answer
from prefmill.store.row_files import SourceRow

FoundRow = tuple[SourceRow, Found]
ScoredRow = tuple[SourceRow, Answer, float]
Group = tuple[Found, list[ScoredRow]]
"""A row's finding, and the answers to its prompt that are compared with each other."""


class UnusableRow(NamedTuple):
    """A row that cannot be used."""

    where: str
    what: str


def prompt_of(found: Found) -> str:
    """A key of what a prompt is: its turns, its images and its tools."""
    images = [image_key(image) for image in found.images]
    # Without tools the key is what it was before they were read, so that the same prompts are held out.
    return digest_json([found.messages, images, *([found.tools] if found.tools else [])])


def row_name(row: SourceRow) -> str:
    """Its own id, or its number."""
    given = row.values.get("id", row.values.get("pair_id"))
    return str(given) if isinstance(given, (str, int)) and str(given) else f"row-{row.number}"


def grouped(rows: Iterable[FoundRow]) -> Iterator[Group]:
    """The answers of each row; those of rows with one answer together by prompt, at the end: they stand anywhere."""
    alone: dict[str, Group] = {}
    for row, found in rows:
        answers = [(row, *item) for item in zip(found.answers, found.scores, strict=True)]
        if len(answers) > 1:
            yield found, answers
        else:
            alone.setdefault(prompt_of(found), (found, []))[1].extend(answers)
    yield from alone.values()


def unpaired(group: Group) -> list[UnusableRow]:
    """The rows of a group that no pair comes of, and why."""
    found, answers = group
    fault = "a tie" if len(answers) > 1 else "its prompt has no other answer"
    if len({score for *_, score in answers}) > 1:
        fault = "its answers say the same"
    elif isinstance(found, Judgement):
        fault = f"its prompt has {'good' if found.is_good else 'bad'} answers only"
    return [UnusableRow(where, f"{fault}: no pair") for where in dict.fromkeys(row.where for row, *_ in answers)]


def pair_up(rows: Iterable[FoundRow], problems: list[UnusableRow]) -> Iterator[tuple[str, Preference]]:
    """Names and preferences; rows that no pair comes of become problems, answers with equal scores are counted."""
    num_ties = 0
    for group in grouped(rows):
        found, answers = group
        pairs = list(_pairs(answers))
        problems += [] if pairs else unpaired(group)
        if not isinstance(found, Judgement):
            num_ties += sum(one[2] == other[2] for one, other in combinations(answers, 2))
        for name, winner, loser in pairs:
            yield name, Preference(found.messages, winner, loser, found.images, found.tools)
    if num_ties:
        print(f"{num_ties:,} ties: answers with equal scores make no pair", flush=True)


def _pairs(answers: list[ScoredRow]) -> Iterator[tuple[str, Answer, Answer]]:
    said = [words(answer) for _, answer, _ in answers]
    for (better, (row, winner, score)), (worse, (other, loser, less)) in permutations(enumerate(answers), 2):
        # Two people may have judged one answer both ways, which is no preference.
        if score > less and said[better] != said[worse]:
            name = row_name(row)
            if row is not other:
                name += f":{row_name(other)}"
            elif len(answers) > 2:
                name += f":{better}:{worse}"
            yield name, winner, loser
