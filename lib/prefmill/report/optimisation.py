"""The report's section on how the checklist was chosen: held-out numbers, the path, and the verdict on each item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefmill.core.artifact import Artifact
from prefmill.core.figures import figure
from prefmill.report.charts import ChartInterval, Line, interval_chart, line_chart
from prefmill.store.jsonl import read_jsonl

Row = dict[str, Any]
CHOSEN, BASELINE = "dpo", "base"  # the looks that the charts borrow, for the checklist and its baselines
_ORDER = ("kept", "not_chosen", "redundant", "unreliable", "constant")


def optimisation_section(artifacts: Iterable[Artifact]) -> list[Row]:
    """What every optimised checklist behind the report came from; empty where the checklist was not optimised."""
    return [_describe(item) for item in artifacts if item.manifest.kind == "checklist"]


def _describe(checklist: Artifact) -> Row:
    summary: Row = checklist.json("summary.json")
    # Every candidate, what is kept first, the steadiest on top.
    items = sorted(
        read_jsonl(checklist.file("select/items.jsonl")),
        key=lambda item: (_ORDER.index(item["status"]), -(item["stability"] or 0)),
    )
    return {
        **summary,
        "chart": _held_out_chart(summary),
        "path": _path_chart(checklist.file("select/path.jsonl")),
        "rows": [{**item, "why": _why(item)} for item in items],
    }


def _held_out_chart(summary: Mapping[str, Any]) -> Markup:
    found = {"the optimised checklist": (CHOSEN, summary["correlation"])}
    found |= {
        name.replace("_", " "): (BASELINE, baseline["correlation"]) for name, baseline in summary["baselines"].items()
    }
    rows = [ChartInterval.of(label, series, item) for label, (series, item) in found.items()]
    target = summary["target"].replace("_", " ")
    return interval_chart(
        rows, f"Correlation with {target} on held-out papers", f"correlation with {target}", level=0.0
    )


def _path_chart(path: Path) -> Markup | None:
    """Cross-validation error against the number of items a penalty keeps; None where the path has one length only."""
    best: dict[int, float] = {}
    for row in read_jsonl(path):
        size = len(row["weights"])
        # Several penalties keep as many items: the least error among them is what that many can do.
        best[size] = min(row["error"], best.get(size, row["error"]))
    if len(best) < 2:
        return None
    points = [(float(size), error) for size, error in sorted(best.items())]
    line = Line("lasso", CHOSEN, points)
    return line_chart([line], "Error of the checklists on the regularisation path", "items", "mean squared error")


def _why(item: Mapping[str, Any]) -> str:
    if item["status"] == "redundant":
        return f"says what {item['redundant_with']} says"
    if item["status"] == "unreliable":
        measured = {"paraphrases": item["paraphrase_kappa"], "seeds": item["seed_kappa"]}
        return ", ".join(f"kappa over {name} {figure(value)}" for name, value in measured.items() if value is not None)
    return ""
