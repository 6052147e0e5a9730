"""The report's sections on a checklist: how it was chosen, and what its judge agrees with and is moved by."""

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
Found = Mapping[str, Any]
STRONG, FAINT = "dpo", "base"  # the looks that the charts borrow
_MEASURES = {
    "kappa": "kappa", "alpha": "Krippendorff's alpha", "ac1": "Gwet's AC1", "f1": "F1", "accuracy": "accuracy",
}  # fmt: skip


def judge_section(artifacts: Iterable[Artifact]) -> list[Row]:
    """What every judge_quality behind the report found; empty where there is none."""
    found = [item for item in artifacts if item.manifest.kind == "judge_quality"]
    return [judged(item.json("quality.json")) for item in found]


def judged(quality: Found) -> Row:
    """What was found of a judge, with its charts."""
    drawn = [{**judge, "people": _people_chart(judge), "moves": _moves_chart(judge)} for judge in quality["judges"]]
    return {**quality, "judges": drawn, "rows": _item_rows(quality)}


def _people_chart(judge: Found) -> Markup | None:
    """Overall agreement with people; None without labels."""
    if judge["labels"] is None:
        return None
    found = judge["labels"]
    rows = [ChartInterval.of(label, STRONG, found[name]) for name, label in _MEASURES.items() if found.get(name)]
    return interval_chart(rows, f"Agreement of {judge['name']} with people", "1 is complete agreement", level=0.0)


def _moves_chart(judge: Found) -> Markup | None:
    """How far each change of a review moves the score; None without probes."""
    probes = judge["probes"]
    if probes is None:
        return None
    shifts = {name.replace("_", " "): (STRONG, found) for name, found in probes["injections"].items()}
    # Any added text moves a model a little, so injections are read beside a neutral line of the same length.
    shifts |= {"a neutral line": (FAINT, probes["control"]), "twice the words": (FAINT, probes["padding"])}
    # None where no changed review could be asked about: that is no shift of 0.
    rows = [ChartInterval.of(name, look, found["score"]) for name, (look, found) in shifts.items() if found is not None]
    if not rows:
        return None
    return interval_chart(rows, f"What moves a score of {judge['name']}", "change of the checklist score", level=0.0)


def _item_rows(quality: Found) -> list[Row]:
    """Every item that anything was measured of, in the checklist's order as far as the tables have it."""
    judge = quality["judges"][0]
    columns = {
        "people": judge["labels"],
        "between": quality["between"],
        "paraphrases": judge["probes"]["paraphrases"] if judge["probes"] else None,
    }
    found = {name: {item["id"]: item for item in table["items"]} if table else {} for name, table in columns.items()}
    questions = {key: item["question"] for items in found.values() for key, item in items.items()}
    return [
        {"question": question, **{name: items.get(key) for name, items in found.items()}}
        for key, question in questions.items()
    ]


_ORDER = ("kept", "not_chosen", "redundant", "unreliable", "constant")


def optimisation_section(artifacts: Iterable[Artifact]) -> list[Row]:
    """What every optimised checklist behind the report came from; empty where the checklist was not optimised."""
    return [_optimised(item) for item in artifacts if item.manifest.kind == "checklist"]


def _optimised(checklist: Artifact) -> Row:
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
    found = {"the optimised checklist": (STRONG, summary["correlation"])}
    found |= {
        name.replace("_", " "): (FAINT, baseline["correlation"]) for name, baseline in summary["baselines"].items()
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
    line = Line("lasso", STRONG, points)
    return line_chart([line], "Error of the checklists on the regularisation path", "items", "mean squared error")


def _why(item: Mapping[str, Any]) -> str:
    if item["status"] == "redundant":
        return f"says what {item['redundant_with']} says"
    if item["status"] == "unreliable":
        measured = {"paraphrases": item["paraphrase_kappa"], "seeds": item["seed_kappa"]}
        return ", ".join(f"kappa over {name} {figure(value)}" for name, value in measured.items() if value is not None)
    return ""
