"""All that a run knows of one pair: both reviews, the checklist's answers, why it was selected, its margins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefmill.checklist.items import Checklist, load_checklist
from prefmill.core.artifact import Artifact
from prefmill.core.errors import ArtifactError, InputError, nearest
from prefmill.core.records import ReviewEvaluation
from prefmill.pairs.forensics import SUSPICIONS, History, length_effect, suspicions
from prefmill.store.artifacts import read
from prefmill.store.jsonl import read_jsonl

_SIDES = ("chosen", "rejected")


def tell(workspace: Path, run: str, pair_id: str, histories: Mapping[str, History]) -> str:
    """The story of `pair_id` in `run`; raises InputError where neither its data nor its training knows the pair.

    What a run has not made (scores of pairs that build_datasets did not make, a training) is said to be missing.
    """
    data = workspace / "data" / run
    row, dataset = _find_row(data, pair_id)
    history = histories.get(pair_id)
    if row is None and history is None:
        raise InputError(
            f"no pair '{pair_id}' in this run{nearest(pair_id, list(histories))}", where=run,
            expected="the id of a row in a dpo dataset: CHOSEN_ID:REJECTED_ID", fix="list pairs: prefmill pairs RUN",
        )  # fmt: skip
    lines = [f"pair {pair_id}", *_margins(history, histories)]
    if row is None or dataset is None:
        lines += ["", "texts: not in this run's data (the dataset came from elsewhere); its row has this id or number"]
        return "\n".join(lines)
    lines += ["", *_selection(row, dataset)]
    lines += ["", *_answers(data, row)]
    for side in _SIDES:
        lines += ["", f"--- {side}: {row.get(f'{side}_id', '')}", row[side]["value"]]
    return "\n".join(lines)


def _find_row(data: Path, pair_id: str) -> tuple[dict[str, Any] | None, Artifact | None]:
    """The pair's row in a dpo dataset of the run, and the artifact it is in."""
    for folder in sorted(data.glob("build_datasets/*")):
        # Row by row: a run's pairs may be more than fit in memory.
        for path in sorted(folder.glob("dpo_*/data.jsonl")):
            for row in read_jsonl(path):
                if row["id"] == pair_id:
                    return row, read(folder)
    return None, None


def _margins(history: History | None, histories: Mapping[str, History]) -> Iterator[str]:
    if history is None:
        yield "not trained on in this run (a validation pair, or no training yet)"
        return
    yield f"tokens: chosen {history.chosen_length:g}, rejected {history.rejected_length:g}"
    yield "  step  epoch     margin  gradient"
    for item in history.sightings:
        yield f"{item.step:6}{item.epoch:7}{item.margin:11.4f}{item.gradient_coefficient:10.4f}"
    effect = length_effect(histories.values())
    for reason in suspicions(history, effect):
        yield f"suspect: {reason}: {SUSPICIONS[reason]}"
    yield (
        f"of the margin, length alone predicts {effect.slope * history.length_difference:.4f} "
        f"({effect.slope:.4g} a token; correlation over all pairs {effect.correlation:.2f})"
    )


def _selection(row: Mapping[str, Any], dataset: Artifact) -> Iterator[str]:
    rules = dataset.manifest.config
    yield f"selected from paper {row['group']}, by build_datasets:"
    for name, unit in (("rating_diff", "points"), ("checkmark_diff", "checkmarks")):
        least = rules.get(f"min_{name}", "?")
        # The row has points, whatever the pairs were selected by.
        is_share = name == "rating_diff" and rules.get("rating_unit") == "quantiles"
        asked = f"{least} of the venue's own distribution" if is_share else least
        yield f"  {name} {row[name]:g} {unit}, of at least {asked}"


def _answers(data: Path, row: Mapping[str, Any]) -> Iterator[str]:
    """Both reviews' answers side by side, those that differ first, with evidence where the engine gave any."""
    found = {side: _evaluation(data, row[f"{side}_id"]) for side in _SIDES}
    chosen, rejected = found["chosen"], found["rejected"]
    if chosen is None or rejected is None:
        yield "checklist: no scores of these reviews in this run's data"
        return
    questions = {item.id: item.question for item in _checklist(data).items}
    yield f"checklist: chosen {chosen['checkmark_score']:g}, rejected {rejected['checkmark_score']:g} checkmarks"
    # False comes before True, and sorted() keeps the checklist's order within each.
    items = sorted(
        chosen["answers"], key=lambda item: chosen["answers"][item]["yes"] == rejected["answers"][item]["yes"]
    )
    for item in items:
        both = [evaluation["answers"][item] for evaluation in (chosen, rejected)]
        marks = " ".join(f"{'yes' if answer['yes'] else 'no':>3} {answer['p_yes']:.2f}" for answer in both)
        differs = "*" if both[0]["yes"] != both[1]["yes"] else " "
        yield f"{differs} {marks}  {item}: {questions.get(item, '')}"
        for side, answer in zip(_SIDES, both, strict=True):
            if answer.get("evidence"):
                yield f"      {side}: {answer['evidence']!r}"


def _evaluation(data: Path, review_id: str) -> ReviewEvaluation | None:
    for path in sorted(data.glob("score_reviews/*/review_evaluations.jsonl")):
        for row in read_jsonl(path):
            if row["review_id"] == review_id:
                found: ReviewEvaluation = row
                return found
    return None


def _checklist(data: Path) -> Checklist:
    paths = sorted(data.glob("score_reviews/*/checklist.json"))
    if not paths:
        raise ArtifactError("scores without their checklist", where=data, fix="rerun score_reviews with --force")
    return load_checklist(paths[0])
