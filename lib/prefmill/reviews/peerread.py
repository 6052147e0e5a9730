"""PeerRead's review files: one JSON object a paper, its reviews in a list (Kang et al., NAACL 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from msgspec.structs import replace

from prefmill.reviews.files import as_row, files_at, json_file_row
from prefmill.reviews.rows import (
    Item,
    PaperRow,
    RawRow,
    ReviewRow,
    RowError,
    RowProblem,
    Skipped,
    check_fields,
    clean_text,
    parse_id,
    parse_score,
    required_text,
)
from prefmill.reviews.source import FileSource

_REQUIRED = {"id", "title", "reviews"}
_VALID = _REQUIRED | {
    "abstract", "accepted", "conference", "histories", "authors", "comments", "subjects", "version",
    "date_of_submission",
}  # fmt: skip
_SCORES = {
    "IMPACT", "SUBSTANCE", "APPROPRIATENESS", "MEANINGFUL_COMPARISON", "SOUNDNESS_CORRECTNESS", "ORIGINALITY",
    "CLARITY", "REPLICABILITY",
}  # fmt: skip
_RATINGS = ("RECOMMENDATION", "SCORE")  # some of its conferences have the latter
_REVIEW_VALID = _SCORES | {
    *_RATINGS, "comments", "REVIEWER_CONFIDENCE", "PRESENTATION_FORMAT", "TITLE", "DATE", "OTHER_KEYS",
    "IS_META_REVIEW", "is_meta_review", "IS_ANNOTATED",
}  # fmt: skip
# What a review takes from its paper and place when a file is unfolded.
_PAPER, _VENUE, _INDEX = "(paper)", "(conference)", "(index)"
_NOT_REVIEWS = "parsed_pdfs"  # the papers' texts, which stand beside the reviews


class PeerReadSource(FileSource):
    """A review file, or a folder of them at any depth.

    Meta-reviews, and entries of the discussion that have no RECOMMENDATION, are not reviews and are skipped.
    """

    format: Literal["peerread"]

    def rows(self, source: int) -> Iterator[RawRow | RowProblem]:
        """A row a paper, in the order of the files' names, each followed by a row a review."""
        for path in files_at(self.path, (".json",), without=_NOT_REVIEWS):
            row = json_file_row(path, source)
            yield row
            if isinstance(row, RawRow) and isinstance(row.values.get("reviews"), list):
                yield from _unfold(row)

    def items(self, values: dict[str, Any]) -> list[Item]:
        """The paper of a file, or one of its reviews."""
        if _INDEX in values:
            return self._review(values)
        check_fields(values, _REQUIRED, _VALID, self.ignore_extra_fields, "file")
        if not isinstance(values["reviews"], list):
            raise RowError(f"reviews is not a list but {type(values['reviews']).__name__}", "write a list of reviews")
        accepted = values.get("accepted")
        if accepted not in (True, False, None):
            raise RowError(f"accepted is {accepted!r}", "write true, false or null")
        paper = PaperRow(
            paper_id=self._paper_id(values["id"]),
            title=required_text(values["title"], "title"),
            abstract=clean_text(values.get("abstract"), "abstract"),
            decision=None if accepted is None else "accepted" if accepted else "rejected",
            venue=clean_text(values.get("conference"), "conference") or self.venue,
        )
        return [paper]

    def _review(self, entry: dict[str, Any]) -> list[Item]:
        # PeerRead's conferences spell this key in two ways.
        if entry.get("is_meta_review") or entry.get("IS_META_REVIEW"):
            return [Skipped("meta-review")]
        rating = next((entry[name] for name in _RATINGS if entry.get(name) is not None), None)
        if rating is None:
            return [Skipped("comment without a recommendation")]
        own = {name: value for name, value in entry.items() if name not in (_PAPER, _VENUE, _INDEX)}
        check_fields(own, {"comments"}, _REVIEW_VALID, self.ignore_extra_fields, "review")
        paper_id = self._paper_id(entry[_PAPER])
        confidence, unknown = self.confidence(entry.get("REVIEWER_CONFIDENCE"))
        review = ReviewRow(
            # PeerRead gives reviews no ids; their order in a file is fixed.
            review_id=f"{paper_id}-r{entry[_INDEX]}",
            paper_id=paper_id,
            text=required_text(entry["comments"], "comments"),
            rating=self.rating(rating),
            scale=self.written_scale,
            confidence=confidence,
            venue=clean_text(entry[_VENUE], "conference") or self.venue,
            # Sorted, as a set of strings has another order in every process.
            sub_scores={key.lower(): parse_score(entry[key], key) for key in sorted(_SCORES & entry.keys())},
        )
        return [review, *unknown]

    def _paper_id(self, value: Any) -> str:
        return parse_id("" if value is None else str(value), "id", self.id_prefix)


def _unfold(row: RawRow) -> Iterator[RawRow | RowProblem]:
    """The reviews of a file, each with what it takes from its paper."""
    paper = {_PAPER: row.values.get("id"), _VENUE: row.values.get("conference")}
    for index, entry in enumerate(row.values["reviews"]):
        review = as_row(entry, replace(row.place, item=f"reviews[{index}]"))
        if isinstance(review, RawRow):
            review.values.update({**paper, _INDEX: index})
        yield review
