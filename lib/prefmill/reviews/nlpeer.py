"""NLPeer's folders, those of F1000-22 among them: a folder a paper, in it one a version (Dycke et al., ACL 2023)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from msgspec.structs import replace

from prefmill.core.errors import InputError
from prefmill.reviews.files import PlainRow, json_file_row, json_rows
from prefmill.reviews.openreview_forms import as_sections
from prefmill.reviews.row_items import row_items
from prefmill.reviews.rows import Item, RawRow, RowError, RowProblem, Skipped, clean_text
from prefmill.reviews.source import FileSource

_VERSION = re.compile(r"\d+$")
_PAPER, _META = "(paper)", "(meta)"  # what a review takes from its place and its paper's file


class NLPeerSource(FileSource):
    """A data set's folder: `<paper>/v<number>/reviews.json`, each with its paper's `meta.json` beside it.

    Of a paper, and of a review that is in several versions, the newest counts; a review without an overall score is
    skipped.
    """

    format: Literal["nlpeer"]

    def rows(self, source: int) -> Iterator[RawRow | PlainRow | RowProblem]:
        """A row a review, in order of the folders' names."""
        files = sorted(self.path.rglob("reviews.json"))
        if not files:
            raise InputError(
                "a folder without review files", where=self.path, expected="<paper>/<version>/reviews.json",
                fix="check the source's path",
            )  # fmt: skip
        for file in files:
            folder, meta = file.parent, dict[str, Any]()
            for beside in (folder.parent / "meta.json", folder / "meta.json"):  # a version's own holds
                found = json_file_row(beside, source) if beside.is_file() else None
                if isinstance(found, RowProblem):
                    yield found
                meta |= found.values if isinstance(found, RawRow) else {}
            for row in json_rows(file, source):
                if isinstance(row, RawRow):
                    place = replace(row.place, item=f"{folder.parent.name}/{folder.name}, {row.place.item}")
                    yield RawRow(place, {**row.values, _PAPER: folder, _META: meta})
                else:
                    yield row

    def items(self, values: dict[str, Any]) -> list[Item]:
        """A review and its paper."""
        folder, meta = values[_PAPER], values[_META]
        scores, report, more = (values.get(name) or {} for name in ("scores", "report", "meta"))
        if not all(isinstance(part, dict) for part in (scores, report, more)):
            raise RowError("scores, report and meta are objects", "correct the review, or remove it")
        if scores.get("overall") in (None, ""):
            return [Skipped("review without an overall score")]
        row = {
            "paper_id": folder.parent.name, "title": meta.get("title"), "abstract": meta.get("abstract"),
            "review_id": f"{folder.parent.name}-{values.get('rid')}",  # unique within a paper alone
            "review_text": as_sections({name: clean_text(text, name) for name, text in report.items()}),
            "rating": scores["overall"], "confidence": scores.get("confidence", more.get("confidence")),
            "sub_scores": {name: score for name, score in scores.items() if name not in ("overall", "confidence")},
        }  # fmt: skip
        paper, review, *more = row_items(row, self)
        date = float((_VERSION.search(folder.name) or "0")[0])
        return [replace(paper, date=date), replace(review, date=date), *more]
