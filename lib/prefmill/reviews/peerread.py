"""PeerRead's review files: one JSON object a paper, its reviews in a list (Kang et al., NAACL 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from prefmill.reviews.files import PlainRow, files_at, json_file_row
from prefmill.reviews.nested import unfold
from prefmill.reviews.row_items import row_items
from prefmill.reviews.rows import Item, RawRow, RowProblem, Skipped, check_fields, excerpt
from prefmill.reviews.source import FileSource

_PAPER = {
    "id", "title", "abstract", "accepted", "conference", "histories", "authors", "comments", "subjects", "version",
    "date_of_submission", "reviews",
}  # fmt: skip
_SCORES = {
    "IMPACT", "SUBSTANCE", "APPROPRIATENESS", "MEANINGFUL_COMPARISON", "SOUNDNESS_CORRECTNESS", "ORIGINALITY",
    "CLARITY", "REPLICABILITY",
}  # fmt: skip
_RATINGS = ("RECOMMENDATION", "SCORE")  # some of its conferences have the latter
_REVIEW = _SCORES | {
    *_RATINGS, "comments", "REVIEWER_CONFIDENCE", "PRESENTATION_FORMAT", "TITLE", "DATE", "OTHER_KEYS",
    "IS_META_REVIEW", "is_meta_review", "IS_ANNOTATED",
}  # fmt: skip
_OF_PAPER, _INDEX = "(paper)", "(index)"  # what a review takes from its paper and place
_NOT_REVIEWS = "parsed_pdfs"  # the papers' texts, which stand beside the reviews


class PeerReadSource(FileSource):
    """A review file, or a folder of them at any depth.

    Meta-reviews, and entries of the discussion that have no RECOMMENDATION, are not reviews and are skipped.
    """

    format: Literal["peerread"]

    def rows(self, source: int) -> Iterator[RawRow | PlainRow | RowProblem]:
        """A row a review, in the order of the files' names."""
        for path in files_at(self.path, (".json",), without=_NOT_REVIEWS):
            row = json_file_row(path, source)
            if isinstance(row, RowProblem):
                yield row
            elif isinstance(row.values.get("reviews"), list):
                yield from unfold(row, lambda paper, index: {_OF_PAPER: paper, _INDEX: index})
            else:
                yield RowProblem(row.place, "no list of reviews", "add one, or remove the file", excerpt(row.values))

    def items(self, values: dict[str, Any]) -> list[Item]:
        """The paper of a file and one of its reviews."""
        own = dict(values)
        paper, index = own.pop(_OF_PAPER), own.pop(_INDEX)
        # PeerRead's conferences spell this key in two ways.
        if own.get("is_meta_review") or own.get("IS_META_REVIEW"):
            return [Skipped("meta-review")]
        rating = next((own[name] for name in _RATINGS if own.get(name) is not None), None)
        if rating is None:
            return [Skipped("comment without a recommendation")]
        check_fields(paper, {"id", "title"}, _PAPER, self.ignore_extra_fields, "file")
        check_fields(own, {"comments"}, _REVIEW, self.ignore_extra_fields, "review")
        paper_id = None if paper["id"] is None else str(paper["id"])
        row = {
            "paper_id": paper_id, "title": paper["title"], "abstract": paper.get("abstract"),
            "decision": paper.get("accepted"), "venue": paper.get("conference"),
            # PeerRead gives reviews no ids; their order in a file is fixed.
            "review_id": f"{paper_id}-r{index}" if paper_id else None, "review_text": own["comments"],
            "rating": rating, "confidence": own.get("REVIEWER_CONFIDENCE"),
            "sub_scores": {name.lower(): own[name] for name in _SCORES & own.keys()},
        }  # fmt: skip
        return row_items(row, self)
