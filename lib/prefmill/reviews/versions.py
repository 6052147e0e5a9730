"""Two rows about one paper: which of them stands, and where they contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from prefmill.core.records import Decision
from prefmill.reviews.rows import PaperRow, Place, RowError, word_key
from prefmill.reviews.splits import title_key

MERGED_FIELDS = ("abstract", "text", "decision", "venue")


def filled(paper: PaperRow, other: PaperRow) -> PaperRow:
    """`paper` with what it lacks taken from `other`."""
    return replace(paper, **{name: getattr(other, name) for name in MERGED_FIELDS if not getattr(paper, name)})


def require_agreement(earlier: PaperRow, later: PaperRow, place: Place) -> None:
    """Raise RowError where two rows of a paper say different things; `place` is the earlier one's."""
    differing = [name for name in MERGED_FIELDS if differ(getattr(earlier, name), getattr(later, name))]
    if title_key(earlier.title) != title_key(later.title):
        differing.insert(0, "title")
    if differing:
        raise RowError(
            f"paper {later.paper_id} has another {' and '.join(differing)} at {place.brief}",
            "make the rows of one paper agree, or give different papers different ids (id_prefix)",
        )


def differ(one: Any, two: Any) -> bool:
    """Whether both are given and are not the same, as dates that tell which version is the newer one."""
    return bool(one and two and one != two)


def as_one(papers: Iterable[PaperRow]) -> list[tuple[PaperRow, list[str]]]:
    """Papers of one title, the smallest id first: each that stands, and the ids of those that are merged into it.

    Its own values stand; what it lacks comes from the next that has it. What was submitted twice stays two papers:
    their reviews are of different versions.
    """
    found: list[tuple[PaperRow, list[str]]] = []
    for paper in papers:
        for at, (kept, ids) in enumerate(found):
            if not _resubmitted(kept, paper):
                found[at] = filled(kept, paper), [*ids, paper.paper_id]
                break
        else:
            found.append((paper, []))
    return found


def _resubmitted(one: PaperRow, two: PaperRow) -> bool:
    """Whether one was accepted and one rejected, or two venues have each an abstract of its own."""
    if differ(one.decision, two.decision) and final(one.decision, two.decision) is None:
        return True
    # Both, as dumps of one venue may cut an abstract.
    return are_two_venues(one.venue, two.venue) and differ(word_key(one.abstract), word_key(two.abstract))


def are_two_venues(one: str, two: str) -> bool:
    """Whether the names are of two venues or years; `iclr_2017` and `ICLR.cc/2017/conference` are one in two dumps."""
    years = [set(re.findall(r"\d{4}", name)) for name in (one, two)]
    if all(years) and not years[0] & years[1]:
        return True
    words = [re.findall(r"[^\W\d_]+", name.casefold()) for name in (one, two)]
    return all(words) and words[0][0] not in words[1] and words[1][0] not in words[0]  # mostly its acronym


def final(one: Decision | None, two: Decision | None) -> Decision | None:
    """The decision that stands: a paper withdrawn or desk-rejected stays so; None where the two contradict."""
    if one == two:
        return one
    lasting: tuple[Decision, ...] = ("desk_rejected", "withdrawn")
    return next((decision for decision in lasting if decision in (one, two)), None)
