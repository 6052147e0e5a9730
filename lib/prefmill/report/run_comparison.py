"""Runs side by side: the keys in which they differ, and their metrics with intervals paired by paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.core.config import flatten
from prefmill.core.errors import InputError
from prefmill.core.figures import with_interval
from prefmill.core.statistics import Resampling
from prefmill.evaluation.comparison import compare
from prefmill.evaluation.metrics import MEASURES
from prefmill.evaluation.record import METRICS
from prefmill.report.report import page_environment
from prefmill.report.story import p_text
from prefmill.store.artifacts import read_manifest

Outputs = Mapping[str, Mapping[str, Artifact]]  # the finished artifacts of each run, by stage:task
ABSENT = "–"


@dataclass(frozen=True)
class RunValues:
    """What one task has in each run, in the runs' order: the value of a key, or of a metric."""

    task: str
    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Paired:
    """The difference of a measure to the first run, on the papers that both evaluated."""

    task: str
    measure: str
    run: str
    value: float
    low: float
    high: float
    p_holm: float
    num_papers: int

    def __str__(self) -> str:
        return f"{with_interval(vars(self), '+.2f')}, {p_text(self.p_holm)}"


@dataclass(frozen=True)
class RunComparison:
    """Keys that differ, numbers of finished tasks, and what can be said of differences."""

    runs: tuple[str, ...]
    keys: list[RunValues]
    metrics: list[RunValues]
    paired: list[Paired]
    notes: list[str]


def compare_runs(outputs: Outputs, resampling: Resampling) -> RunComparison:
    """Compare the runs of `outputs`; those whose evaluations cannot be paired are named in the notes."""
    runs = tuple(outputs)
    tasks = list(dict.fromkeys(task for found in outputs.values() for task in found))
    made = {task: [outputs[run].get(task) for run in runs] for task in tasks}
    keys = [line for task, items in made.items() for line in _differing(task, [_keys(item) for item in items])]
    metrics = [line for task, items in made.items() for line in _differing(task, [_numbers(item) for item in items])]
    paired, notes = _paired(outputs, made, resampling)
    return RunComparison(runs, keys, metrics, paired, notes)


def comparison_page(found: RunComparison) -> str:
    """One self-contained HTML page."""
    labels = {measure.name: measure.label for measure in MEASURES}
    page = page_environment().get_template("runs.html.jinja")
    return page.render(title=", ".join(found.runs), found=found, labels=labels, show=show)


def show(value: Any) -> str:
    """A value of a key or a metric as a reader wants it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _keys(artifact: Artifact | None) -> dict[str, Any]:
    return dict(flatten(artifact.manifest.identity["config"])) if artifact else {}


def _numbers(artifact: Artifact | None) -> dict[str, Any]:
    metrics = artifact.manifest.metrics if artifact else {}
    return {key: value for key, value in flatten(metrics) if type(value) in (int, float)}  # a bool is an int too


def _differing(task: str, found: Sequence[Mapping[str, Any]]) -> list[RunValues]:
    names = dict.fromkeys(name for values in found for name in values)
    lines = [RunValues(task, name, tuple(values.get(name, ABSENT) for values in found)) for name in names]
    return [line for line in lines if any(value != line.values[0] for value in line.values)]


def _paired(
    outputs: Outputs, made: Mapping[str, Sequence[Artifact | None]], resampling: Resampling
) -> tuple[list[Paired], list[str]]:
    paired: list[Paired] = []
    notes: list[str] = []
    first = next(iter(outputs))
    for task, items in made.items():
        given = {
            run: item for run, item in zip(outputs, items, strict=True) if item and item.manifest.kind == "evaluation"
        }
        same = len({item.manifest.content_digest for item in given.values()}) < 2
        # Runs that share a task have the same content there: no bootstrap is needed to find no difference.
        if first not in given or same:
            continue
        # compare() tells evaluations apart by their model, in whose place the runs stand here.
        read = [item.json(METRICS) | {"model": run} for run, item in given.items()]
        try:
            compared = compare(read, resampling)
        except InputError as error:
            # One task that cannot be compared must not keep the others from it.
            notes.append(f"{task}: {error.what}")
            continue
        pairs = [pair for part in compared["modalities"] for pair in part["pairs"]]
        with_first = [pair for pair in pairs if first in (pair["baseline"], pair["candidate"])]
        paired += [line for pair in with_first for line in _lines(task, first, pair)]
    return paired, notes


def _lines(task: str, first: str, pair: Mapping[str, Any]) -> list[Paired]:
    """The differences to `first`, which `compare` may have sorted behind the other run."""
    turned = -1 if pair["candidate"] == first else 1
    other = pair["baseline"] if turned < 0 else pair["candidate"]
    measures = {name: item for name, item in pair["measures"].items() if item["value"] or item["low"] or item["high"]}
    return [
        Paired(task, name, other, turned * item["value"], min(ends), max(ends), item["p_holm"], item["num_papers"])
        for name, item in measures.items()
        if (ends := [turned * item[end] for end in ("low", "high")])
    ]


def finished_outputs(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Artifact]:
    """The finished artifact of each task of a run's plan, by its key."""
    places = {task["key"]: Path(task["output"]) for task in tasks}
    return {key: Artifact(path, made) for key, path in places.items() if (made := read_manifest(path)) is not None}
