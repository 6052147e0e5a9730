"""Rows that cannot be used: the first stops the stage, or they are set aside up to a share of all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from prefmill.core.config import StrictConfig, later
from prefmill.core.errors import InputError
from prefmill.reviews.rows import RowProblem
from prefmill.reviews.store import CorpusStore

SHOWN_PROBLEMS = 5


class BadRowConfig(StrictConfig):
    """What becomes of rows that cannot be used: `fail` at the first, or set them aside up to a share of all rows."""

    on_bad_row: Literal["fail", "quarantine"] = Field(
        "fail", description="`fail` at the first unusable row, or `quarantine` it"
    )
    max_quarantined_share: float = Field(
        0.01, ge=0, le=1, description="an error when more than this share of the rows is in quarantine"
    )
    unknown_papers: Literal["fail", "drop"] = later(
        "fail", description="reviews and decisions of papers that are not in the sources: bad rows, or `drop` them"
    )


@dataclass(frozen=True)
class Rejects:
    """Where problems go."""

    config: BadRowConfig
    store: CorpusStore

    def add(self, problem: RowProblem) -> None:
        """Set the row aside, or raise InputError naming its file, line and fix."""
        if self.config.on_bad_row == "fail":
            raise InputError(
                problem.reason, where=problem.place, got=problem.excerpt or None,
                fix=f"{problem.fix}; or set on_bad_row: quarantine to set such rows aside",
            )  # fmt: skip
        self.store.add_problem(problem)

    def check_share(self, num_rows: int) -> None:
        """Raises InputError, showing the first problems, when more rows were set aside than allowed."""
        count = self.store.count("problems")
        if count <= self.config.max_quarantined_share * num_rows:
            return
        raise InputError(
            f"{count} of {num_rows} rows cannot be used", got=self.shown(),
            expected=f"at most {self.config.max_quarantined_share:.2%} (max_quarantined_share)",
            fix="correct the source, or raise max_quarantined_share",
        )  # fmt: skip

    def shown(self) -> str:
        """The first problems, a line each, with its fix."""
        first = itertools.islice(self.store.problems(), SHOWN_PROBLEMS)
        return "\n".join(["", *(f"    {problem.place}: {problem.reason} (fix: {problem.fix})" for problem in first)])
