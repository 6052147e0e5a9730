"""Contrastive pairs: two reviews of one paper of which one is better by rating and by checklist alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

from prefmill.checklist.scored import ScoredReview
from prefmill.core.errors import InputError
from prefmill.reviews.scale import VenueQuantiles, common_rating

Dropped = Literal[
    "rating_diff_too_small",
    "rating_and_checkmark_disagree",
    "checkmark_diff_too_small",
    "same_text",
    "excluded",
    "over_max_pairs_per_paper",
]
REMEDIES: dict[Dropped, str] = {
    "rating_diff_too_small": "lower min_rating_diff (equal ratings make no pair)",
    "checkmark_diff_too_small": "lower min_checkmark_diff, or use a checklist that tells reviews apart",
    "rating_and_checkmark_disagree": "use a checklist that agrees better with the ratings",
    "same_text": "remove the duplicate reviews from the source",
    "excluded": "take pairs out of the exclude file",
    "over_max_pairs_per_paper": "raise max_pairs_per_paper",
}


@dataclass(frozen=True)
class PairRules:
    """What makes a pair: least differences (of ratings, checkmarks), at most so many a paper, ids left out.

    `min_rating_diff` is in points of 1 to 10, with `quantiles` in shares (0 to 1) of the venue's own ratings.
    """

    min_rating_diff: float
    min_checkmark_diff: float
    max_pairs_per_paper: int | None
    exclude: Collection[str]
    quantiles: VenueQuantiles | None = None

    def rating_gap(self, pair: ReviewPair) -> float:
        """The rating advantage of the chosen side, in the unit of `min_rating_diff`."""
        if self.quantiles is None:
            return pair.rating_diff
        return round(self.quantiles(pair.chosen.review) - self.quantiles(pair.rejected.review), 6)


class ReviewPair(NamedTuple):
    """Two reviews of a paper; both differences are chosen minus rejected and positive."""

    chosen: ScoredReview
    rejected: ScoredReview
    rating_diff: float
    checkmark_diff: float

    @property
    def pair_id(self) -> str:
        """Its name in datasets, telemetry and exclude files."""
        return f"{self.chosen.review['review_id']}:{self.rejected.review['review_id']}"


def pairs_of(reviews: Sequence[ScoredReview], rules: PairRules, dropped: Counter[Dropped]) -> list[ReviewPair]:
    """The pairs that one paper's reviews make under `rules`, by id; those that fail are counted by reason."""
    kept: list[ReviewPair] = []
    for first, second in combinations(reviews, 2):
        pair = orient(first, second)
        reason = fault(pair, rules)
        if reason is None:
            kept.append(pair)
        else:
            dropped[reason] += 1
    limit = rules.max_pairs_per_paper
    if limit is not None and len(kept) > limit:
        dropped["over_max_pairs_per_paper"] += len(kept) - limit
        kept = sorted(kept, key=_clearest_first)[:limit]
    return sorted(kept, key=lambda pair: pair.pair_id)


def orient(first: ScoredReview, second: ScoredReview) -> ReviewPair:
    """The two as a pair whose chosen side has the higher rating; where ratings tie, the higher checkmark score."""
    better, worse = sorted((first, second), key=_standing, reverse=True)
    # Rounded: sums of weights such as 0.1 + 0.2 must not fall short of a threshold by a binary fraction.
    return ReviewPair(
        better,
        worse,
        round(common_rating(better.review) - common_rating(worse.review), 6),
        round(better.evaluation["checkmark_score"] - worse.evaluation["checkmark_score"], 6),
    )


def fault(pair: ReviewPair, rules: PairRules) -> Dropped | None:
    """Why `pair` does not count, or None; the filters apply in the order of `Dropped`, disagreement before size."""
    if pair.rating_diff <= 0 or rules.rating_gap(pair) < rules.min_rating_diff:
        return "rating_diff_too_small"
    if pair.checkmark_diff < 0:
        return "rating_and_checkmark_disagree"
    if pair.checkmark_diff < rules.min_checkmark_diff:
        return "checkmark_diff_too_small"
    # By words, as two copies of a review may differ in their line breaks.
    if pair.chosen.review["text"].split() == pair.rejected.review["text"].split():
        return "same_text"
    # Last, so that it counts only pairs that would be kept: none at all shows that the file is of other datasets.
    return "excluded" if pair.pair_id in rules.exclude else None


def read_exclude(path: Path) -> frozenset[str]:
    """The pair ids in a text file, one a line; blank lines and lines that begin with `#` do not count."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot read the exclude file", where=path, got=error, fix="correct `exclude`") from None
    return frozenset(line for line in lines if line and not line.startswith("#"))


def _standing(scored: ScoredReview) -> tuple[float, float, str]:
    return common_rating(scored.review), scored.evaluation["checkmark_score"], scored.review["review_id"]


def _clearest_first(pair: ReviewPair) -> tuple[float, float, str]:
    # The id comes last, so that equal pairs are cut alike in every run.
    return -pair.checkmark_diff, -pair.rating_diff, pair.pair_id
