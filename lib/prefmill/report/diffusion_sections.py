"""The report of masked-diffusion models before and after a tuning: what changed, how sure that is, answers, lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from markupsafe import Markup

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.figures import bounds
from prefmill.core.statistics import Array, Resampling, means, within
from prefmill.evaluation.lineage import everything_behind
from prefmill.report import background
from prefmill.report.charts import ChartInterval, interval_chart
from prefmill.report.facts import facts
from prefmill.report.report import Report, page_environment
from prefmill.store.jsonl import read_jsonl

Row = dict[str, Any]
MEASURES = {
    "preference_accuracy": "pairs whose chosen answer is the likelier one",
    "chosen_nats_per_token": "log-likelihood of chosen answers, nats per token",
    "rejected_nats_per_token": "log-likelihood of rejected answers, nats per token",
    "wanted_share": "answers of the wanted kind",
}
SHARES = {"preference_accuracy": "preference", "wanted_share": "wanted kind"}


def build_diffusion_report(
    evaluations: Sequence[Artifact],
    checkpoints: Sequence[Artifact],
    title: str,
    resampling: Resampling,
    examples: int,
    show_cost: bool,
) -> Report:
    """One self-contained page; the same inputs give the same bytes but for what they cost."""
    artifacts, missing = everything_behind([*checkpoints, *evaluations])
    parts = [_evaluation(item, resampling, examples) for item in evaluations]
    page = page_environment().get_template("diffusion.html.jinja")
    html = page.render(
        title=title,
        facts=facts(artifacts, None, show_run=show_cost),
        parts=parts,
        measures=MEASURES,
        training=background.training_section(checkpoints),
        **background.closing_sections(artifacts, missing, show_cost),
    )
    comparison = {part["name"]: {"models": part["models"], "changes": part["changes"]} for part in parts}
    return Report(html, {"evaluations": comparison}, [part["conclusion"] for part in parts], artifacts)


def _evaluation(evaluation: Artifact, resampling: Resampling, examples: int) -> Row:
    models: dict[str, Row] = evaluation.json("metrics.json")["models"]
    rows = list(read_jsonl(evaluation.file("rows.jsonl")))
    columns = {label: measured_by_unit([row for row in rows if row["model"] == label]) for label in models}
    first, last = next(iter(models)), list(models)[-1]
    changes = _changes(columns[first], columns[last], resampling) if len(models) > 1 else {}
    told = changes.get("preference_accuracy") or changes.get("wanted_share")
    return {
        "name": evaluation.manifest.key,
        "models": models,
        "first": first,
        "last": last,
        "names": list(dict.fromkeys(name for figures in models.values() for name in figures)),
        "changes": changes,
        "verdict": "unclear" if told is None else _verdict(told),
        "conclusion": _conclusion(first, last, models, told),
        "chart": _chart(changes),
        "answers": _answers(rows, list(models), examples),
    }


def measured_by_unit(rows: Sequence[Row]) -> dict[str, Array]:
    """Each measure of one model by what it is measured on: pairs, [P, 1], or prompts with all their answers, [Q, 1]."""
    chosen, rejected = (
        {row["pair_id"]: row for row in rows if row["kind"] == "likelihood" and row["side"] == side}
        for side in ("chosen", "rejected")
    )
    found: dict[str, list[float]] = {}
    if chosen:
        # The likelihood of a masked-diffusion model is known by a lower bound only (ELBO).
        margins = [chosen[pair]["bound"] - rejected[pair]["bound"] for pair in chosen]
        found["preference_accuracy"] = [0.5 + 0.5 * float(np.sign(margin)) for margin in margins]
        for side, of in (("chosen", chosen), ("rejected", rejected)):
            # Per token, or a few long answers would decide the mean.
            found[f"{side}_nats_per_token"] = [row["bound"] / row["num_tokens"] for row in of.values()]
    wanted: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "generation" and row["wanted"] is not None:
            # Answers to one prompt are alike, so the prompt is what the bootstrap draws.
            wanted.setdefault(row["prompt"], []).append(float(row["wanted"]))
    if wanted:
        found["wanted_share"] = [float(np.mean(answers)) for answers in wanted.values()]
    return {name: np.array(values)[:, None] for name, values in found.items()}


def _changes(before: Mapping[str, Array], after: Mapping[str, Array], resampling: Resampling) -> dict[str, Row]:
    """After minus before, paired, with intervals over pairs or prompts."""
    changes = {}
    for name in MEASURES:
        # The bootstrap refuses a single row: it has no spread.
        if name in before and name in after and len(before[name]) > 1:
            if before[name].shape != after[name].shape:
                raise InputError(
                    "the models were evaluated on different rows", got=name, fix="run mdlm_evaluate again on both"
                )
            (estimate,) = means(after[name] - before[name], resampling)
            if name in SHARES:
                # Where all rows agree the bootstrap has no width; a change of a share lies between -1 and 1.
                estimate = within(estimate, resampling, -1.0)
            changes[name] = {"of": MEASURES[name], **asdict(estimate)}
    return changes


def _verdict(change: Row) -> str:
    return "helped" if change["low"] > 0 else "hurt" if change["high"] < 0 else "unclear"


def _conclusion(first: str, last: str, models: Mapping[str, Row], change: Row | None) -> str:
    if change is None:
        return f"One model, {last}, was evaluated: there is nothing to compare."
    name = next(key for key, words in MEASURES.items() if words == change["of"])
    points = bounds({end: 100 * change[end] for end in ("low", "high")}, "+.0f")
    verb = {"helped": "rose", "hurt": "fell", "unclear": "did not clearly change"}[_verdict(change)]
    said = f"from {models[first][name]:.0%} ({first}) to {models[last][name]:.0%} ({last})"
    return f"The share of {change['of']} {verb}: {said}, {points} points, over {change['num_papers']} rows."


def _chart(changes: Mapping[str, Row]) -> Markup | None:
    rows = [ChartInterval.of(SHARES[name], "dpo", changes[name], "+.2f") for name in changes if name in SHARES]
    return interval_chart(rows, "What changed, after minus before", "share", level=0.0) if rows else None


def _answers(rows: Sequence[Row], labels: Sequence[str], count: int) -> list[Row]:
    """The first answer of each model to the first prompts."""
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["kind"] == "generation":
            first.setdefault(row["prompt"], {}).setdefault(row["model"], row["text"])
    shown = list(first.items())[:count]
    return [{"prompt": prompt, "texts": [(label, texts.get(label, "")) for label in labels]} for prompt, texts in shown]
