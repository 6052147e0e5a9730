"""Rating scales: a review keeps its venue's own, and ratings of several venues are compared on a common one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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


def prompt_scale(reviews: Sequence[Review]) -> Scale:
    """The scale to ask for in a paper's prompt: the most frequent of its reviews; of equals, the lowest."""
    counts = Counter(map(scale_of, reviews))
    return min(counts, key=lambda scale: (-counts[scale], scale), default=COMMON_SCALE)
