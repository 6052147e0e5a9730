"""Papers with their reviews and the reviews' evaluations: a streaming join of the corpus and the score shards."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from prefmill.checklist.engine import ServerConfig
from prefmill.core.artifact import Artifact
from prefmill.core.errors import ArtifactError, InputError
from prefmill.core.records import EvaluationScores, Paper, Review
from prefmill.reviews.join import papers_with_reviews
from prefmill.store.jsonl import parse_json, read_jsonl

EVALUATIONS, FAILURES, CHECKLIST = "review_evaluations.jsonl", "failures.jsonl", "checklist.json"
SUMMARY = "summary.json"
BETWEEN_ENGINES = " and "  # in the summary of a shard
_log = logging.getLogger(__name__)
_parse_scores = msgspec.json.Decoder(EvaluationScores).decode  # passes over the answers, which are most of a row
_RESCORE = "rerun score_reviews on this corpus and give all of its shards"


class ScoredReview(NamedTuple):
    """A review and what the checklist made of it."""

    review: Review
    evaluation: EvaluationScores


class ScoredPaper(NamedTuple):
    """A paper, its scored reviews by review_id, and the ids of those that no evaluation was found for."""

    paper: Paper
    reviews: list[ScoredReview]
    unscored: list[str]


class Groups:
    """Rows sorted by paper_id, handed out paper by paper in that order; memory holds one paper's rows."""

    def __init__(self, rows: Iterable[Any], where: object) -> None:
        self._groups: Iterator[tuple[str, Iterator[Any]]] = groupby(rows, itemgetter("paper_id"))
        self._where = where
        self._head = next(self._groups, None)

    def take(self, paper_id: str) -> list[Any]:
        """The rows of `paper_id`, which must not come before one taken earlier; [] where it has none.

        Raises ArtifactError for rows that belong to no paper or are out of order.
        """
        if self._head is None or self._head[0] > paper_id:
            return []
        if self._head[0] < paper_id:
            self._refuse()
        # Before the next group is asked for: groupby's groups share one iterator, and moving on empties the last.
        rows = list(self._head[1])
        self._head = next(self._groups, None)
        return rows

    def close(self) -> None:
        """Raise ArtifactError if rows are left: nobody asked for their paper."""
        if self._head is not None:
            self._refuse()

    def _refuse(self) -> None:
        assert self._head is not None
        raise ArtifactError(
            "a row's paper is not in the corpus, or the rows are out of order", where=self._where,
            got=f"paper_id {self._head[0]!r}", expected="rows of papers in papers.jsonl, sorted by paper_id",
            fix="give artifacts of one and the same corpus; if they are, rerun their stages with --force",
        )  # fmt: skip


def scored_papers(corpus: Artifact, scores: Sequence[Artifact], with_answers: bool = False) -> Iterator[ScoredPaper]:
    """Every paper of `corpus` in its order, joined with the evaluations of all shards in `scores`.

    `with_answers` reads whole evaluations, in place of what they come to. Raises ArtifactError where an evaluation has
    no review, a review has two, or an input is out of order.
    """
    evaluations = evaluations_by_paper(scores, with_answers)
    for paper, reviews in papers_with_reviews(corpus):
        yield _match(paper, reviews, evaluations.take(paper["paper_id"]))
    # Rows behind the last paper would else stay unread, and nobody would know.
    evaluations.close()


def evaluations_by_paper(scores: Sequence[Artifact], with_answers: bool = False) -> Groups:
    """The evaluations of all shards in `scores`, to be taken paper by paper."""
    parse = parse_json if with_answers else _parse_scores
    shards = [read_jsonl(shard.file(EVALUATIONS), parse) for shard in scores]
    # heapq.merge holds one row of each shard, so memory does not grow with the corpus.
    merged = shards[0] if len(shards) == 1 else heapq.merge(*shards, key=itemgetter("paper_id", "review_id"))
    return Groups(merged, " and ".join(str(shard.path / EVALUATIONS) for shard in scores))


def check_inputs(corpus: Artifact, scores: Sequence[Artifact]) -> list[str]:
    """Raise ArtifactError unless every shard in `scores` was scored on `corpus` with the same checklist.

    InputError where one judge gave some of them and another the rest: their scores mean different things. Returns, and
    logs, a warning where a server has answered by several models.
    """
    for shard in scores:
        made_from = shard.manifest.inputs.get("corpus")
        if made_from is not None and made_from != [corpus.manifest.content_digest]:
            raise ArtifactError(
                "these scores were made from another corpus", where=shard.path,
                got=", ".join(made_from), expected=corpus.manifest.content_digest, fix=_RESCORE,
            )  # fmt: skip
    checklists = {shard.path: _digest_of(shard, CHECKLIST) for shard in scores}
    if len(set(checklists.values())) > 1:
        raise ArtifactError(
            "the shards were scored with different checklists", where=", ".join(map(str, checklists)),
            expected="one checklist", fix=_RESCORE,
        )  # fmt: skip

    judges: dict[str, list[Any]] = {"engine": [judging(shard.manifest.config.get("engine")) for shard in scores],
              "temperature": [shard.manifest.inputs.get("calibration") for shard in scores]}  # fmt: skip
    for what, found in judges.items():
        if any(one != found[0] for one in found):
            raise InputError(
                f"the shards were scored with different settings: {what}",
                where=", ".join(str(shard.path) for shard in scores), got=" and ".join(map(str, found)),
                expected="one judge", fix="score all shards alike; give a second judge to judge_quality's other_scores",
            )  # fmt: skip
    told = several_models(shard.json(SUMMARY).get("engine") for shard in scores if _digest_of(shard, SUMMARY))
    for warning in told:
        _log.warning("%s", warning)
    return told


def several_models(engines: Iterable[str | None]) -> list[str]:
    """The warning where answers are of more than one model, by the engines' names in summaries or evaluations."""
    found = sorted({name for engine in engines for name in (engine or "").split(BETWEEN_ENGINES) if name})
    if len(found) < 2:
        return []
    names = BETWEEN_ENGINES.join(found)
    return [f"more than one model has answered: {names}; score again with --force, by one of them"]


def judging(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """An engine's settings, less how its server was asked, which a shard that is scored again may have otherwise."""
    return {key: value for key, value in (settings or {}).items() if key not in ServerConfig.model_fields}


def _match(paper: Paper, reviews: list[Review], evaluations: list[EvaluationScores]) -> ScoredPaper:
    by_id = {evaluation["review_id"]: evaluation for evaluation in evaluations}
    if len(by_id) < len(evaluations):
        raise _mismatch("a review was evaluated twice", paper, "one evaluation a review: the same shard given twice?")
    scored, unscored = [], []
    for review in reviews:
        evaluation = by_id.pop(review["review_id"], None)
        if evaluation is None:
            unscored.append(review["review_id"])
        else:
            scored.append(ScoredReview(review, evaluation))
    if by_id:
        raise _mismatch(f"evaluation of a review that is not in the corpus: {min(by_id)}", paper, "scores of it")
    return ScoredPaper(paper, scored, unscored)


def _mismatch(what: str, paper: Paper, expected: str) -> ArtifactError:
    return ArtifactError(what, where=f"paper {paper['paper_id']}", expected=expected, fix=_RESCORE)


def _digest_of(artifact: Artifact, name: str) -> str | None:
    return next((entry.sha256 for entry in artifact.manifest.files if entry.path == name), None)
