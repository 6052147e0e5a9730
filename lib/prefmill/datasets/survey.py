"""The first pass over a scored corpus: what is there, where the one SFT cut of all splits falls, what can be made."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prefmill.checklist.scored import FAILURES, ScoredPaper
from prefmill.core.artifact import Artifact
from prefmill.core.errors import ArtifactError, ConfigError, InputError
from prefmill.core.records import EvaluationScores, Modality, Standing
from prefmill.datasets.registry import SPLITS, DatasetSplit
from prefmill.reviews.prompt import review_images


class Rank(NamedTuple):
    """A review's place, best first: checkmark score, then mean P(yes), then 64 bits of sha256 of its id."""

    minus_checkmark_score: float
    minus_mean_p_yes: float
    id_hash: int

    def __str__(self) -> str:
        return f"the cut at score {-self.minus_checkmark_score:g} and mean P(yes) {-self.minus_mean_p_yes:.3g}"


def rank(evaluation: EvaluationScores) -> Rank:
    """The place of a review; smaller is better, and no two reviews are equal."""
    # A hash and not the id itself: ids of a source often begin alike, and one source would win all ties.
    digest = hashlib.sha256(evaluation["review_id"].encode()).digest()
    return Rank(-evaluation["checkmark_score"], -evaluation["mean_p_yes"], int.from_bytes(digest[:8]))


class Ranking:
    """The ranks of many reviews in 24 bytes each, so that a million take 24 MB."""

    def __init__(self) -> None:
        self._scores, self._probabilities, self._hashes = array("d"), array("d"), array("Q")

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, item: Rank) -> None:
        """Take in one review."""
        self._scores.append(item.minus_checkmark_score)
        self._probabilities.append(item.minus_mean_p_yes)
        self._hashes.append(item.id_hash)

    def cut(self, fraction: float) -> Rank:
        """The last rank inside the best `fraction` (0, 1] of the reviews, at least one; there must be some."""
        import numpy as np

        assert len(self), "no reviews to rank"
        # lexsort takes its last argument first: the order of Rank, from behind.
        order = np.lexsort((self._hashes, self._probabilities, self._scores))
        last = int(order[num_selected(len(self), fraction) - 1])
        return Rank(self._scores[last], self._probabilities[last], self._hashes[last])

    def num_tied(self, cut: Rank) -> int:
        """How many reviews have the checkmark score at which the cut falls."""
        import numpy as np

        return int((np.asarray(self._scores) == cut.minus_checkmark_score).sum())


def num_selected(num_reviews: int, fraction: float) -> int:
    """`fraction` of `num_reviews`, rounded down, at least 1; 0.29 of 100 is 29 in spite of binary fractions."""
    return max(1, math.floor(fraction * num_reviews + 1e-9))


CUT_SPLIT: DatasetSplit = "train"  # the cut is taken here and applied to every split


@dataclass
class Survey:
    """Counts of a scored corpus; `with_images` counts papers of the wanted splits by image modality."""

    papers: Counter[str] = field(default_factory=Counter)
    reviews: Counter[str] = field(default_factory=Counter)
    wanted_decision: Counter[str] = field(default_factory=Counter)
    with_images: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    num_unscored: int = 0
    first_unscored: str | None = None
    ranking: Ranking = field(default_factory=Ranking)


def survey(papers: Iterable[ScoredPaper], modalities: Collection[Modality], decisions: Collection[Standing]) -> Survey:
    """Count `papers` by split, and rank the reviews of the split that the SFT cut is taken on."""
    found = Survey()
    for paper, reviews, unscored in papers:
        split = paper["split"]
        found.papers[split] += 1
        found.reviews[split] += len(reviews)
        found.decisions[paper["decision"] or "unknown"] += 1
        found.wanted_decision[split] += (paper["decision"] or "unknown") in decisions
        found.with_images.update(modality for modality in modalities if review_images(paper, modality))
        if unscored:
            found.num_unscored += len(unscored)
            found.first_unscored = found.first_unscored or unscored[0]
        # Not of val as well: a cut of its own would mean another quality there.
        if split == CUT_SPLIT:
            for scored in reviews:
                found.ranking.add(rank(scored.evaluation))
    return found


def check_scored(found: Survey, scores: Sequence[Artifact], allow_unscored: bool) -> None:
    """Raise ArtifactError when reviews have no evaluation, unless that is allowed."""
    if not found.num_unscored or allow_unscored:
        return
    raise ArtifactError(
        f"{found.num_unscored:,} reviews have no evaluation", where=scores[0].path,
        got=f"no evaluation of {found.first_unscored!r}, for one",
        expected=f"{found.num_unscored + found.reviews.total():,} evaluations",
        fix=f"{_why_unscored(found.num_unscored, scores)}, or set allow_unscored: true to build on the scored ones",
    )  # fmt: skip


def check_buildable(
    found: Survey, splits: Collection[DatasetSplit], modalities: Collection[Modality], decisions: Collection[Standing]
) -> None:
    """Raise InputError or ConfigError, before anything is written, when a wanted dataset cannot have rows."""
    for split in splits:
        if not found.reviews[split]:
            raise InputError(
                f"no scored reviews in split '{split}'", got=dict(sorted(found.reviews.items())),
                expected=f"reviews of papers with split '{split}'",
                fix="ingest more papers, as titles decide the split, or give it a larger share in ingest_reviews"
                f"{leaving_out(split)}",
            )  # fmt: skip
        if not found.wanted_decision[split]:
            raise InputError(
                f"no {' or '.join(decisions)} papers in split '{split}'",
                got=f"decisions in the corpus: {dict(sorted(found.decisions.items()))}",
                expected=f"papers with decision in {list(decisions)}, to make preference pairs of",
                fix=f"name the decisions that the corpus has: decisions: [{', '.join(sorted(found.decisions))}]",
            )  # fmt: skip
    lacking = [modality for modality in modalities if modality != "clean" and not found.with_images[modality]]
    if lacking:
        images = "figures" if lacking[0] == "clean_images" else "page images"
        rest = ", ".join(modality for modality in modalities if modality not in lacking)
        raise ConfigError(
            f"modality '{lacking[0]}' is asked for, but no paper has {images}",
            fix=f"ingest the papers' PDFs or {images}" + (f", or leave it out: modalities: [{rest}]" if rest else ""),
        )


def _why_unscored(num_unscored: int, scores: Sequence[Artifact]) -> str:
    failed = sum(entry.rows or 0 for shard in scores for entry in shard.manifest.files if entry.path == FAILURES)
    if any(shard.manifest.config.get("limit") or shard.manifest.config.get("debug") for shard in scores):
        return "score_reviews ran with `limit` or `debug`: rerun it without"
    if failed == num_unscored:
        return f"the engine failed on them, as {FAILURES} of the scores says: fix that and rerun score_reviews"
    return "give every shard of score_reviews"


def leaving_out(split: DatasetSplit) -> str:
    """The way out without `split`, as a remedy goes on; none without train, where the SFT cut is taken."""
    rest = [other for other in SPLITS if other != split]
    return f", or leave the split out: splits: [{', '.join(rest)}]" if CUT_SPLIT in rest else ""
