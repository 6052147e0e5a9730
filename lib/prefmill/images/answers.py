"""What people answered: a file that every answer is on before the next question is asked."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from prefmill.core.errors import InputError
from prefmill.core.files import sync_folder
from prefmill.core.image_rows import Dimension, Rating
from prefmill.images.collection import GoodImage
from prefmill.images.rating import Matchup, draw
from prefmill.store.jsonl import to_json

Choice = Literal["left", "right", "tie", "skip"]


class RaterAnswer(TypedDict):
    """A line of the file; the digests tell whether the images are still those that were seen."""

    rater: str
    matchup: str
    dimension: Dimension
    choice: Choice
    left: str
    right: str
    left_sha256: str
    right_sha256: str


@dataclass(frozen=True)
class ShownPair:
    """What a rater is shown: two images, side by side, and the dimension asked about."""

    left: GoodImage
    right: GoodImage
    dimension: Dimension

    @property
    def matchup_id(self) -> str:
        """Names the two images, whichever side they are on."""
        return ":".join(sorted((self.left.source.image_id, self.right.source.image_id)))


class AnswerBook:
    """The answers of all raters. A line is an answer, or takes a rater's last one back.

    Raises InputError where a line other than the last cannot be read: nothing that people did is thrown away.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, list[RaterAnswer]] = defaultdict(list)
        for line in _whole_lines(path):
            self._replay(line)
        # Unbuffered: after a failed write no part of the line waits in memory to be written with the next one.
        self._stream = path.open("ab", buffering=0)
        # A new file is listed in its folder: unless that is on disk too, a power cut loses the whole file.
        sync_folder(path.parent)

    def of(self, rater: str) -> Sequence[RaterAnswer]:
        """A rater's answers, in the order they were given."""
        return self._answers.get(rater, [])

    def raters(self) -> list[str]:
        """Everybody who has answered."""
        return sorted(name for name, answers in self._answers.items() if answers)

    def add(self, answer: RaterAnswer) -> None:
        """Add an answer; it is on disk when this returns."""
        self._append(dict(answer))
        self._answers[answer["rater"]].append(answer)

    def undo(self, rater: str) -> None:
        """Take a rater's last answer back, if there is one; that is on disk when this returns."""
        if self._answers.get(rater):
            self._append({"rater": rater, "undo": True})
            self._answers[rater].pop()

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def _append(self, row: dict[str, Any]) -> None:
        size = self._path.stat().st_size
        try:
            self._stream.write(to_json(row).encode() + b"\n")
            os.fsync(self._stream.fileno())
        except OSError:  # a full disk takes part of a line: what was not kept must not stand in the way of the next
            os.truncate(self._path, size)
            raise

    def _replay(self, row: dict[str, Any]) -> None:
        answers = self._answers[row["rater"]]
        if row.get("undo"):
            del answers[-1:]  # none where somebody deleted a damaged line before it
        else:
            answers.append(RaterAnswer(**row))  # type: ignore[typeddict-item]


class Session:
    """Who is asked what: each rater's pairs in an order of their own, until every pair has raters enough."""

    def __init__(
        self, book: AnswerBook, matchups: Sequence[Matchup], dimensions: Sequence[Dimension], raters_per_pair: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.book, self.dimensions, self._seed = book, tuple(dimensions), seed
        self._matchups = {item.matchup_id: item for item in matchups}
        self._needed = raters_per_pair
        self._done: dict[str, dict[str, set[Dimension]]] = defaultdict(lambda: defaultdict(set))
        self._complete: Counter[str] = Counter()  # for every pair, the raters who answered all of its questions
        self._full: set[str] = set()  # pairs that have raters enough
        self._order: dict[str, dict[str, int]] = {}
        for rater in book.raters():
            for row in filter(self._is_valid, book.of(rater)):
                self._count(row, 1)

    def known_as(self, name: str) -> str:
        """The name under which a person has answered before, large letters or small; else the one given."""
        known = self.book.raters()
        return name if name in known else next((item for item in known if item.casefold() == name.casefold()), name)

    def question(self, rater: str) -> ShownPair | None:
        """What `rater` is asked next: first what they began, then pairs that lack raters; None when that is all."""
        name = next(self._open_pairs(rater), None)
        if name is None:
            return None
        answered = self._done[rater].get(name, ())
        left, right = self._matchups[name].placed(self._seed, rater)
        return ShownPair(left, right, next(item for item in self.dimensions if item not in answered))

    def after(self, rater: str) -> Matchup | None:
        """The pair that will probably be asked after this one, to have its images fetched."""
        following = next(itertools.islice(self._open_pairs(rater), 1, None), None)
        return None if following is None else self._matchups[following]

    def answer(self, rater: str, shown: ShownPair, choice: Choice) -> None:
        """Record `choice` about what `rater` was shown; nothing where they have answered that, or it is not asked here.

        Others may have rated the pair enough since it was shown: the answer still is about that pair and no other.
        """
        name, left, right = shown.matchup_id, shown.left, shown.right
        if name not in self._matchups or shown.dimension not in set(self.dimensions) - self._done[rater][name]:
            return
        row = RaterAnswer(
            rater=rater, matchup=name, dimension=shown.dimension, choice=choice,
            left=left.source.image_id, right=right.source.image_id, left_sha256=left.sha256, right_sha256=right.sha256,
        )  # fmt: skip
        self.book.add(row)
        self._count(row, 1)

    def undo(self, rater: str) -> None:
        """Take the last answer of `rater` back, so that it is asked again; not one about other images or questions."""
        given = self.book.of(rater)
        if given and self._is_valid(row := given[-1]):
            self.book.undo(rater)
            self._count(row, -1)

    def number(self, rater: str) -> int:
        """How many answers `rater` has given: tells a page that is behind from one that is not."""
        return len(self.book.of(rater))

    def progress(self, rater: str) -> tuple[int, int]:
        """Pairs this rater has completed, and those they have completed or may still be asked."""
        # From what this rater did, not from every pair: it is asked at each answer, and pairs may be thousands.
        mine = self._done[rater]
        complete = {name for name, answered in mine.items() if len(answered) == len(self.dimensions)}
        begun = {name for name, answered in mine.items() if answered} - complete
        return len(complete), len(self._matchups) + len(self._full & (complete | begun)) - len(self._full)

    def num_rated(self) -> int:
        """Pairs that have raters enough."""
        return len(self._full)

    @property
    def is_complete(self) -> bool:
        """Whether every pair has."""
        return self.num_rated() == len(self._matchups)

    @property
    def num_left_out(self) -> int:
        """Answers in the file that are about other images or questions than are asked now."""
        given = [row for rater in self.book.raters() for row in self.book.of(rater)]
        return sum(not self._is_valid(row) for row in given)

    def ratings(self) -> list[Rating]:
        """Every answer about the images of this session, as rows of ratings.csv."""
        rows = [row for rater in self.book.raters() for row in self.book.of(rater) if self._is_valid(row)]
        return [
            Rating(
                prompt_id=self._matchups[row["matchup"]].prompt_id, left=row["left"], right=row["right"],
                rater=row["rater"], dimension=row["dimension"], choice=row["choice"],
            )
            for row in rows
        ]  # fmt: skip

    def _is_valid(self, row: RaterAnswer) -> bool:
        """Whether an answer is about these images, as they are now; others stay in the file."""
        matchup = self._matchups.get(row["matchup"])
        if matchup is None or row["dimension"] not in self.dimensions:
            return False
        # By digest too, not by id alone: generating again with another model gives other images under the same ids.
        seen = {row["left"]: row["left_sha256"], row["right"]: row["right_sha256"]}
        return seen == {image.source.image_id: image.sha256 for image in (matchup.first, matchup.second)}

    def _count(self, row: RaterAnswer, by: Literal[1, -1]) -> None:
        answered = self._done[row["rater"]][row["matchup"]]
        before = len(answered) == len(self.dimensions)
        answered.add(row["dimension"]) if by == 1 else answered.discard(row["dimension"])
        self._complete[row["matchup"]] += (len(answered) == len(self.dimensions)) - before
        is_full = self._complete[row["matchup"]] >= self._needed
        self._full.add(row["matchup"]) if is_full else self._full.discard(row["matchup"])

    def _open_pairs(self, rater: str) -> Iterator[str]:
        """What `rater` may still be asked, in order: first what they began, even if others have rated it enough."""
        mine, order = self._done[rater], self._ordered(rater)
        begun = [name for name, answered in mine.items() if 0 < len(answered) < len(self.dimensions)]
        yield from sorted(begun, key=order.__getitem__)
        yield from (name for name in order if name not in self._full and not mine.get(name))

    def _ordered(self, rater: str) -> dict[str, int]:
        # In an order per rater: with a common one, an early end leaves the same last pairs without any rater.
        if rater not in self._order:
            drawn = sorted(self._matchups, key=lambda name: draw(self._seed, "order", rater, name))
            self._order[rater] = {name: place for place, name in enumerate(drawn)}
        return self._order[rater]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The file's rows; an end that a killed process left torn is cut off."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    good = 0
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
            assert isinstance(row["rater"], str)
            assert row.get("undo") or RaterAnswer.__required_keys__ <= row.keys()
        except (ValueError, AssertionError, KeyError):
            # After a power cut some file systems leave zeros where data was not written yet: no answers, so cut off.
            if any(rest.strip(b"\0") for rest in lines[number:]):
                raise InputError(
                    "unreadable answer", where=f"{path}:{number}", got=repr(line[:80]),
                    fix="correct or delete that line: the answers behind it are kept",
                ) from None  # fmt: skip
            break
        rows.append(row)
        good += len(line) + 1
    os.truncate(path, good)
    return rows
