"""Ratings as votes: one a rater, pair and dimension; what a rater said twice or both ways is set aside."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefmill.core.image_rows import DIMENSIONS, Dimension, Rating
from prefmill.images.collection import GoodImage, Quarantine

PairKey = tuple[str, str]  # image ids, the smaller first
_BIAS_VOTES, _BIAS_Z = 20, 4.0  # so many votes and standard errors before a rater's side counts as a habit


@dataclass
class RaterFigures:
    """How one rater answered."""

    choices: Counter[str] = field(default_factory=Counter)
    lefts: Counter[PairKey] = field(default_factory=Counter)  # left answers less right ones, over a pair's dimensions

    @property
    def prefers_a_side(self) -> bool:
        """Whether the side an image stood on tells the answer, far beyond chance."""
        # Answers to one pair's dimensions go together: pairs are what chance puts left or right.
        chance = sum(count**2 for count in self.lefts.values()) ** 0.5
        answered = self.choices["left"] + self.choices["right"]
        return answered >= _BIAS_VOTES and abs(self.lefts.total()) > _BIAS_Z * chance


@dataclass
class Votes:
    """By dimension and pair, each rater's vote for the first image: 1, 0, or 1/2 for a tie."""

    of: dict[Dimension, dict[PairKey, dict[str, float]]] = field(
        default_factory=lambda: {name: defaultdict(dict) for name in DIMENSIONS}
    )
    raters: dict[str, RaterFigures] = field(default_factory=lambda: defaultdict(RaterFigures))

    def pairs(self) -> list[PairKey]:
        """Every pair with a vote, sorted."""
        return sorted({pair for pairs in self.of.values() for pair, votes in pairs.items() if votes})

    def share(self, pair: PairKey, dimension: Dimension) -> float | None:
        """The share of the votes for the first image, ties half each; None where nobody voted."""
        votes = self.of[dimension].get(pair)
        return sum(votes.values()) / len(votes) if votes else None

    def agreement(self, dimension: Dimension) -> float | None:
        """The share of two raters' answers to the same question that are equal; None where there are no two."""
        same = total = 0
        for votes in self.of[dimension].values():
            counts = Counter(votes.values())
            # Pairs of raters are counted, not raters: with two raters per pair this is their plain agreement.
            total += len(votes) * (len(votes) - 1) // 2
            same += sum(count * (count - 1) // 2 for count in counts.values())
        return same / total if total else None


def count_votes(
    ratings: Iterable[tuple[str, Rating]], images: Mapping[str, GoodImage], quarantine: Quarantine
) -> Votes:
    """The votes of all ratings; what cannot count is set aside, both answers of a rater who gave two."""
    votes = Votes()
    first: dict[tuple[str, Dimension, PairKey], tuple[str, Rating]] = {}
    for where, rating in ratings:
        pair = _pair(rating)
        bad = next((name for name in pair if name not in images), None)
        # Without the sides: the same answer given again with left and right exchanged is a duplicate too.
        asked = (rating["rater"], rating["dimension"], pair)
        if bad is not None:
            quarantine.add("rating", where, "its image cannot be used", image_id=bad)
        elif asked not in first:
            first[asked] = (where, rating)
        elif _vote(first[asked][1]) == _vote(rating):
            quarantine.add("rating", where, "duplicate row", first=first[asked][0], row=dict(rating))
        else:
            quarantine.add("rating", where, "the rater said otherwise", first=first[asked][0], row=dict(rating))
            first[asked] = (first[asked][0], {**rating, "choice": "skip"})
    # In a second pass: a later row may still take an earlier one back.
    for (rater, dimension, pair), (_, rating) in first.items():
        vote = _vote(rating)
        votes.raters[rater].choices[rating["choice"]] += 1
        votes.raters[rater].lefts[pair] += {"left": 1, "right": -1}.get(rating["choice"], 0)
        if vote is not None:
            votes.of[dimension][pair][rater] = vote
    return votes


def figures(votes: Votes) -> dict[str, Any]:
    """What a summary says of votes: per dimension their number, ties and agreement; per rater the answers."""
    dimensions = {}
    for name in DIMENSIONS:
        values = list(itertools.chain.from_iterable(item.values() for item in votes.of[name].values()))
        agreement = votes.agreement(name)
        dimensions[name] = {
            "num_votes": len(values),
            "num_ties": values.count(0.5),
            "agreement": None if agreement is None else round(agreement, 6),
        }
    told = {"left": "num_left", "right": "num_right", "tie": "num_ties", "skip": "num_skips"}
    found = sorted(votes.raters.items())
    raters = {name: {key: one.choices[choice] for choice, key in told.items()} for name, one in found}
    return {"dimensions": dimensions, "raters": raters}


def _pair(rating: Rating) -> PairKey:
    return min(rating["left"], rating["right"]), max(rating["left"], rating["right"])


def _vote(rating: Rating) -> float | None:
    """For the pair's first image."""
    chosen = {"left": rating["left"], "right": rating["right"]}.get(rating["choice"])
    if chosen is None:
        return 0.5 if rating["choice"] == "tie" else None
    return float(chosen == _pair(rating)[0])
