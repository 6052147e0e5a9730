"""What was read and written, counted for the summary, and what of it deserves a warning."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefmill.core.records import Decision
from prefmill.reviews.rejects import SHOWN_PROBLEMS
from prefmill.reviews.scale import COMMON_SCALE, Scale, moments, rescaled

_JUDGED_REVIEWS, _SHORT_SCALE = 20, 0.6  # from so many on, ratings in the lower part of a scale are of another one
_CLEARLY = 4  # standard errors; more than the usual 2 or 3, as the reviews of a paper are alike
Rated = tuple[int, str, Decision | None, Scale, float]  # source, venue, what became of the paper, scale, rating


@dataclass
class IngestTally:
    """What was read and written, for the summary."""

    rows: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    splits: Counter[str] = field(default_factory=Counter)
    split_reviews: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    ratings: Counter[Rated] = field(default_factory=Counter)
    in_words: list[Mapping[Decision, Counter[float]]] = field(default_factory=list)  # by source
    text_from: Counter[str] = field(default_factory=Counter)
    pages: int = 0
    figures: int = 0
    unreviewed: int = 0
    apart: int = 0
    repeated: int = 0
    older: int = 0
    deleted: int = 0
    orphans: dict[str, int] = field(default_factory=dict)
    merged: list[tuple[str, str]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    html: int = 0
    cut: int = 0

    def warnings(self) -> list[str]:
        """What someone who reads the numbers must know, a sentence each."""
        unknown = _first_of(f"{name} ({count})" for name, count in self.unknown.most_common())
        titles, gone, orphans = self.text_from["nothing"], self.left_out, sum(self.orphans.values())
        said = {
            f"{titles} papers have neither text nor abstract: models see their titles only": titles,
            f"{gone} papers with neither text nor abstract were left out, with their reviews": gone,
            f"{self.repeated} reviews were listed again, word for word, and count once": self.repeated,
            f"{self.older} notes have a newer version by their dates, which counts": self.older,
            f"{self.deleted} reviews, papers and decisions were left out, as a later version is deleted": self.deleted,
            f"{orphans} reviews of {len(self.orphans)} papers that are deleted or not in the sources were left out: "
            f"{_first_of(self.orphans)}": self.orphans,
            f"{self.html} reviews hold HTML, such as <br /> or &amp;, which models would learn: set html: true "
            "in their source to read it as text": self.html,
            f"{self.cut} texts end at 32,767 characters, where sheets cut a cell: export them without one": self.cut,
            _first_of(doubts := [*self._turned_words(), *self._turned_scales(), *self._low_scales()], "; "): doubts,
            f"{len(self.merged)} papers were merged into others with the same title": self.merged,
            f"{self.apart} papers have the title of another that was accepted or rejected where they were not, or has "
            "another venue and abstract: they are kept apart, in one split": self.apart,
            f"{self.unknown.total()} values are unknown and were left out: {unknown}": self.unknown,
        }
        return [text for text, happened in said.items() if happened]

    def common_ratings(self) -> Counter[float]:
        """How often each rating was given, on the common scale."""
        found = Counter[float]()
        for (_, _, _, scale, rating), count in self.ratings.items():
            found[rescaled(rating, scale, COMMON_SCALE)] += count
        return found

    def _ratings_by(self, *places: int) -> defaultdict[tuple[Any, ...], Counter[float]]:
        """How often each rating was given, by these parts of `Rated`."""
        found: defaultdict[tuple[Any, ...], Counter[float]] = defaultdict(Counter)
        for rated, count in self.ratings.items():
            found[tuple(rated[place] for place in places)][rated[-1]] += count
        return found

    def _low_scales(self) -> list[str]:
        # By venue, as one may have changed its scale from a year to the next within a dump.
        return [
            f"no rating of source {source}{venue and f', {venue},'} is above {max(ratings):g} on {low:g} to {high:g}: "
            "set rating_max if its scale ends there"
            for (source, venue, (low, high)), ratings in self._ratings_by(0, 1, 3).items()
            if ratings.total() >= _JUDGED_REVIEWS and max(ratings) - low <= _SHORT_SCALE * (high - low)
        ]

    def _turned_words(self) -> list[str]:
        found = [
            (source, *(moments(said[fate])[0] for fate in ("accepted", "rejected")))
            for source, said in enumerate(self.in_words)
            if said.keys() >= {"accepted", "rejected"}
        ]
        return [
            f"the words of source {source} accept at a mean rating of {good:.3g} and reject at {bad:.3g}: turn "
            "lower_is_better over, unless that is so"
            for source, good, bad in found
            if good < bad
        ]

    def _turned_scales(self) -> list[str]:
        fates = self._ratings_by(0, 2)
        told = {key: moments(ratings) for key, ratings in fates.items() if ratings.total() >= _JUDGED_REVIEWS}
        both = [(key[0], found, told[key[0], "rejected"]) for key, found in told.items()
                if key[1] == "accepted" and (key[0], "rejected") in told]  # fmt: skip
        return [
            f"source {source} has mean ratings of {good[0]:.3g} for accepted papers and of {bad[0]:.3g} for rejected "
            "ones: turn lower_is_better over, unless that is so"
            for source, good, bad in both
            if bad[0] - good[0] > _CLEARLY * math.hypot(*(spread / count**0.5 for _, spread, count in (good, bad)))
        ]


def _first_of(names: Iterable[str], between: str = ", ") -> str:
    shown = list(itertools.islice(names, SHOWN_PROBLEMS + 1))
    return between.join([*shown[:SHOWN_PROBLEMS], *(["..."] if len(shown) > SHOWN_PROBLEMS else [])])
