"""The words of venues for what became of a paper."""

from __future__ import annotations

import re
from functools import lru_cache

from prefmill.core.records import Decision

DECISIONS: tuple[Decision, ...] = ("accepted", "rejected", "withdrawn", "desk_rejected")
_NO = r"\b(not|never|cannot|below|fail\w*)\b"
_DECISION_WORDS: tuple[tuple[re.Pattern[str], Decision], ...] = (  # the first that matches
    (re.compile(r"desk[ _-]?reject", re.IGNORECASE), "desk_rejected"),
    (re.compile(r"withdraw|retracted", re.IGNORECASE), "withdrawn"),
    # "not recommended for acceptance", "marginally below acceptance threshold", "no acceptance", "unacceptable"
    (re.compile(rf"({_NO}|n['’]t\b)[^.,;:]*accept|\b(no|non)[ -]?accept|(un|in)accept", re.IGNORECASE), "rejected"),
    # "Submitted to ICLR 2024" is how OpenReview shows a rejected paper.
    (re.compile(r"reject|invite to workshop|submitted to|\d{4} submitted", re.IGNORECASE), "rejected"),
    (re.compile(r"accept|\b(poster|oral|spotlight|notable|talk)\b|\btop[ -]?\d+ ?%", re.IGNORECASE), "accepted"),
    (re.compile(r"\d{4} (main|findings|industry|long|short)\b", re.IGNORECASE), "accepted"),  # EMNLP 2023 Main
)


@lru_cache(maxsize=128)  # every row asks, and a venue has a handful of them
def decision_in(text: str) -> Decision | None:
    """The decision that `text` speaks of, if any: `ICLR 2024 poster` is accepted."""
    return next((decision for pattern, decision in _DECISION_WORDS if pattern.search(text)), None)
