"""What validation found: each fault with its check, place and remedy."""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]
CHECKS = {
    "registry": "every dataset is registered with every column and tag its loaders need",
    "completeness": "no dataset, file or row is missing",
    "format": "every row has the fields, types and turns of its form",
    "ratings": "every completion is a review that ends with its rating; ratings vary, and alike in train and val",
    "order": "the rows of a paper are together, in order, and share one prompt",
    "contrast": "the chosen review is better by both judgements and by enough",
    "duplicates": "no row is there twice",
    "contradictions": "no pair is there the other way round",
    "leakage": "no paper, title or review is in two splits",
    "images": "every marker has its image, and every image can be read",
    "source": "rows say what the corpus and the scores say",
    "length_bias": "length alone does not give the preferred review away",
    "tokens": "rows fit the model's context",
}


class Finding(NamedTuple):
    """A fault at `where` (file:line, or the file)."""

    check: str
    severity: Severity
    where: str
    what: str


class Findings:
    """Counts all findings and keeps the first few of each check and severity."""

    def __init__(self, max_listed: int) -> None:
        self._max_listed = max_listed
        self.counts: Counter[tuple[str, Severity]] = Counter()
        self.listed: list[Finding] = []
        self.not_run: dict[str, str] = {}

    def error(self, check: str, where: str, what: str) -> None:
        """Note a fault that must be fixed before training."""
        self._add(Finding(check, "error", where, what))

    def warning(self, check: str, where: str, what: str) -> None:
        """Note something to know before training."""
        self._add(Finding(check, "warning", where, what))

    def skip(self, check: str, why: str) -> None:
        """Note that `check` could not be made."""
        self.not_run[check] = why

    def total(self, severity: Severity) -> int:
        """How many findings of `severity` there are, listed or not."""
        return sum(count for (_, found), count in self.counts.items() if found == severity)

    def has_errors(self, *checks: str) -> bool:
        """Whether any of `checks` found an error."""
        return any(self.counts[check, "error"] for check in checks)

    def _add(self, finding: Finding) -> None:
        assert finding.check in CHECKS, finding.check
        self.counts[finding.check, finding.severity] += 1
        # A fault of the source is often on every row: a few show it, and memory does not grow with the rest.
        if self.counts[finding.check, finding.severity] <= self._max_listed:
            self.listed.append(finding)
