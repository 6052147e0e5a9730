"""Rating scales: a review keeps its venue's own, and ratings of several venues are compared on a common one."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal

from prefmill.core.errors import InputError
from prefmill.core.records import Paper, Review

Scale = tuple[float, float]  # the lowest and the highest rating
COMMON_SCALE: Scale = (1.0, 10.0)  # also that of rows without a scale, as corpora of earlier versions have them
_DIGITS = 6  # an affine map leaves binary fractions, which must not decide ties and thresholds


def scale_of(row: Paper | Review) -> Scale:
    """The scale of a review's rating, or the one that a paper's prompt names."""
    low, high = row.get("scale", COMMON_SCALE)
    return low, high


def rescaled(rating: float, own: Scale, other: Scale) -> float:
    """`rating`, given on the scale `own`, at the same place of the scale `other`."""
    if own == other:
        return rating
    share = (rating - own[0]) / (own[1] - own[0])
    return round(other[0] + share * (other[1] - other[0]), _DIGITS)


def common_rating(review: Review) -> float:
    """The rating on the common scale, 1 to 10."""
    return rescaled(review["rating"], scale_of(review), COMMON_SCALE)


def prompt_scale(scales: Sequence[Scale]) -> Scale:
    """The scale to ask for in a paper's prompt: the most frequent of its reviews' `scales`; of equals, the lowest."""
    if len(set(scales)) == 1:
        return scales[0]
    counts = Counter(scales)
    return min(counts, key=lambda scale: (-counts[scale], scale), default=COMMON_SCALE)


def moments(counts: Mapping[float, int]) -> tuple[float, float, int]:
    """Mean, standard deviation and number of values given as value to count."""
    total = sum(counts.values())
    mean = sum(value * count for value, count in counts.items()) / total
    variance = sum(count * (value - mean) ** 2 for value, count in counts.items()) / total
    return mean, math.sqrt(variance), total


RatingUnit = Literal["points", "quantiles"]


class VenueQuantiles:
    """The place of a rating among all those of its venue: the share below it and half of those equal, in (0, 1).

    A difference of places means the same at venues that rate high and at those that rate low, and on every scale.
    """

    def __init__(self, reviews: Iterable[Review]) -> None:
        counts: defaultdict[str, Counter[float]] = defaultdict(Counter)
        for review in reviews:
            counts[review["venue"]][common_rating(review)] += 1
        self._ratings = {venue: sorted(counted) for venue, counted in counts.items()}
        self._below = {
            venue: [0, *accumulate(counts[venue][rating] for rating in ratings)]
            for venue, ratings in self._ratings.items()
        }

    def rating_at(self, venue: str, place: float) -> float:
        """The lowest of the venue's ratings, in points of 1 to 10, whose place is at least `place`; else infinity.

        Raises InputError for a venue of which no rating was counted.
        """
        if venue not in self._ratings:
            raise InputError(
                "no rating to take quantiles of", where=f"venue {venue}",
                fix="ingest its reviews, or set rating_unit=points",
            )  # fmt: skip
        ratings, below = self._ratings[venue], self._below[venue]
        places = [(low + high) / (2 * below[-1]) for low, high in pairwise(below)]
        return next((rating for rating, found in zip(ratings, places, strict=True) if found >= place), math.inf)

    def __call__(self, review: Review) -> float:
        """The place of the review's rating; its venue must have been counted."""
        ratings, below = self._ratings[review["venue"]], self._below[review["venue"]]
        rating = common_rating(review)
        # Midranks: their mean is 1/2 at every venue, however many of its ratings are equal.
        return (below[bisect_left(ratings, rating)] + below[bisect_right(ratings, rating)]) / (2 * below[-1])
