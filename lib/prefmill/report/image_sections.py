"""The report of tuned image models: win rates, drift, images side by side, the reward models, sweeps and lineage."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.figures import with_interval
from prefmill.evaluation.lineage import everything_behind
from prefmill.report import background
from prefmill.report.charts import ChartInterval, interval_chart
from prefmill.report.facts import facts
from prefmill.report.report import Report, page_environment
from prefmill.report.sweep_page import sweep_charts
from prefmill.store.jsonl import read_jsonl
from prefmill.sweep.config import StudyConfig

Row = dict[str, Any]
MIN_PROMPTS = 20  # below this an interval over prompts is wide, whatever it shows


def build_image_report(inputs: Mapping[str, Sequence[Artifact]], title: str, show_cost: bool) -> Report:
    """One self-contained page, images included; the same inputs give the same bytes but for what they cost.

    `inputs` are those of the stage: `images` is reported on, `rewards`, `tuned` and `sweeps` may be empty.
    """
    artifacts, missing = everything_behind(
        [item for name in ("rewards", "tuned", "sweeps", "images") for item in inputs[name]]
    )
    known = {item.manifest.content_digest: item for item in artifacts}
    parts = [_evaluation(item, known) for item in inputs["images"]]
    rewards = [_reward(item) for item in inputs["rewards"]]
    sweeps = {item.manifest.content_digest: item for item in inputs["sweeps"]}
    page = page_environment().get_template("images.html.jinja")
    html = page.render(
        title=title,
        facts=facts(artifacts, None, show_run=show_cost),
        parts=parts,
        rewards=rewards,
        training=background.training_section(inputs["tuned"]),
        sweeps=[_sweep(item) for item in sweeps.values()],
        **background.closing_sections(artifacts, missing, show_cost),
    )
    comparison = {
        "evaluations": {part["name"]: part["metrics"] for part in parts},
        "reward_models": {row["name"]: row["metrics"] for row in rewards},
    }
    return Report(html, comparison, [part["conclusion"] for part in parts], artifacts)


def _evaluation(evaluation: Artifact, known: Mapping[str, Artifact]) -> Row:
    metrics = evaluation.json("metrics.json")
    scorer = known.get(metrics["scorer"])
    grids = [entry.path for entry in evaluation.manifest.files if entry.path.startswith("grids/")]
    rate = metrics["dimensions"]["mean"]["win_rate"]
    return {
        "name": evaluation.manifest.key,
        "metrics": metrics,
        "conclusion": evaluation.manifest.metrics["conclusion"][0],
        "verdict": "helped" if rate["low"] > 0.5 else "hurt" if rate["high"] < 0.5 else "unclear",
        "chart": _win_rates(metrics),
        "rows": [{"name": name, **found} for name, found in metrics["dimensions"].items()],
        "drift": metrics["drift"],
        "doubts": _doubts(metrics, scorer),
        "grids": [_data_uri(evaluation, name) for name in grids],
    }


def _win_rates(metrics: Row) -> Markup:
    # Drawn as a distance from 1/2, so that the dashed line at 0 means no difference as in every chart.
    rows = [
        ChartInterval(
            label=name, series="dpo" if name == "mean" else "base", value=found["win_rate"]["value"] - 0.5,
            low=found["win_rate"]["low"] - 0.5, high=found["win_rate"]["high"] - 0.5,
            text=with_interval(found["win_rate"], ".0%"),
        )
        for name, found in metrics["dimensions"].items()
    ]  # fmt: skip
    return interval_chart(rows, "Win rate of the tuned model over its base", "win rate − 1/2", level=0.0)


def _doubts(metrics: Row, scorer: Artifact | None) -> list[str]:
    """What a careful reader would ask first."""
    published = metrics.get("published_scorer")
    doubts = [_of_a_published(published) if published else _of_the_scorer(scorer)]
    if metrics.get("shuffled_labels"):
        doubts.append("A control: winners and losers were swapped at random, so a win rate away from 1/2 is no taste.")
    if metrics["scorer_shares_training_prompts"]:
        doubts.append(
            "The scorer has learnt from prompts that the model was tuned on, so both may share the taste of those "
            "ratings: prompt_half=policy for sdxl_dpo and prompt_half=judge for the scorer keep them apart."
        )
    if trained := metrics.get("num_trained_prompts"):
        doubts.append(
            f"{trained} of the {metrics['num_prompts']} prompts are trained on in the pairs: a tuned model that has "
            "learnt them by heart would win on these."
        )
    if metrics["num_prompts"] < MIN_PROMPTS:
        doubts.append(f"Only {metrics['num_prompts']} prompts: the intervals can be trusted, but they are wide.")
    winner = (metrics["drift"] or {}).get("winner")
    if winner is None:
        doubts.append("The drift of the denoising error was not measured.")
    elif winner["value"] > 0 and (winner["low"] is None or winner["low"] > 0):
        # A margin of Diffusion-DPO (Wallace et al. 2023) is a difference of errors: it can grow while both rise.
        doubts.append(
            f"The tuned model denoises held-out winners worse than its base, by {winner['value']:.2g} on "
            f"{winner['base']:.2g}: a margin may have grown only because losers got worse still."
        )
    doubts.append("A scorer is no person: a model can please it by what people do not care for. Look at the images.")
    return doubts


def _of_a_published(name: str) -> str:
    return (
        f"The scorer is {name}, from elsewhere: it may have learnt from these prompts or from the preferences that the "
        "model was tuned on, and how well it agrees with your raters was not measured."
    )


def _of_the_scorer(scorer: Artifact | None) -> str:
    if scorer is None:
        return "The scorer was not found among the artifacts, so how well it predicts choices is not known."
    heads = scorer.json("metrics.json")["splits"]["test"]
    found = {name: head["accuracy"] for name, head in heads.items() if head and head["accuracy"]["value"] is not None}
    if not found:
        return "The scorer has never been measured on test pairs: its judgement may be worth nothing."
    # The weakest: a mean over dimensions would hide one on which the scorer guesses.
    worst = min(found, key=lambda name: found[name]["value"])
    share = with_interval(found[worst], ".0%")
    return f"On test pairs the scorer agrees with raters in {share} on its weakest dimension, {worst}."


def _reward(reward: Artifact) -> Row:
    metrics = reward.json("metrics.json")
    return {
        "name": reward.manifest.key,
        "metrics": metrics,
        "pairs": reward.manifest.metrics["pairs"],
        "rows": [
            {"split": split, "head": name, **found, "temperature": metrics["temperatures"][name]}
            for split, heads in metrics["splits"].items()
            for name, found in heads.items()
            if found is not None
        ],
    }


def _sweep(sweep: Artifact) -> Row:
    config = validate(StudyConfig, sweep.manifest.config)
    rows = list(read_jsonl(sweep.file("trials.jsonl")))
    best = rows[sweep.manifest.metrics["best_trial"]]
    return {
        "name": config.study_name,
        "stage": config.stage,
        "conclusion": sweep.manifest.metrics["conclusion"][0],
        "failed": sweep.manifest.metrics["failed"],
        "charts": sweep_charts(rows, best, config),
    }


def _data_uri(evaluation: Artifact, name: str) -> str:
    content = base64.b64encode(evaluation.file(name).read_bytes()).decode()
    return f"data:image/png;base64,{content}"
