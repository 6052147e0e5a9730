"""The lexical engine as a test can watch and disturb it."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterable, Iterator, Sequence

from prefmill.checklist.engine import LexicalConfig, Outcome
from prefmill.checklist.items import Checklist
from prefmill.checklist.lexical import LexicalEngine
from prefmill.core.records import Paper, Review

Papers = Iterable[tuple[Paper, Sequence[Review]]]


class CountingEngine(LexicalEngine):
    """The lexical engine, with a list of what it was asked and a review before which something happens."""

    asked: list[str] = []
    opened = 0
    fails: frozenset[str] = frozenset()
    kill_before: str | None = None

    def __init__(self, config: LexicalConfig, checklist: Checklist, temperature: float | None = None) -> None:
        super().__init__(config, checklist)
        self.temperature = temperature
        type(self).opened += 1

    def score(self, papers: Papers) -> Iterator[Outcome]:
        for paper, reviews in papers:
            for review in reviews:
                if review["review_id"] == self.kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.asked.append(review["review_id"])
                (outcome,) = super().score([(paper, [review])])
                failed = review["review_id"] in self.fails
                yield dataclasses.replace(outcome, answers={}, failure="no answer") if failed else outcome
