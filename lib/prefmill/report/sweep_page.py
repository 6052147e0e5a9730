"""The page of a sweep: how the best value rose, and the value over each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prefmill.report.charts import Line, line_chart, scatter_chart
from prefmill.report.report import page_environment
from prefmill.sweep.config import Choices, SearchInterval, StudyConfig

Row = Mapping[str, Any]


def sweep_page(rows: Sequence[Row], best: Row, config: StudyConfig) -> str:
    """One self-contained HTML page of a finished study."""
    title, charts = f"Sweep {config.study_name}: {config.stage}", sweep_charts(rows, best, config)
    page = page_environment().get_template("sweep.html.jinja")
    return page.render(title=title, rows=rows, best=best, config=config, charts=charts)


def sweep_charts(rows: Sequence[Row], best: Row, config: StudyConfig) -> list[Markup]:
    """The values in the order of the trials, then over each parameter."""
    complete = [row for row in rows if row["state"] == "complete"]
    return [_history(complete, config), *(_over(name, complete, best, config) for name in config.space)]


def _history(complete: Sequence[Row], config: StudyConfig) -> Markup:
    """Every value in the order of the trials, and the best so far."""
    pick = max if config.direction == "maximize" else min
    values = [(float(row["number"]), row["value"]) for row in complete]
    best = [(number, pick(value for _, value in values[: place + 1])) for place, (number, _) in enumerate(values)]
    lines = [Line("each trial", "base", values), Line("best so far", "dpo", best)]
    return line_chart(lines, f"{config.metric} of each trial and the best so far", "trial", config.metric)


def _over(name: str, complete: Sequence[Row], best: Row, config: StudyConfig) -> Markup:
    """The value over one parameter; logarithmic where it was drawn so, choices by their place."""
    item = config.space[name]
    groups = [
        Line("trials", "base", [(_place(item, row["params"][name]), row["value"]) for row in complete]),
        Line("best", "dpo", [(_place(item, best["params"][name]), best["value"])]),
    ]
    return scatter_chart(groups, f"{config.metric} over {name}", _axis(name, item), config.metric)


def _place(item: Choices | SearchInterval, value: Any) -> float:
    from math import log10

    if isinstance(item, Choices):
        numbers = all(isinstance(one, (int, float)) for one in item.choices)
        return float(value) if numbers else float(item.choices.index(value))
    # The charts know linear axes only.
    return log10(value) if item.log else float(value)


def _axis(name: str, item: Choices | SearchInterval) -> str:
    if isinstance(item, SearchInterval):
        return f"log10 {name}" if item.log else name
    if all(isinstance(one, (int, float)) for one in item.choices):
        return name
    return f"{name}: {', '.join(f'{place} {one}' for place, one in enumerate(item.choices))}"
