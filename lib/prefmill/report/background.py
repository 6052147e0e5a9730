"""The report's sections on what the models came from: data, training, and the way from raw input to checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup, escape

from prefmill.core.artifact import Artifact
from prefmill.core.files import digest_json
from prefmill.report.charts import WIDTH, Line, element, histogram, line_chart, svg, text
from prefmill.report.training_logs import CURVES, NATS, Curve, Curves, bins, cost_section, read_curves, read_margins

BOX_HEIGHT, LEVEL_HEIGHT, BOX_WIDTH, SIDE = 44.0, 84.0, 150.0, 22.0
Place = tuple[float, float, float]  # centre, top, width


def lineage_graph(levels: Sequence[Sequence[Mapping[str, Any]]], edges: Sequence[tuple[str, str]]) -> Markup | None:
    """Boxes by level, raw input at the top, with an arrow from each stage to those that read its output."""
    if not levels:
        return None
    places = {box["stage"]: place for index, level in enumerate(levels) for box, place in _row(level, index)}
    arrows = [_arrow(places[maker], places[reader], maker, reader) for maker, reader in edges if maker != reader]
    boxes = [_box(box, places[box["stage"]]) for level in levels for box in level]
    height = LEVEL_HEIGHT * len(levels) - (LEVEL_HEIGHT - BOX_HEIGHT) + 4
    return svg("Which stage read the output of which", WIDTH, height, [*arrows, *boxes], "chart graph")


def _row(level: Sequence[Mapping[str, Any]], index: int) -> list[tuple[Mapping[str, Any], Place]]:
    """The boxes of a level side by side, alternating about the middle so that long arrows have room to pass."""
    room = (WIDTH - 2 * SIDE) / len(level)
    width = min(BOX_WIDTH, room - 12)
    top = 2 + LEVEL_HEIGHT * index
    return [(box, (SIDE + room * (place + 0.5), top, width)) for place, box in enumerate(level)]


def _box(box: Mapping[str, Any], place: Place) -> Markup:
    centre, top, width = place
    count = f"{box['tasks']} tasks" if box["tasks"] > 1 else box["digest"]
    return element(
        "g",
        element("rect", x=centre - width / 2, y=top, width=width, height=BOX_HEIGHT, rx=7, class_="box"),
        text(box["stage"], centre, top + 19, "box-name", "middle"),
        text(count, centre, top + 34, "box-note", "middle"),
    )


def _arrow(start: Place, end: Place, maker: str, reader: str) -> Markup:
    """A curve from the bottom of one box to the top of the other; over several levels it swings out to the side."""
    span = round((end[1] - start[1]) / LEVEL_HEIGHT)
    lean = (end[0] - start[0]) / WIDTH
    x1, y1 = start[0] + start[2] * 0.3 * max(-1.0, min(1.0, lean * 3)), start[1] + BOX_HEIGHT
    x2, y2 = end[0] - end[2] * 0.3 * max(-1.0, min(1.0, lean * 3)), end[1] - 5
    bend = LEVEL_HEIGHT * 0.3
    if span > 1:
        # The side follows from the names, so that the same graph is the same bytes.
        side = 1 if (len(maker) + len(reader)) % 2 else -1
        x1, x2 = start[0] + side * start[2] * 0.4, end[0] + side * end[2] * 0.4
        out = WIDTH / 2 + side * (WIDTH / 2 - 8 - 4 * (span % 4))
        path = f"M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {out:.1f} {y1:.1f} {out:.1f} {y1 + bend * 2:.1f} L{out:.1f} {y2 - bend * 2:.1f} C{out:.1f} {y2:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"  # noqa: E501
    else:
        path = f"M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    head = f"{x2 - 4:.1f},{y2 - 2:.1f} {x2 + 4:.1f},{y2 - 2:.1f} {x2:.1f},{y2 + 5:.1f}"
    return element(
        "g",
        element("title", escape(f"{reader} reads what {maker} made")),
        element("path", d=path, class_="arrow"),
        element("polygon", points=head, class_="arrow-head"),
    )


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
        "name": manifest.key,
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
