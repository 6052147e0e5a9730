"""The step `export`: the checklist that score_reviews reads, and a page on how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.checklist.items import Checklist, save_checklist
from prefmill.checklist.optimize.config import ExportConfig
from prefmill.checklist.score import OPTIMAL_CHECKLIST
from prefmill.core.errors import InputError
from prefmill.core.figures import with_interval
from prefmill.core.files import write_json

SUMMARY = "summary.json"
ALL_EQUAL = "all_items_equal"
_AS_MODELLED = {
    "chosen": "",
    "all_equal": ", all that pass the screen, with equal weights: no choice among them predicts better",
    "shrunk": ", with shrunk weights: many that tell a little predict better than the few that are chosen steadily",
    "shrunk_signed": ", with shrunk weights of both signs: these predict better than a choice, and a yes to an item "
    "of negative weight speaks against a review",
}
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
    # Weights may be empty beside a signal: folds choose well, but on all reviews no item is steady.
    falls_back = not (held_out["signal"] and weights) or (config.on_worse == "equal" and _is_worse(held_out, ALL_EQUAL))
    chosen = {item["id"]: 1.0 for item in items if _passed(item)} if falls_back else dict(weights)
    chosen = spread_over(chosen, len(items))
    kept = tuple(item.model_copy(update={"weight": chosen[item.id]}) for item in candidates.items if item.id in chosen)
    save_checklist(Checklist(name=config.name, items=kept), folder / OPTIMAL_CHECKLIST)
    summary = {**held_out, "num_candidates": len(items), "weights": {item.id: item.weight for item in kept}}
    summary["dropped"] = _dropped(items, set(chosen))
    summary["falls_back"] = falls_back
    summary["conclusion"] = conclusion(held_out, falls_back, len(weights), len(kept), len(items))
    write_json(folder / SUMMARY, summary)


def spread_over(weights: Mapping[str, float], score_range: float) -> dict[str, float]:
    """`weights` in such a unit that scores range over `score_range`, the number of candidates.

    Thresholds on scores (`min_checkmark_diff`) then mean the same share of the range as with all items at weight 1:
    a checklist of one item has scores of 0 and 24, not of 0 and 1, which differ by less than any pair needs.
    """
    size = sum(map(abs, weights.values())) or 1.0
    return {name: round(weight * score_range / size, 3) for name, weight in weights.items()}


def conclusion(held_out: Row, falls_back: bool, num_kept: int, num_exported: int, num_candidates: int) -> str:
    """In two or three sentences what was found, no more than the numbers allow, and what is exported."""
    found = _finding(held_out, num_kept, num_candidates)
    if not falls_back:
        return found
    equal = held_out["baselines"][ALL_EQUAL]["correlation"]
    against = (
        f" All items equal correlate at {with_interval(equal)}: a yes speaks against a review there, and "
        "select.signed=true tries such weights."
    )
    return (
        f"{found} Exported with equal weights: the {num_exported} of {num_candidates} items that vary, agree with "
        f"themselves and do not repeat others.{against if equal['high'] < 0 else ''}"
    )


def _finding(held_out: Row, num_kept: int, num_candidates: int) -> str:
    target = held_out["target"].replace("_", " ")
    if not held_out["signal"]:
        p_value = held_out["p_value"]
        return f"No signal: on held-out papers no choice of items is shown to predict {target} (p = {p_value:.2g})."
    if num_kept == 0:
        return (
            f"On held-out papers choices of items predict {target} (p = {held_out['p_value']:.2g}), but on all dev "
            "reviews no item is chosen steadily."
        )
    found = held_out["correlation"]
    verdicts: dict[str, list[str]] = {"better than": [], "worse than": [], "not shown to differ from": []}
    for name in held_out["baselines"]:
        better, worse = _is_better(held_out, name), _is_worse(held_out, name)
        verdict = "better than" if better else "worse than" if worse else "not shown to differ from"
        verdicts[verdict].append(name.replace("_", " "))
    compared = ", ".join(f"{verdict} {_listed(names)}" for verdict, names in verdicts.items() if names)
    kept = f"{num_kept} of {num_candidates} items are kept"
    kept += _AS_MODELLED[held_out["model"]]
    return (
        f"{kept}. On held-out papers such a checklist's score correlates with "
        f"{target} at {with_interval(found)}: {compared}."
    )


def _is_better(held_out: Row, baseline: str) -> bool:
    # Only where the whole interval is on one side: less would claim more than the numbers allow.
    return bool(held_out["baselines"][baseline]["advantage"]["low"] > 0)


def _is_worse(held_out: Row, baseline: str) -> bool:
    return bool(held_out["baselines"][baseline]["advantage"]["high"] < 0)


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
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
