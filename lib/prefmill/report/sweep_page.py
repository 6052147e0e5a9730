"""The page of a sweep: how the best value rose, and the value over each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prefmill.report.charts import Line, line_chart, scatter_chart
from prefmill.sweep.config import Choices, SearchInterval, StudyConfig

Row = Mapping[str, Any]
_STYLE = Markup(
    "body{margin:2rem auto;max-width:62rem;padding:0 1rem;font:1rem/1.5 system-ui,sans-serif;color:#1b1f27;"
    "background:#faf9f6}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1.5rem}"
    "svg{width:100%;height:auto}svg text{font-size:11px;fill:#586070}.grid{stroke:#e1ded6}.zero{stroke:#586070;"
    "stroke-dasharray:4 3}.curve{fill:none;stroke-width:2}.s-base .mark,.s-base.cloud .mark{fill:#667085}"
    ".s-base .curve{stroke:#667085}.s-dpo .mark,.s-dpo.cloud .mark{fill:#1d5fcf}.s-dpo .curve{stroke:#1d5fcf}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .8rem;text-align:right;"
    "border-bottom:1px solid #e1ded6}.best td{font-weight:700}h1,h2{line-height:1.2}"
    "@media(prefers-color-scheme:dark){body{color:#eae8e2;background:#13151a}svg text{fill:#a4acba}"
    ".grid{stroke:#333945}td,th{border-color:#333945}}"
)


def sweep_page(rows: Sequence[Row], best: Row, config: StudyConfig) -> str:
    """One self-contained HTML page of a finished study."""
    complete = [row for row in rows if row["state"] == "complete"]
    judged = f", judged by {config.judge.stage}" if config.judge else ""
    title = f"Sweep {config.study_name}: {config.stage}"
    # The empty icon keeps browsers from asking for /favicon.ico.
    return str(
        Markup(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            '<link rel="icon" href="data:,"><title>{}</title><style>{}</style><h1>{}</h1>'
            "<p>{} trials, {} with a value; to {} {}{}. Best: trial {}.</p><div class=charts>{}</div>"
            "<h2>Trials</h2>{}</html>\n"
        ).format(
            title, _STYLE, title, len(rows), len(complete), config.direction, config.metric, judged, best["number"],
            Markup("").join(sweep_charts(rows, best, config)), _table(rows, best, config),
        )
    )  # fmt: skip


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


def _table(rows: Sequence[Row], best: Row, config: StudyConfig) -> Markup:
    head = Markup("").join(Markup("<th>{}").format(name) for name in ("trial", *config.space, config.metric))
    body = [
        Markup("<tr{}>{}").format(
            Markup(" class=best") if row["number"] == best["number"] else "",
            Markup("").join(Markup("<td>{}").format(cell) for cell in _cells(row, config)),
        )
        for row in rows
    ]
    return Markup("<table><tr>{}{}</table>").format(head, Markup("").join(body))


def _cells(row: Row, config: StudyConfig) -> list[str]:
    shown = row["state"] if row["value"] is None else f"{row['value']:.4f}"
    values = (row["params"][name] for name in config.space)
    return [str(row["number"]), *(f"{one:.3g}" if isinstance(one, float) else str(one) for one in values), shown]
