"""How good a judge is: agreement with people, with another judge and with itself, biases, and what pushes it about."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from prefmill.checklist.agreement import agreement, rank_correlation, reliability
from prefmill.checklist.calibration import Calibration, calibrate, judge_of, write_calibration
from prefmill.checklist.engine import Engine
from prefmill.checklist.engines import open_engine
from prefmill.checklist.human_labels import Label, majority, read_item_labels, votes_of
from prefmill.checklist.items import Checklist
from prefmill.checklist.judge_gate import check
from prefmill.checklist.judge_probes import ask, sample
from prefmill.checklist.judge_scores import Judge, Scored, read_judge, sampled_reviews
from prefmill.checklist.optimize.proposals import with_paraphrases
from prefmill.checklist.probe_measures import measure_probes, probability_gaps
from prefmill.checklist.quality_config import JudgeQualityConfig
from prefmill.checklist.scored import judging
from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.files import write_json
from prefmill.core.stage import Metrics, Task
from prefmill.core.statistics import Resampling
from prefmill.store.jsonl import write_jsonl

QUALITY, LABELLED, BETWEEN, PROBES = "quality.json", "labelled.jsonl", "between.jsonl", "probes.jsonl"
FITTED_ON = "dev"
_log = logging.getLogger(__name__)
Found = dict[str, Any]
Row = dict[str, Any]


def measure_quality(config: JudgeQualityConfig, task: Task, conclude: Callable[[Found], list[str]]) -> Metrics:
    """Write `quality.json`, the rows behind it, and `calibration.json` where a temperature is fitted.

    `conclude` puts what was found into sentences.

    Raises InputError or ArtifactError where labels, scores and corpus do not belong together.
    """
    corpus, resampling = task.input("corpus"), Resampling(config.num_resamples, config.seed, config.confidence)
    shards = {name: task.inputs.get(name, ()) for name in ("scores", "other_scores")}
    judges = [read_judge(name, corpus, given) for name, given in shards.items() if given]
    given = _read_labels(config, judges[0])
    votes = votes_of(given)
    labels = majority(votes)
    labelled = [_labelled(judge, labels) for judge in judges]
    fitted = _calibrate(config, judges[0], labelled[0]) if config.calibrate else None  # refused before hours of probes
    between, differences = _between(judges[0], judges[1], resampling) if len(judges) > 1 else (None, [])
    described, probed = [], []
    for judge, rows in zip(judges, labelled, strict=True):
        is_probed = config.num_probed > 0 and (judge is judges[0] or config.probe_other)
        probes, answers = (
            _probe(config, judge, corpus, shards[judge.name], resampling, task) if is_probed else (None, [])
        )
        described.append(
            {
                **_describe(judge),
                "labels": _against_people(judge, rows, resampling) if labels else None,
                "length": _length(judge, rows, resampling),
                "probes": probes,
            }
        )
        probed += [{"judge": judge.name, **row} for row in answers]
    quality: Found = {
        "confidence": config.confidence, "num_labels": len(labels),
        "num_unscored_labels": len(labels) - len(labelled[0]), "judges": described, "between": between,
        "people": _among_people(given, votes, judges[0], resampling),
        "calibration": None if fitted is None else asdict(fitted),
    }  # fmt: skip
    quality["conclusion"] = conclude(quality)
    # allow_nan=False: NaN is no JSON, and strict parsers refuse the whole file.
    write_json(task.output / QUALITY, quality, allow_nan=False)
    write_jsonl(task.output / LABELLED, [row for rows in labelled for row in rows])
    write_jsonl(task.output / BETWEEN, differences)
    write_jsonl(task.output / PROBES, probed)
    if fitted is not None:
        write_calibration(fitted, task.output)
    print("\n".join(quality["conclusion"]))
    return {"conclusion": quality["conclusion"], "temperature": None if fitted is None else fitted.temperature}


def _describe(judge: Judge) -> Found:
    return {
        "name": judge.name, "engine": judge.engine,
        "settings": judge_of(judge.settings) if judge.settings else None,
        "temperature": judge.temperature, "checklist": judge.checklist.name, "num_items": len(judge.checklist.items),
        "num_reviews": len(judge.reviews), "num_papers": len({review.paper_id for review in judge.reviews}),
        "num_unscored": len(judge.unscored),
        "answers": {**judge.answers.overall(), "items": judge.answers.by_item(judge.checklist.ids)},
    }  # fmt: skip


def _read_labels(config: JudgeQualityConfig, judge: Judge) -> list[Label]:
    if config.labels is None:
        return []
    # A label of a review that could not be scored is counted as such, not refused as unknown.
    return read_item_labels(config.labels, judge.by_id.keys() | judge.unscored, judge.checklist.ids)


def _among_people(
    labels: Sequence[Label], votes: Mapping[tuple[str, str], Sequence[bool]], judge: Judge, resampling: Resampling
) -> Found | None:
    """How far people agree among themselves, on scored reviews; None where no two answered one item of a review."""
    shared = {key: given for key, given in votes.items() if len(given) > 1 and key[0] in judge.by_id}
    if not shared:
        return None
    papers = [judge.by_id[review_id].paper_id for review_id, _ in shared]
    num_yes, num_answers = (np.array([float(count(given)) for given in shared.values()]) for count in (sum, len))
    return {
        "num_raters": len({label.rater for label in labels}), "num_shared": len(shared),
        "num_answers": int(num_answers.sum()), "num_ties": int((2 * num_yes == num_answers).sum()),
        "alpha": reliability(papers, num_yes, num_answers, resampling),
    }  # fmt: skip


def _labelled(judge: Judge, labels: Sequence[Label]) -> list[Row]:
    """The judge's answer beside each label it has an answer to."""
    places = {name: index for index, name in enumerate(judge.checklist.ids)}
    rows = []
    for label in labels:
        scored = judge.by_id.get(label.review_id)
        if scored is not None and label.item_id in places:
            place = places[label.item_id]
            rows.append({
                "judge": judge.name, "review_id": label.review_id, "paper_id": scored.paper_id, "split": scored.split,
                "item_id": label.item_id, "label": label.yes, "yes": bool(scored.yes[place]),
                "p_yes": scored.p_yes[place],
            })  # fmt: skip
    return rows


def _against_people(judge: Judge, rows: Sequence[Row], resampling: Resampling) -> Found:
    """Agreement with people, pooled over all labels and for each item that has any."""
    if not rows:
        raise InputError(
            "no labelled review is scored", where=judge.name, expected="labels of reviews that were scored",
            fix="score these reviews too, or label others",
        )  # fmt: skip
    items = []
    for item in judge.checklist.items:
        if own := [row for row in rows if row["item_id"] == item.id]:
            items.append({"id": item.id, "question": item.question, **_agreement(own, resampling)})
    kappas = [item["kappa"]["value"] for item in items if item["kappa"]]
    return {
        **_agreement(rows, resampling),
        "num_reviews": len({row["review_id"] for row in rows}),
        # The pooled kappa also rewards knowing which items are mostly yes; this mean does not.
        "mean_item_kappa": round(float(np.mean(kappas)), 6) if kappas else None,
        "num_items_of_one_answer": len(items) - len(kappas),  # which have no kappa
        "items": items,
    }


def _agreement(rows: Sequence[Row], resampling: Resampling) -> Found:
    judge, people = (np.array([float(row[name]) for row in rows]) for name in ("yes", "label"))
    return agreement([row["paper_id"] for row in rows], judge, people, resampling)


def _calibrate(config: JudgeQualityConfig, judge: Judge, rows: Sequence[Row]) -> Calibration:
    # What is fitted on tempered answers is a factor to their temperature, not the judge's own.
    if judge.temperature is not None:
        raise InputError(
            "these scores have a temperature already", where=judge.name, got=judge.temperature,
            expected="the judge's own probabilities", fix="give scores made without the input calibration",
        )  # fmt: skip
    # Dev alone, so that measures on test papers are of labels the temperature has not seen.
    fitting = [row for row in rows if row["split"] == FITTED_ON]
    p_yes, labels = (np.array([float(row[name]) for row in fitting]) for name in ("p_yes", "label"))
    settings = judge.engine_config().model_dump(mode="json")
    papers = [row["paper_id"] for row in fitting]
    return calibrate(judge_of(settings), papers, p_yes, labels, config.min_labels, config.folds, config.seed)


def _between(first: Judge, second: Judge, resampling: Resampling) -> tuple[Found, list[Row]]:
    """How far two judges agree on the reviews and items both have, and a row for each such review."""
    shared = [name for name in first.checklist.ids if name in second.checklist.ids]
    reviews = [review for review in first.reviews if review.review_id in second.by_id]
    if not shared or not reviews:
        raise InputError(
            "two judges without an answer in common", where="scores and other_scores",
            got=f"{len(reviews)} reviews and {len(shared)} items in both",
            expected="the same reviews, scored for items of the same ids",
            fix="score the same corpus, and keep the item ids where items are worded anew",
        )  # fmt: skip
    others = [second.by_id[review.review_id] for review in reviews]
    yes, p_yes = _both(first, reviews, shared)
    other_yes, other_p_yes = _both(second, others, shared)
    papers = [review.paper_id for review in reviews]
    questions = [{item.id: item.question for item in judge.checklist.items} for judge in (first, second)]
    items = [
        {
            "id": name, "question": questions[0][name], "other_question": questions[1][name],
            **agreement(papers, yes[:, k], other_yes[:, k], resampling),
            **probability_gaps(p_yes[:, k], other_p_yes[:, k]),
        }
        for k, name in enumerate(shared)
    ]  # fmt: skip
    everything = [paper for paper in papers for _ in shared]
    found = {
        "differ_in": _differences(first, second, questions, shared), "num_reviews": len(reviews),
        **agreement(everything, yes.ravel(), other_yes.ravel(), resampling),
        **probability_gaps(p_yes, other_p_yes),
        "num_flips": int((yes != other_yes).sum()), "items": items,
    }  # fmt: skip
    rows = [
        {
            "review_id": review.review_id, "paper_id": review.paper_id,
            "num_flips": int((yes[n] != other_yes[n]).sum()), **probability_gaps(p_yes[n], other_p_yes[n]),
        }
        for n, review in enumerate(reviews)
    ]  # fmt: skip
    return found, rows


def _both(judge: Judge, reviews: Sequence[Scored], items: Sequence[str]) -> tuple[Any, Any]:
    places = [judge.checklist.ids.index(name) for name in items]
    yes, p_yes = (np.array([getattr(review, name) for review in reviews]) for name in ("yes", "p_yes"))
    return yes[:, places], p_yes[:, places]


def _differences(first: Judge, second: Judge, questions: Sequence[dict[str, str]], items: Sequence[str]) -> list[str]:
    reworded = sum(questions[0][name] != questions[1][name] for name in items)
    found = [] if judging(first.settings) == judging(second.settings) else ["engine"]
    found += [] if first.temperature == second.temperature else ["temperature"]
    return found + ([f"wording of {reworded} items"] if reworded else [])


def _length(judge: Judge, rows: Sequence[Row], resampling: Resampling) -> Found:
    """How score and length go together, and how the judge's error does: its yes less people's, on labelled reviews."""
    papers = [review.paper_id for review in judge.reviews]
    lengths = np.array([float(review.num_words) for review in judge.reviews])
    scores = np.array([review.score for review in judge.reviews])
    # Score against length is no bias by itself, as long reviews may deserve more yes; the judge's error is.
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["review_id"], []).append(float(row["yes"]) - float(row["label"]))
    labelled = [judge.by_id[name] for name in errors]
    error = rank_correlation(
        [review.paper_id for review in labelled],
        np.array([float(np.mean(values)) for values in errors.values()]),
        np.array([float(review.num_words) for review in labelled]),
        resampling,
    )
    return {"score": rank_correlation(papers, scores, lengths, resampling), "error": error}


def _probe(
    config: JudgeQualityConfig,
    judge: Judge,
    corpus: Artifact,
    shards: Sequence[Artifact],
    resampling: Resampling,
    task: Task,
) -> tuple[Found, list[Row]]:
    """Change a sample of reviews, ask again, and measure what moved.

    Raises InputError where nothing could be asked, or a model's answers so far do not pass the gate.
    """
    if (judge.settings or {}).get("engine") != "lexical":
        check(judge.answers, config.judge)  # before hours of questions to a judge that does not answer them
    # Rules do not read how an item is worded.
    num_paraphrases = config.max_paraphrases if judge.has_probabilities else 0
    asked, restated = with_paraphrases(judge.checklist, num_paraphrases)
    # Every item has a prompt of its own, so order should not matter: reversed, one pass checks that and repetition.
    backwards = Checklist(name=asked.name, items=asked.items[::-1])
    engine = judge.engine_config().model_copy(update={"evidence": False})  # a second pass that nothing here reads

    asking: list[Engine] = []

    def opened() -> Engine:
        asking.append(open_engine(engine, backwards))
        return asking[0]

    ids = sample(list(judge.by_id), config.num_probed, config.seed)
    reviews = list(sampled_reviews(corpus, shards, ids))
    # Not in the output: an attempt that is killed leaves its rows there for the next one.
    folder = task.work / f"probes-{judge.name}"
    rows = list(ask(reviews, judge.checklist, opened, config.seed, folder, task.advance))
    for found in asking:
        if found.label != judge.engine:
            told = "%s: scored by %s and probed by %s, so answers asked again differ for that reason too"
            _log.warning(told, judge.name, judge.engine, found.label)
    if all(row["answers"] is None for row in rows):
        raise InputError(
            "none of the probed reviews could be asked about", where=judge.name, got=rows[0]["reason"],
            fix="see to it that the engine works and reviews fit it, or set num_probed=0",
        )  # fmt: skip
    return measure_probes(rows, judge, restated, resampling), rows
