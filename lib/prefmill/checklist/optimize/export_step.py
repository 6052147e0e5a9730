"""The step `export`: the checklist that score_reviews reads, and a page on how it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.artifacts import write_atomic
from prefmill.checklist.items import Checklist, save_checklist
from prefmill.checklist.optimize.config import ExportConfig
from prefmill.checklist.score import OPTIMAL_CHECKLIST
from prefmill.errors import InputError

SUMMARY = "summary.json"
Row = Mapping[str, Any]


def write_export(
    config: ExportConfig,
    candidates: Checklist,
    items: Sequence[Row],
    weights: Mapping[str, float],
    held_out: Row,
    folder: Path,
) -> None:
    """Write `optimal_checklist.json` and `summary.json`; raises InputError without a signal where that must fail."""
    if not held_out["signal"] and config.on_no_signal == "fail":
        raise InputError(
            f"no signal: the items tell nothing of the target '{held_out['target']}' on held-out papers",
            got=f"p = {held_out['p_value']:.3g}", expected=f"at most {held_out['alpha']:g}",
            fix="label or ingest more dev reviews, name another target, or set export.on_no_signal=equal",
        )  # fmt: skip
    chosen = dict(weights) if held_out["signal"] else {item["id"]: 1.0 for item in items if _passed(item)}
    kept = tuple(item.model_copy(update={"weight": chosen[item.id]}) for item in candidates.items if item.id in chosen)
    save_checklist(Checklist(name=config.name, items=kept), folder / OPTIMAL_CHECKLIST)
    summary = {**held_out, "num_candidates": len(items), "weights": {item.id: item.weight for item in kept}}
    summary["dropped"] = _dropped(items, set(chosen))
    summary["conclusion"] = conclusion(held_out, len(kept), len(items))
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def conclusion(held_out: Row, num_kept: int, num_candidates: int) -> str:
    """In one or two sentences what was found, no more than the numbers allow."""
    target = held_out["target"].replace("_", " ")
    if not held_out["signal"]:
        return (
            f"No signal: on held-out papers no choice of items predicts {target} (p = {held_out['p_value']:.2g}). The "
            f"{num_kept} of {num_candidates} items that vary, agree with themselves and do not repeat others are "
            "exported with equal weights."
        )
    found = held_out["correlation"]
    interval = f"{found['low']:.2f} to {found['high']:.2f}"
    beaten: list[str] = []
    open_: list[str] = []
    for name, baseline in held_out["baselines"].items():
        (beaten if baseline["advantage"]["low"] > 0 else open_).append(name.replace("_", " "))
    better = f"better than {_listed(beaten)}" if beaten else "not shown to be better than any baseline"
    doubt = f", not shown to be better than {_listed(open_)}" if beaten and open_ else ""
    return (
        f"{num_kept} of {num_candidates} items are kept. On held-out papers such a checklist's score correlates with "
        f"{target} at {found['value']:.2f} ({interval}): {better}{doubt}."
    )


def _passed(item: Row) -> bool:
    return item["status"] in ("kept", "not_chosen")


def _dropped(items: Sequence[Row], kept: set[str]) -> dict[str, list[str]]:
    """The ids that were left out, by reason."""
    reasons: dict[str, list[str]] = {}
    for item in items:
        if item["id"] not in kept:
            reasons.setdefault("not_chosen" if _passed(item) else item["status"], []).append(item["id"])
    return dict(sorted(reasons.items()))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
