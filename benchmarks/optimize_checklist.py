"""optimize_checklist on generated reviews whose useful items are known: what is found, and how honest the numbers are.

    python -m benchmarks.optimize_checklist [--seeds 5] [--papers 450] [--draws 200] [--work DIR]

Three questions: are the useful items found and the others dropped (the stage itself, through the worker); does the
interval on held-out papers hold the value on a large sample of new ones; is a signal reported on shuffled targets.
Candidates are answered by rules: one exact rule a quality factor (useful), and items that say nothing beyond those
(openings, vague sentences, words of the paper), one that is constant and one that repeats a useful one.
The reviewer's confidence in this corpus follows from the number of factors alone, plus noise.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from prefmill.checklist.engine import LexicalConfig
from prefmill.checklist.items import Checklist, Item, Rule, save_checklist
from prefmill.checklist.lexical import LexicalEngine
from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.held_out import checklist_scores as held_out_scores
from prefmill.checklist.optimize.held_out import correlation, outer_training, permutation_test, permuted
from prefmill.checklist.optimize.lasso import Array
from prefmill.checklist.optimize.selection import Design, select
from prefmill.core.config import validate
from prefmill.core.statistics import Resampling
from prefmill.pipeline.plan import PipelineFile as Pipeline
from prefmill.pipeline.plan import Plan, make_plan
from prefmill.pipeline.worker import execute
from prefmill.reviews import synthetic_text as phrases
from prefmill.reviews.generated import generate_paper
from prefmill.store.artifacts import read
from prefmill.store.jsonl import read_jsonl

# The stage's procedure with fewer bootstrap samples, which the number of draws asks for.
RULES = SelectConfig(inner_folds=5, num_penalties=15, num_bootstrap=20, min_stability=0.9, shrink=False)
USEFUL = tuple(phrases.FACTORS)
NOISE = {
    "opening_view": [r"\bhere is my view\b"],
    "opening_about": [r"\bthis paper is about\b"],
    "vague_area": [r"\binteresting area\b"],
    "vague_mixed": [r"\bsome of it is good\b"],
    "vague_length": [r"\ba lot going on\b"],
    "vague_time": [r"\btook me some time\b"],
    "names_images": [r"\b(?:images|graphs|videos|songs|maps)\b"],
    "names_method": [r"\b(?:attention|sampling|pruning|distillation|clustering)\b"],
    "names_part": [r"\b(?:masks|priors|gates|rewards|kernels)\b"],
    "names_topic": [r"\b(?:translation|retrieval|segmentation|planning)\b"],
    "names_benchmark": [r"\b(?:basalt|meridian|juniper|corvid)\b"],
    "names_baseline": [r"\b(?:harrow|quill|sextant|tarn)\b"],
}
CONSTANT, COPY = "mentions_zebras", "courtesy_again"
PERMUTATIONS, ALPHA, CONFIDENCE = 39, 0.05, 0.95  # 39: a p of 0.05 is reached in exactly 2 of 40 places
_POPULATION_SEED, _POPULATION_PAPERS = 900_000, 4000
_DRAW_PAPERS = 150


@dataclass(frozen=True)
class Found:
    """What a run of the stage kept, against what is known to be useful."""

    precision: float
    recall: float
    kept: tuple[str, ...]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """One small corpus: the held-out estimate, and what checklists are worth on a large sample of other papers."""

    value: float
    low: float
    high: float
    of_folds: float  # the mean over the checklists of the outer folds
    of_final: float  # the checklist made from all papers


def main(argv: Sequence[str] | None = None) -> int:
    """Print the three answers; returns 0 when all are within their bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="corpora for the known items (default: 5)")
    parser.add_argument("--papers", type=int, default=450, help="papers of each, about 4 reviews per paper")
    parser.add_argument("--draws", type=int, default=200, help="small corpora for intervals and shuffled targets")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / ".work" / "optimize", metavar="DIR")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    good = _known_items(arguments.work, arguments.seeds, arguments.papers)
    good &= _intervals(arguments.draws)
    good &= _shuffled(arguments.draws)
    print(f"all within their bounds: {'yes' if good else 'NO'}")
    print(f"seconds: {time.monotonic() - started:.1f}")
    return 0 if good else 1


def known_checklist() -> Checklist:
    """The candidates: useful items, noise, a constant item and a copy."""
    rules = {name: [_as_rule(text) for text in texts] for name, texts in phrases.FACTORS.items()}
    rules |= {**NOISE, CONSTANT: [r"\bzebras?\b"], COPY: rules["courtesy"]}
    items = [
        Item(id=name, question=f"Is there a sentence of {name}?", source="benchmark", rule=Rule(any_of=tuple(texts)))
        for name, texts in rules.items()
    ]
    return Checklist(name="known", items=tuple(items))


def run_stage(work: Path, seed: int, num_papers: int, shuffle: bool = False, **select_keys: Any) -> Found:
    """The stage on a generated corpus, ingested and optimised by the worker; `shuffle` exchanges its targets."""
    work.mkdir(parents=True, exist_ok=True)
    candidates = work / "known.json"
    save_checklist(known_checklist(), candidates)
    plan = _plan(work, seed, num_papers, {"target": "confidence", **select_keys}, candidates)
    execute(plan.select("ingest_reviews")[0])
    if shuffle:
        labels = work / "labels.csv"
        _write_shuffled(read(plan.select("ingest_reviews")[0].output).file("reviews.jsonl"), labels, seed)
        keys = {"target": "labels", "labels": str(labels), **select_keys}
        plan = _plan(work, seed, num_papers, keys, candidates)
    task = plan.select("optimize_checklist")[0]
    with contextlib.redirect_stdout(io.StringIO()):  # the stage's own conclusion
        execute(task)
    summary = json.loads(read(task.output).file("summary.json").read_text())
    kept = tuple(summary["weights"])
    found = len(set(kept) & {*USEFUL})
    return Found(found / max(1, len(kept)), found / len(USEFUL), kept, summary)


def sample(seed: int, num_papers: int) -> Design:
    """Answers to the useful and the noise items, and confidence as the target, of generated papers."""
    engine = LexicalEngine(LexicalConfig(evidence=False), known_checklist())
    ids = [*USEFUL, *NOISE]
    rows = list(itertools.chain.from_iterable(generate_paper(seed, index) for index in range(num_papers)))
    answered = [engine.answers(row["review_text"]) for row in rows]
    yes = np.array([[answer[name]["yes"] for name in ids] for answer in answered], dtype=np.float64)
    _, papers = np.unique([row["paper_id"] for row in rows], return_inverse=True)
    spread = np.maximum(yes.std(axis=0), 1e-9)
    return Design(yes / spread, spread, np.array([float(row["confidence"]) for row in rows]), papers.astype(np.int64))


def draw(seed: int, population: Design, num_papers: int = _DRAW_PAPERS) -> Draw:
    """The held-out estimate on a small corpus, beside the truth on `population`."""
    small = sample(seed, num_papers)
    training = outer_training(small.papers, 5, seed)
    scores = held_out_scores(small, training, RULES, seed)
    estimate = correlation(scores, small, training, Resampling(1000, seed, CONFIDENCE))
    everything = np.vstack([training, np.ones_like(training[:1])])
    coefficients = select(small, small.target[None], everything, RULES, seed).coefficients[0]
    worth = [_worth(item / small.spread, population) for item in coefficients]
    return Draw(estimate.value, estimate.low, estimate.high, float(np.mean(worth[:-1])), worth[-1])


def shuffled_p_value(seed: int, num_papers: int = _DRAW_PAPERS) -> float:
    """The test's p-value on a small corpus whose targets have been exchanged between papers."""
    small = sample(seed, num_papers)
    null = Design(small.answers, small.spread, permuted(small.target, small.papers, 1, 10_000 + seed)[0], small.papers)
    training = outer_training(null.papers, 5, seed)
    return permutation_test(null, training, RULES, seed, PERMUTATIONS, lambda done, total: None)[1]


def least_covered(count: int, rate: float) -> int:
    """The fewest successes of `count` that a true `rate` gives with a probability above one in a thousand."""
    below, successes = 0.0, 0
    while below + _binomial(count, successes, rate) <= 0.001:
        below += _binomial(count, successes, rate)
        successes += 1
    return successes


def _known_items(work: Path, num_seeds: int, num_papers: int) -> bool:
    print(f"Known items: {len(USEFUL)} useful, {len(NOISE)} noise, 1 constant, 1 copy; {num_papers} papers")
    print(f"{'seed':>4}{'reviews':>9}{'kept':>6}{'precision':>11}{'recall':>8}{'held-out':>10}{'interval':>18}{'p':>7}")
    good, results = True, []
    for seed in range(num_seeds):
        found = _in_folder(work, seed, num_papers)
        results.append(found)
        estimate, reviews = found.summary["correlation"], found.summary["num_reviews"]
        interval = f"{estimate['low']:.3f} to {estimate['high']:.3f}"
        share = f"{found.precision:>11.2f}{found.recall:>8.2f}{estimate['value']:>10.3f}{interval:>18}"
        print(f"{seed:>4}{reviews:>9}{len(found.kept):>6}{share}{found.summary['p_value']:>7.3f}", flush=True)
    precision = float(np.mean([found.precision for found in results]))
    recall = float(np.mean([found.recall for found in results]))
    dropped = [found.summary["dropped"] for found in results]
    good = precision >= 0.9 and recall >= 0.9 and all(item["constant"] == [CONSTANT] for item in dropped)
    good &= all(item["redundant"] == [COPY] for item in dropped)
    print(f"mean precision {precision:.3f}, mean recall {recall:.3f} (bound: 0.9 each); constant and copy dropped\n")
    return good


def _in_folder(work: Path, seed: int, num_papers: int) -> Found:
    shutil.rmtree(work, ignore_errors=True)
    try:
        return run_stage(work, seed, num_papers)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _intervals(num_draws: int) -> bool:
    population = sample(_POPULATION_SEED, _POPULATION_PAPERS)
    print(f"Held-out estimates: {num_draws} corpora of {_DRAW_PAPERS} papers; truth on {_POPULATION_PAPERS} others")
    draws = [draw(seed, population) for seed in range(num_draws)]
    values = np.array([item.value for item in draws])
    bound = least_covered(num_draws, CONFIDENCE)
    for name, label in (("of_folds", "checklists of 4/5 of the papers"), ("of_final", "the checklist of all papers")):
        truth = np.array([getattr(item, name) for item in draws])
        bias, error = float((values - truth).mean()), float((values - truth).std(ddof=1) / num_draws**0.5)
        covered = sum(item.low <= getattr(item, name) <= item.high for item in draws)
        print(f"{label}: truth {truth.mean():.4f}, bias {bias:+.4f} (standard error {error:.4f}), ", end="")
        print(f"inside the {CONFIDENCE:.0%} interval {covered} of {num_draws} ({covered / num_draws:.1%})", flush=True)
        if name == "of_folds":
            good = covered >= bound and abs(bias) <= max(0.005, 3 * error)
    print(f"bounds for the first: at least {bound} inside (binomial, 0.1 %), bias at most 0.005 or 3 standard errors\n")
    return good


def _shuffled(num_draws: int) -> bool:
    alarms = sum(shuffled_p_value(seed) <= ALPHA for seed in range(num_draws))
    bound = num_draws - least_covered(num_draws, 1 - ALPHA)
    print(f"Shuffled targets: a signal is reported on {alarms} of {num_draws} ({alarms / num_draws:.1%}; ", end="")
    print(f"nominal {ALPHA:.0%}, bound {bound}: binomial, 0.1 %)")
    return alarms <= bound


def _plan(work: Path, seed: int, num_papers: int, select_keys: dict[str, Any], candidates: Path) -> Plan:
    splits = {"train": 0.04, "val": 0.03, "dev": 0.9, "test": 0.03}
    source = {"format": "generated", "num_papers": num_papers, "seed": seed}
    stages = {
        "ingest_reviews": {"set": {"sources": [source], "splits": splits}},
        "optimize_checklist": {
            "set": {
                "propose": {"shipped": False, "candidates": str(candidates.absolute())},
                "select": select_keys,
                "refit": {"num_permutations": PERMUTATIONS, "num_resamples": 2000},
                "seed": seed,
            }
        },
    }
    return make_plan(
        validate(Pipeline, {"name": "known", "workspace": str(work.absolute()), "stages": stages}), Path(__file__)
    )


def _write_shuffled(reviews: Path, labels: Path, seed: int) -> None:
    """The confidences as labels, exchanged between all reviews."""
    rows = list(read_jsonl(reviews))
    values = [row["confidence"] for row in rows]
    random.Random(seed).shuffle(values)
    with labels.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["review_id", "label"])
        writer.writerows(zip((row["review_id"] for row in rows), values, strict=True))


def _as_rule(template: str) -> str:
    """The longest piece of a phrase of the bank that has no gap in it: no other phrase holds it."""
    return re.escape(max(re.split(r"%\(\w+\)s", template.lower()), key=len).strip())


def _worth(weights: Array, population: Design) -> float:
    scores = population.answers @ (weights * population.spread)
    return float(np.corrcoef(scores, population.target)[0, 1]) if scores.std() > 0 else 0.0


def _binomial(count: int, successes: int, rate: float) -> float:
    return comb(count, successes) * rate**successes * (1 - rate) ** (count - successes)


if __name__ == "__main__":
    sys.exit(main())
