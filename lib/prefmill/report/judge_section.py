"""The report's section on the judge: its agreement with people and other judges, and what moves its scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from prefmill.core.artifact import Artifact
from prefmill.report.charts import ChartInterval, interval_chart

Row = dict[str, Any]
Found = Mapping[str, Any]
STRONG, FAINT = "dpo", "base"  # the looks that the charts borrow
_MEASURES = {"kappa": "kappa", "f1": "F1", "accuracy": "accuracy"}


def judge_section(artifacts: Iterable[Artifact]) -> list[Row]:
    """What every judge_quality behind the report found; empty where there is none."""
    found = [item for item in artifacts if item.manifest.kind == "judge_quality"]
    return [_describe(item.json("quality.json")) for item in found]


def _describe(quality: Found) -> Row:
    drawn = [{**judge, "people": _people_chart(judge), "moves": _moves_chart(judge)} for judge in quality["judges"]]
    return {**quality, "judges": drawn, "rows": _item_rows(quality)}


def _people_chart(judge: Found) -> Markup | None:
    """Overall agreement with people; None without labels."""
    if judge["labels"] is None:
        return None
    rows = [ChartInterval.of(label, STRONG, judge["labels"][name]) for name, label in _MEASURES.items()]
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
