"""A finished task in a line, and its warnings: what a reader of the console would otherwise look for in files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefmill.core.errors import ArtifactError
from prefmill.core.figures import with_interval
from prefmill.core.files import read_record
from prefmill.pipeline.plan import PlannedTask
from prefmill.store.artifacts import read_manifest

_PHRASES = {  # of the metrics that stages return, those worth a place in the line, in its order
    "papers": "{:,} papers", "reviews": "{:,} reviews", "num_scored": "{:,} reviews scored",
    "mean_checkmark_score": "mean score {:.2f}", "num_images": "{:,} images", "num_kept": "{:,} items kept",
    "train_rows": "{:,} rows", "pairs": "{:,} pairs", "steps": "{:,} steps", "final_loss": "last loss {:.3f}",
    "val_loss": "validation loss {:.3f}", "val_accuracy": "validation accuracy {:.1%}", "errors": "{:,} errors",
    "warnings": "{:,} warnings", "checkmark_score": "checklist score {:.2f}", "num_papers": "over {:,} papers",
    "recommendation_correct": "recommendations right {:.0%}", "n_trials": "{:,} trials",
    "win_rate": "win rate {}", "num_pairs": "{:,} pairs", "num_prompts": "{:,} prompts",
}  # fmt: skip
_MOST_PHRASES, _MOST_WARNINGS = 4, 3
_FAULTS = {
    "quarantined_rows": "{:,} rows set aside: see quarantine.jsonl", "num_failed": "{:,} reviews could not be scored",
    "num_truncated": "{:,} reviews were cut to fit the model", "unscored_reviews": "{:,} reviews have no score",
    "num_empty": "{:,} reviews are empty", "dropped_rows": "{:,} rows were left out",
}  # fmt: skip


def describe(task: PlannedTask) -> list[str]:
    """The headline of a finished task, where its metrics have one, and a line for each of its first warnings."""
    try:
        manifest = read_manifest(task.output)
    except ArtifactError:
        # Whoever reads the damaged output reports it; a headline must not end the run.
        return []
    metrics = manifest.metrics if manifest else {}
    found = [*_faults(metrics), *_findings(task.output), *_alarms(task.logs)]
    head = headline(metrics)
    more = [_singular(f"! {len(found) - _MOST_WARNINGS} more warnings")] if len(found) > _MOST_WARNINGS else []
    return [*([f"  {head}"] if head else []), *(f"! {text}" for text in found[:_MOST_WARNINGS]), *more]


def headline(metrics: Mapping[str, Any]) -> str:
    """The numbers of a task worth a glance; empty where it has none of them."""
    rows = metrics.get("rows")
    parts = rows.items() if isinstance(rows, Mapping) else ()
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in parts]
    known = {name: metrics[name] for name in _PHRASES if isinstance(metrics.get(name), (int, float))}
    if "win_rate" in known:
        ends = {end: metrics.get(f"win_rate_{end}") for end in ("low", "high")}
        known["win_rate"] = with_interval({"value": known["win_rate"], **ends}, ".0%")
    told = [_singular(_PHRASES[name].format(value)) for name, value in known.items()]
    return ", ".join([*counts, *told][:_MOST_PHRASES])


def _faults(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield from (_singular(text.format(metrics[name])) for name, text in _FAULTS.items() if metrics.get(name))
    if isinstance(told := metrics.get("warnings"), list):
        yield from map(str, told)


def _findings(output: Path) -> Iterator[str]:
    """What validate_datasets warns of."""
    found = read_record(output / "report.json").get("findings", [])
    yield from (f"{item['where']}: {item['what']}" for item in found if item["severity"] == "warning")


def _alarms(logs: Path) -> Iterator[str]:
    """What a preference training noticed of itself, the last word of it."""
    path = logs / "alarms.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    if rows:
        yield f"{len(rows)} alarms during training, the last: {rows[-1][:160]}"


def _singular(text: str) -> str:
    """One of something: `1 warnings` is one warning."""
    # The look-behind spares the last digit of 21, 1,001 and 0.1.
    return re.sub(r"(?<![\d,.])1 (more )?(\w+)s\b", r"1 \1\2", text)
