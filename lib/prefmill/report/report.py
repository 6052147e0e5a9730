"""The report: one self-contained page, its verdict and tables as Markdown, and all its numbers as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.figures import bounds, figure, with_interval
from prefmill.core.statistics import Resampling
from prefmill.evaluation.comparison import compare, model_order
from prefmill.evaluation.lineage import everything_behind
from prefmill.evaluation.metrics import MEASURES
from prefmill.evaluation.record import METRICS
from prefmill.report import background, sections
from prefmill.report.charts import key_marker, series_class
from prefmill.report.checklist_sections import judge_section, optimisation_section
from prefmill.report.examples import choose_papers, read_examples
from prefmill.report.facts import facts
from prefmill.report.story import Compared, Verdict, agreement_doubts, data_doubts, main_pair, tell
from prefmill.report.training_logs import clock

TEMPLATES = Path(__file__).parent / "templates"
Evaluated = tuple[Mapping[str, Any], Artifact]  # metrics.json, and the artifact that holds it


@dataclass(frozen=True)
class ReportInputs:
    """What is reported on; everything but the evaluations may be absent."""

    evaluations: Sequence[Artifact]
    corpus: Artifact | None
    datasets: Artifact | None
    validation: Artifact | None
    checkpoints: Sequence[Artifact]
    quality: Sequence[Artifact] = ()

    def all(self) -> list[Artifact]:
        """Every artifact given."""
        given = [self.corpus, self.datasets, self.validation, *self.checkpoints, *self.quality, *self.evaluations]
        return [item for item in given if item is not None]


@dataclass(frozen=True)
class Report:
    """The finished page, the numbers behind it, a conclusion an evaluation, and every artifact it leads back to.

    Of models that write reviews also the page as Markdown, and the verdict on each modality.
    """

    html: str
    comparison: dict[str, Any]
    conclusions: list[str]
    artifacts: Sequence[Artifact]
    markdown: str = ""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)


def build_report(
    inputs: ReportInputs, title: str, resampling: Resampling, num_examples: int, show_cost: bool
) -> Report:
    """Compare the evaluations and render the page; the same inputs give the same bytes but for what they cost.

    Raises InputError where evaluations cannot be compared.
    """
    evaluated = _read(inputs.evaluations)
    comparison = compare([metrics for metrics, _ in evaluated], resampling)
    validation = inputs.validation.json("report.json") if inputs.validation else None
    training = background.training_section(inputs.checkpoints)
    artifacts, missing = everything_behind(inputs.all())
    doubts = data_doubts(
        validation,
        is_control=any(task["is_control"] for task in training),
        other_checklist=bool(background.training_checklists(artifacts) - {item["checklist"] for item, _ in evaluated}),
    )
    parts = []
    for compared in comparison["modalities"]:
        group = [item for item in evaluated if item[0]["modality"] == compared["modality"]]
        metrics = [item[0] for item in group]
        chosen = _choose_examples(compared, metrics, num_examples, resampling.seed)
        parts.append(
            {
                "story": tell(
                    compared, metrics, resampling.confidence, [*agreement_doubts(compared, metrics), *doubts]
                ),
                "examples": read_examples(group, chosen, inputs.corpus),
                **_tables(compared, metrics, resampling.confidence),
            }
        )
    # Counts of papers and reviews by split, where the SFT cut fell, pairs made and dropped.
    made = {"corpus": inputs.corpus, "datasets": inputs.datasets}
    data = {name: item.json("summary.json") if item else None for name, item in made.items()}
    opening = facts(artifacts, data["datasets"], show_run=show_cost)
    page = page_environment().get_template("report.html.jinja")
    html = page.render(
        title=title,
        facts=opening,
        resampling=resampling,
        measures=(*MEASURES, *sections.EXTRA_MEASURES),
        modalities=parts,
        training=training,
        data=data,
        validation=validation,
        optimisation=optimisation_section(artifacts),
        judge=judge_section(artifacts),
        absent=_absent(inputs),
        # Cost is on the page alone: runs with one result differ in it, and comparison.json is to stay the same bytes.
        **background.closing_sections(artifacts, missing, show_cost),
    )
    stories = [part["story"] for part in parts]
    told = [f"[{story.modality}] {story.helped} {story.how_sure}" for story in stories]
    verdicts = {story.modality: story.verdict for story in stories}
    return Report(html, comparison, told, artifacts, to_markdown(title, opening, parts), verdicts)


def _read(evaluations: Sequence[Artifact]) -> list[Evaluated]:
    """In the order in which models are shown; raises InputError where the engines' settings differ."""
    read: list[Evaluated] = [(item.json(METRICS), item) for item in evaluations]
    _require_same_engine(read)
    return sorted(read, key=lambda item: model_order(item[0]["model"]))


def _tables(compared: Compared, metrics: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """The tables and charts of one modality."""
    questions = {item["id"]: item["question"] for item in metrics[0]["items"]}
    return {
        "compared": compared,
        "score_chart": sections.score_chart(compared),
        "difference_chart": sections.difference_chart(compared),
        "measures": sections.measure_table(compared),
        "pairs": sections.pair_table(compared, confidence),
        "agreement": [item for item in metrics if item.get("agreement")],
        "items": sections.item_rows(compared, questions, confidence),
        "factors": sections.factor_rows(compared, confidence),
        "length_chart": sections.length_chart(metrics),
    }


def _choose_examples(compared: Compared, metrics: Sequence[Mapping[str, Any]], count: int, seed: int) -> dict[str, str]:
    """Papers to show, by what the last model gained on them over the first."""
    pair = main_pair(compared)
    first, last = (pair["baseline"], pair["candidate"]) if pair else (compared["models"][-1]["model"],) * 2
    scores = {
        item["model"]: {row["paper_id"]: row["measures"]["checkmark_score"] for row in item["papers"]}
        for item in metrics
    }
    return choose_papers(scores[first], scores[last], count, seed)


def _require_same_engine(evaluated: Sequence[Evaluated]) -> None:
    """The engine's name is in metrics.json; its settings, such as its model, are known from the manifests."""
    settings = {
        artifact.path.name: artifact.manifest.identity.get("config", {}).get("engine") for _, artifact in evaluated
    }
    if len({json.dumps(value, sort_keys=True) for value in settings.values()}) > 1:
        raise InputError(
            "the evaluations were scored by engines with different settings: their scores cannot be compared",
            got="; ".join(f"{name}: {value}" for name, value in settings.items()),
            fix="evaluate every model with the same `engine`",
        )  # fmt: skip


def _absent(inputs: ReportInputs) -> list[str]:
    """What the page has to do without."""
    given = {
        "the corpus (paper titles, counts by split)": inputs.corpus,
        "the datasets (how they were selected)": inputs.datasets,
        "the validation of the datasets": inputs.validation,
        "the trained checkpoints (their curves)": inputs.checkpoints,
    }
    return [name for name, value in given.items() if not value]


def page_environment() -> Environment:
    """Renders the pages: escapes everything, knows no undefined names."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # reviews are other people's text: shown, never run
        # Jinja prints nothing for a name it does not know: a renamed number would be missing without a word.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Jinja drops a template's last newline otherwise.
        keep_trailing_newline=True,
    )
    environment.globals |= {"key_marker": key_marker, "series_class": series_class, "break": Markup("<wbr>")}
    environment.filters["thousands"] = _thousands
    environment.filters["count"] = lambda number, noun: f"{_thousands(number)} {noun}{'' if number == 1 else 's'}"
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    environment.filters |= {"clock": clock, "figure": figure, "bounds": bounds, "with_interval": with_interval}
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    return environment


def _thousands(number: int) -> str:
    return f"{number:,}".replace(",", "\u202f")


Row = Mapping[str, Any]


def to_markdown(title: str, facts: Sequence[str], modalities: Sequence[Row]) -> str:
    """The page's numbers without its charts and examples; `modalities` are those of the page."""
    parts = [f"# {_plain(title)}", *([_plain(" · ".join(facts))] if facts else [])]
    for part in modalities:
        parts += _modality(part, named=len(modalities) > 1)
    return "\n\n".join(parts) + "\n"


def _modality(part: Row, named: bool) -> Iterable[str]:
    story, models = part["story"], [item["model"] for item in part["compared"]["models"]]
    if named:
        yield f"## {_plain(part['compared']['modality'])}"
    yield f"**{_plain(story.helped)}**"
    yield f"{_plain(story.how_much)} {_plain(story.how_sure)}"
    if story.harms:
        yield f"Worse: {_plain('; '.join(story.harms))}."
    measures = [[row["measure"].label, *map(_cell, row["cells"])] for row in part["measures"]]
    yield _table(["Measure", *models], measures)
    items = [
        [row["name"], *(f"{share:.0%}" for _, share in row["shares"]), row["change_text"]] for row in part["items"]
    ]
    if items:
        yield _table(["Item, share of yes", *(label for label, _ in part["items"][0]["shares"]), "Change"], items)
    yield "What to doubt:\n\n" + "\n".join(f"- {_plain(doubt)}" for doubt in story.doubts)


def _cell(cell: Row | None) -> str:
    if not cell:
        return "–"
    return f"{cell['value']} ({cell['interval']})" if cell.get("interval") else str(cell["value"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: other people's words may hold its signs, or HTML."""
    # Words are joined by single spaces, as a line break would end the row of a table.
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
