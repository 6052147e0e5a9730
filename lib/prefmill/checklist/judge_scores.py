"""What a judge said of a corpus, read from its review scores: answers as arrays, and the engine that gave them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
from pydantic import TypeAdapter

from prefmill.checklist.engine import AnyEngineConfig, EngineConfig
from prefmill.checklist.items import Checklist, load_checklist
from prefmill.checklist.judge_gate import AnswerCounts
from prefmill.checklist.judge_probes import Sampled
from prefmill.checklist.scored import BETWEEN_ENGINES, CHECKLIST, SUMMARY, check_inputs, scored_papers
from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.records import Paper, Review, ReviewEvaluation, Split
from prefmill.core.statistics import Array
from prefmill.reviews.text_statistics import words


@dataclass(frozen=True)
class Scored:
    """A scored review: its answers as yes [K] and P(yes) [K], its score and its length in words."""

    review_id: str
    paper_id: str
    split: Split
    num_words: int
    score: float
    yes: tuple[float, ...]
    p_yes: tuple[float, ...]


@dataclass(frozen=True)
class Judge:
    """All that one engine answered about a corpus; `name` is the input that holds it."""

    name: str
    engine: str
    settings: Mapping[str, Any] | None
    temperature: float | None
    checklist: Checklist
    reviews: tuple[Scored, ...]
    unscored: frozenset[str]
    answers: AnswerCounts = field(default_factory=AnswerCounts)

    @cached_property
    def by_id(self) -> dict[str, Scored]:
        """Every scored review by its id."""
        return {review.review_id: review for review in self.reviews}

    @property
    def yes(self) -> Array:
        """Yes as 1 and no as 0, [N, K]."""
        return np.array([review.yes for review in self.reviews])

    @property
    def p_yes(self) -> Array:
        """P(yes) [N, K]."""
        return np.array([review.p_yes for review in self.reviews])

    @property
    def has_probabilities(self) -> bool:
        """Whether any P(yes) is neither 0 nor 1: rules have none, and do not read how an item is worded."""
        return not bool(np.isin(self.p_yes, (0.0, 1.0)).all())

    def engine_config(self) -> AnyEngineConfig:
        """The configuration of its engine, as the scores' manifest has it; raises InputError where it has none."""
        if not self.settings:
            raise InputError(
                "the scores do not tell which engine made them", where=self.name,
                fix="give scores written by score_reviews, or set num_probed=0",
            )  # fmt: skip
        config: AnyEngineConfig = TypeAdapter(EngineConfig).validate_json(json.dumps(self.settings))
        return config


def read_judge(name: str, corpus: Artifact, shards: Sequence[Artifact]) -> Judge:
    """The judge behind all shards of one scoring.

    Raises as `check_inputs` does, and InputError where no review is scored.
    """
    check_inputs(corpus, shards)
    checklist = load_checklist(shards[0].file(CHECKLIST))
    # From the manifest: an engine described by hand could be another judge.
    settings, temperature = shards[0].manifest.config.get("engine"), shards[0].json(SUMMARY).get("temperature")
    reviews: list[Scored] = []
    unscored: set[str] = set()
    engines: set[str] = set()
    counts = AnswerCounts()
    for paper, scored, missing in _answered_papers(corpus, shards):
        unscored |= set(missing)
        for review, evaluation in scored:
            by_item = {key: evaluation["answers"][key] for key in checklist.ids}
            answers = by_item.values()
            engines.add(evaluation["engine"])
            counts.add(by_item)
            reviews.append(
                Scored(
                    review["review_id"], paper["paper_id"], paper["split"], len(words(review["text"])),
                    evaluation["checkmark_score"],
                    tuple(float(answer["yes"]) for answer in answers), tuple(answer["p_yes"] for answer in answers),
                )
            )  # fmt: skip
    if not reviews:
        raise InputError(
            "no review is scored", where=", ".join(str(shard.path) for shard in shards),
            fix="look at the failures of score_reviews, and give all of its shards",
        )  # fmt: skip
    engine = BETWEEN_ENGINES.join(sorted(engines))
    return Judge(name, engine, settings, temperature, checklist, tuple(reviews), frozenset(unscored), counts)


def sampled_reviews(corpus: Artifact, shards: Sequence[Artifact], ids: set[str]) -> Iterator[Sampled]:
    """The reviews named by `ids` with their papers and the evidence that was quoted, in the corpus's order."""
    for paper, scored, _ in _answered_papers(corpus, shards):
        for review, evaluation in scored:
            if review["review_id"] in ids:
                answers = evaluation["answers"].items()
                quotes = {name: answer["evidence"] for name, answer in answers if answer.get("evidence")}
                yield Sampled(paper, review, quotes)


def _answered_papers(
    corpus: Artifact, shards: Sequence[Artifact]
) -> Iterator[tuple[Paper, list[tuple[Review, ReviewEvaluation]], list[str]]]:
    papers = scored_papers(corpus, shards, with_answers=True)
    # with_answers makes them whole evaluations, which the type of scored_papers does not tell.
    return cast("Iterator[tuple[Paper, list[tuple[Review, ReviewEvaluation]], list[str]]]", papers)
