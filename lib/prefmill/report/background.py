"""The report's sections on what the models came from: data, training, and the way from raw input to checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.core.files import digest_json
from prefmill.report.charts import Line, histogram, line_chart
from prefmill.report.costs import cost_section
from prefmill.report.graph import lineage_graph
from prefmill.report.training_logs import CURVES, NATS, Curve, Curves, bins, read_curves, read_margins

Row = dict[str, Any]
CHECKLIST = "checklist.json"


def training_section(checkpoints: Sequence[Artifact]) -> list[Row]:
    """Each training task with its charts, or why it has none."""
    return [_training(checkpoint) for checkpoint in checkpoints]


def training_checklists(artifacts: Iterable[Artifact]) -> set[str]:
    """Digests of the checklists that the training data were scored with, as far as they are known."""
    scores = (item for item in artifacts if item.manifest.kind == "review_scores")
    paths = (item.path / entry.path for item in scores for entry in item.manifest.files if entry.path == CHECKLIST)
    return {digest_json(json.loads(path.read_text())) for path in paths}


def closing_sections(artifacts: Sequence[Artifact], missing: Sequence[str], show_cost: bool) -> Row:
    """The end of every page: where all of it came from, as a list and drawn, and what that cost."""
    lineage = lineage_section(artifacts, missing)
    return {
        "lineage": lineage,
        "graph": lineage_graph(lineage["levels"], lineage["edges"]),
        "cost": cost_section(artifacts) if show_cost else None,
    }


def lineage_section(artifacts: Sequence[Artifact], missing: Sequence[str]) -> Row:
    """Artifacts with digests and configurations, raw input first, and the stages that made them as a graph."""
    found = {item.manifest.content_digest: item for item in artifacts}
    edges = _stage_edges(found)
    depths = _depths({item.manifest.stage for item in found.values()}, edges)
    # Not in the order in which they were found: the same inputs give the same bytes.
    ordered = sorted(
        found.values(), key=lambda item: (depths[item.manifest.stage], item.manifest.stage, item.manifest.task)
    )
    return {
        "artifacts": [_describe(item) for item in ordered],
        "missing": list(missing),
        "levels": _levels(ordered, depths),
        "edges": sorted(edges),
    }


def _training(checkpoint: Artifact) -> Row:
    curves = read_curves(checkpoint)
    # What an image model scores is an error of the denoised picture, and no likelihood.
    unit = "squared error" if checkpoint.manifest.kind == "image_checkpoint" else NATS
    charts = [
        _curve_chart(
            curves,
            replace(curve, unit=unit) if curve.unit == NATS else curve,
            _level_of_no_preference(checkpoint, curve),
        )
        for curve in CURVES
        if curve.name in curves.points
    ]
    margins = read_margins(checkpoint)
    if margins:
        title = f"Margins of the training pairs in the last epoch of {curves.stage}:{curves.task}"
        chart = histogram(bins(margins), curves.stage, title, f"margin, in {unit}")
        above = sum(margin > 0 for margin in margins) / len(margins)
        charts.append(
            {"title": "Margins in the last epoch", "chart": chart, "note": f"{above:.0%} of {len(margins)} above zero"}
        )
    is_control = bool(_config(checkpoint).get("shuffle_labels"))
    name = f"{curves.stage}:{curves.task}"
    return {"name": name, "charts": charts, "missing": curves.missing, "is_control": is_control}


def _curve_chart(curves: Curves, curve: Curve, reference: float | None) -> Row:
    points = curves.points[curve.name]
    (first, start), (last, end) = points[0], points[-1]
    title = f"{curve.title} of {curves.stage}:{curves.task}"
    line = Line(curve.title, curves.stage, points)
    dashed = "; dashed: ln 2, no preference" if reference is not None else ""
    return {
        "title": curve.title,
        "chart": line_chart([line], title, "step", curve.unit, reference),
        "note": f"{curve.explained}; {start:.3f} at step {first:g}, {end:.3f} at step {last:g}{dashed}",
    }


def _level_of_no_preference(checkpoint: Artifact, curve: Curve) -> float | None:
    """The loss of the sigmoid objective where the model cannot tell chosen from rejected."""
    # DPO's loss is -log sigmoid(margin) (Rafailov et al. 2023), which is ln 2 where the margin is 0.
    loss_type = _config(checkpoint).get("loss_type")
    return math.log(2) if loss_type == ["sigmoid"] and curve.name in ("loss", "eval_loss") else None


def _config(artifact: Artifact) -> Mapping[str, Any]:
    """The configuration as far as it decides the content: no paths of this machine, no runtime keys."""
    config: Mapping[str, Any] = artifact.manifest.identity.get("config", {})
    return config


def _describe(artifact: Artifact) -> Row:
    """What identifies an artifact. The code's version and paths stay out: they differ where the content does not."""
    manifest = artifact.manifest
    return {
        "name": f"{manifest.stage}:{manifest.task}",
        "kind": manifest.kind,
        "digest": manifest.content_digest,
        "num_files": len(manifest.files),
        "num_bytes": sum(entry.bytes for entry in manifest.files),
        "inputs": {name: digests for name, digests in manifest.inputs.items() if digests},
        "config": json.dumps(_config(artifact), indent=1, sort_keys=True, ensure_ascii=False),
    }


def _stage_edges(found: Mapping[str, Artifact]) -> set[tuple[str, str]]:
    """(made by, read by) for every two stages that an artifact went between."""
    return {
        (found[digest].manifest.stage, item.manifest.stage)
        for item in found.values()
        for digests in item.manifest.inputs.values()
        for digest in digests
        if digest in found
    }


def _depths(stages: Iterable[str], edges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The longest way from a stage that reads nothing; stages read what others made, so there is no circle."""
    parents: dict[str, set[str]] = {stage: set() for stage in stages}
    for maker, reader in edges:
        # A stage that read an output of its own would be its own parent, and the recursion without end.
        if maker != reader:
            parents[reader].add(maker)

    def depth(stage: str) -> int:
        return 1 + max((depth(parent) for parent in parents[stage]), default=-1)

    return {stage: depth(stage) for stage in parents}


def _levels(ordered: Sequence[Artifact], depths: Mapping[str, int]) -> list[list[Row]]:
    """The graph's boxes: a stage each, by depth, with its tasks counted."""
    stages: dict[str, Row] = {}
    for item in ordered:
        box = stages.setdefault(
            item.manifest.stage, {"stage": item.manifest.stage, "kind": item.manifest.kind, "tasks": 0, "digest": ""}
        )
        box["tasks"] += 1
        box["digest"] = item.manifest.content_digest[:12]
    deepest = max(depths.values(), default=-1)
    return [[box for stage, box in stages.items() if depths[stage] == level] for level in range(deepest + 1)]
