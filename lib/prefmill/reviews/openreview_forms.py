"""What OpenReview's venues call their notes and fields, and the presets that say it for one venue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from prefmill.core.records import Decision
from prefmill.reviews.decision_words import decision_in
from prefmill.reviews.rows import word_key

Preset = Literal[
    "iclr_2017", "iclr_2018", "iclr_2019", "iclr_2020", "iclr_2021", "iclr_2022", "iclr_2023", "iclr_2024",
    "iclr_2025", "iclr_2026", "neurips", "neurips_2025", "icml_2025", "icml_2026", "colm", "emnlp_2023", "arr", "tmlr",
]  # fmt: skip
RATING_FIELDS = ("rating", "recommendation", "overall_recommendation", "overall_assessment", "overall_rating")
CONFIDENCE_FIELDS = ("confidence", "reviewer_confidence")
DECISION_FIELDS = ("decision", "recommendation")
REVIEW_INVITATIONS = ("official_review", "review")
DECISION_INVITATIONS = ("decision", "acceptance_decision", "acceptance", "meta_review")
META_REVIEW = "meta_review"  # an area chair's recommendation, which a decision's own note overrules
# Named, not guessed by their look: a question may begin with "1:", and a text may be "3 good" runs.
SUB_SCORE_FIELDS = (
    "clarity", "contribution", "correctness", "empirical_novelty_and_significance", "excitement", "novelty",
    "originality", "presentation", "quality", "reproducibility", "significance", "soundness", "substance",
    "technical_novelty_and_significance", "technical_quality", "datasets", "software", "impact", "ethics_rating",
)  # fmt: skip
_DECISION_NOTE: dict[str, Any] = {"decision_invitations": ["decision"], "decision_fields": ["decision"]}
PRESETS: Mapping[Any, Mapping[str, Any]] = {
    "iclr_2017": {"review_invitations": ["review"], "decision_invitations": ["acceptance"]},
    "iclr_2018": {"decision_invitations": ["acceptance_decision"]},
    "iclr_2019": {"decision_invitations": ["meta_review"], "decision_fields": ["recommendation"]},  # no decision notes
    "iclr_2020": {**_DECISION_NOTE, "rating_max": 8.0},  # 1, 3, 6, 8
    **dict.fromkeys(("iclr_2021", "iclr_2024", "iclr_2025", "neurips", "colm"), _DECISION_NOTE),
    **{name: {**_DECISION_NOTE, "rating_fields": ["recommendation"]} for name in ("iclr_2022", "iclr_2023")},
    "iclr_2026": {**_DECISION_NOTE, "rating_min": 0.0},  # 0, 2, 4, 6, 8, 10
    "neurips_2025": {**_DECISION_NOTE, "rating_max": 6.0},
    "icml_2025": {**_DECISION_NOTE, "rating_fields": ["overall_recommendation"], "rating_max": 5.0},
    "icml_2026": {**_DECISION_NOTE, "rating_fields": ["overall_recommendation"], "rating_max": 6.0},
    "emnlp_2023": {"rating_fields": ["soundness"], "rating_max": 5.0},  # its form has no overall rating
    "arr": {"rating_fields": ["overall_assessment"], "rating_max": 5.0, "decision_invitations": ["decision"]},
    "tmlr": {  # its form asks for no grade but whether the claims are supported
        "review_invitations": ["review"], "decision_invitations": ["decision"],
        "decision_fields": ["recommendation"], "rating_fields": ["claims_and_evidence"],
        "rating_min": 0.0, "rating_max": 1.0, "rating_words": {"Yes": 1, "No": 0},
    },
}  # fmt: skip
_PENDING = re.compile(r"(active_|blind_)?submission|submitted|under_review|decision_pending|assigned_ae|active")
_PENDING_VENUE = re.compile(r"submission$|under review|decision pending|^active", re.IGNORECASE)
_REVERSION = re.compile(r"_(reversion|reversal|restoration)$")
# Sections by which a reviewer says that there is nothing to say, or ticks a box of the form.
_NOTHING = re.compile(
    r"(?i)\W*(n\W{0,3}a|not applicable|none|nothing|yes|no|maybe|no or very minor ethics concerns only|"
    r"(there are |i have )?no( (paper )?formatting| ethical)? concerns?( with this (submission|paper))?)?\W*"
)


class Standing(NamedTuple):
    """A submission's fate by its own fields; `accepted_group`: its venueid is the venue's own group, no more."""

    decision: Decision | None = None
    accepted_group: bool = False
    unknown: str | None = None  # the venue's words that mean nothing to us


def standing(
    content: Mapping[str, Any], group: str, names: set[str], words: Mapping[str, Decision] | None = None
) -> Standing:
    """By `venueid`, then `venue`, and where there is neither by the invitations, which are history.

    An invitation stays on a note when its withdrawal or desk rejection is taken back; venueid and venue are changed.
    """
    venueid, venue = (str(content.get(name) or "").strip() for name in ("venueid", "venue"))
    if not venueid and not venue:
        return Standing(_by_invitations(names))
    state = venueid.rsplit("/", 1)[-1]
    if _PENDING.fullmatch(state.lower()):
        return Standing()
    decision = decision_in(state) or (words or {}).get(word_key(venue)) or decision_in(venue)
    if decision or _PENDING_VENUE.search(venue):
        return Standing(decision)
    is_group = venueid == group
    return Standing(accepted_group=is_group, unknown=None if is_group else venue or venueid)


def _by_invitations(names: set[str]) -> Decision | None:
    taken_back = {_REVERSION.sub("", name) for name in names if _REVERSION.search(name)}
    said = (decision_in(name) for name in sorted(names - taken_back) if not _REVERSION.search(name))
    return next((decision for decision in said if decision), None)


def says_nothing(text: str) -> bool:
    """Whether a section's whole text is "N/A", "None", a dash, or a yes or no to a question that nobody sees here."""
    return len(text) < 50 and _NOTHING.fullmatch(text) is not None


def as_sections(sections: Mapping[str, str]) -> str:
    """A review's text of what stands in the fields of its form, a heading each, less those that say nothing."""
    sections = {name: text for name, text in sections.items() if not says_nothing(text)}
    # Older forms, such as ICLR's until 2021, have one text field, which needs no heading.
    if len(sections) == 1:
        return next(iter(sections.values()))
    return "\n\n".join(f"## {name.replace('_', ' ').capitalize()}\n{text}" for name, text in sections.items())
