"""python -m tests.docs.diagrams writes the drawings of docs/images: the stages and the library, from the code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from prefmill.core.stage import load_stage
from prefmill.pipeline.plan import Plan, make_plan, read_pipeline
from prefmill.report.background import lineage_graph
from prefmill.report.charts import WIDTH, element, text
from tests.conftest import REPOSITORY
from tests.structure import layers

FOLDER = REPOSITORY / "docs" / "images"
PIPELINES = {"Reviews": "review", "Images": "sdxl"}
# Mid tones that are read on white and on black alike: a picture cannot ask which the page is.
STYLE = """
svg { font-family: system-ui, sans-serif; } text { fill: #3d4657; font-size: 12px; }
.box { fill: #eef1f6; stroke: #8792a6; } .box-name { font-size: 13px; font-weight: 600; fill: #1b1f27; }
.box-note { font-size: 11px; } .arrow { fill: none; stroke: #6b768a; stroke-width: 1.3; } .arrow-head { fill: #6b768a; }
.title { font-size: 14px; font-weight: 600; fill: #6b768a; }
"""


def flow() -> str:
    """The stages of the shipped pipelines side by side, with an arrow to each that reads an output."""
    parts, heights = [], []
    for column, (title, name) in enumerate(PIPELINES.items()):
        path = REPOSITORY / "configs" / "pipelines" / f"{name}.yaml"
        graph, height = _graph(make_plan(read_pipeline(path), path))
        left = column * (WIDTH + 20)
        parts += [
            text(title, left + WIDTH / 2, 16, "title", "middle"),
            element("g", graph, transform=f"translate({left:g} 26)"),
        ]
        heights.append(height)
    return _svg("Stages and what they read", 2 * WIDTH + 20, max(heights) + 30, parts)


def _graph(plan: Plan) -> tuple[Markup, float]:
    """The drawing, and how high it is."""
    reads: dict[str, set[str]] = {task.stage.name: set() for task in plan.tasks}
    for task in plan.tasks:
        reads[task.stage.name] |= {other.stage.name for other in plan.upstream(task)} - {task.stage.name}
    levels: dict[int, list[Mapping[str, object]]] = {}
    for name in reads:
        box = {"stage": name, "tasks": 1, "digest": load_stage(name).writes.replace("_", " ")}
        levels.setdefault(_depth(name, reads), []).append(box)
    edges = sorted((maker, reader) for reader, makers in reads.items() for maker in makers)
    drawn = lineage_graph([levels[depth] for depth in sorted(levels)], edges)
    assert drawn is not None
    found = re.search(r'viewBox="0 0 \S+ ([\d.]+)"', drawn)
    assert found is not None
    size = f'<svg width="{WIDTH:g}" height="{found[1]}"'
    return Markup(re.sub(r"^<svg", size, drawn, count=1)), float(found[1])


def _depth(name: str, reads: Mapping[str, set[str]]) -> int:
    return 1 + max((_depth(other, reads) for other in reads[name]), default=-1)


def library() -> str:
    """The packages of the library, the highest on top."""
    packages = list(reversed(layers()))
    parts = []
    for index, name in enumerate(packages):
        module = __import__(f"prefmill.{name}", fromlist=["_"])
        top = 4 + 34.0 * index
        parts += [
            element("rect", x=4, y=top, width=700, height=28, rx=6, class_="box"),
            text(name, 16, top + 18, "box-name"),
            text((module.__doc__ or "").strip().splitlines()[0], 130, top + 18, "box-note"),
        ]
    return _svg("The library's packages: each imports only from those below", 708, 34.0 * len(packages) + 8, parts)


def _svg(title: str, width: float, height: float, parts: Sequence[Markup]) -> str:
    drawn = element(
        "svg", element("title", escape(title)), element("style", Markup(STYLE)), *parts,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:g} {height:g}", width=width, height=height,
    )  # fmt: skip
    return f"{drawn}\n"


def main() -> None:
    """Write both."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "flow.svg").write_text(flow())
    (FOLDER / "layers.svg").write_text(library())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
