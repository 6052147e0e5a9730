"""The report: one self-contained page, and all its numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefmill.artifacts import Artifact
from prefmill.errors import InputError
from prefmill.evaluation import background, sections
from prefmill.evaluation.bootstrap import Resampling
from prefmill.evaluation.charts import key_marker, series_class
from prefmill.evaluation.comparison import compare, model_order
from prefmill.evaluation.examples import Example, choose_papers, read_examples
from prefmill.evaluation.graph import lineage_graph
from prefmill.evaluation.lineage import everything_behind
from prefmill.evaluation.metrics import MEASURES
from prefmill.evaluation.record import METRICS
from prefmill.evaluation.story import Compared, Story, main_pair, tell

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

    def all(self) -> list[Artifact]:
        """Every artifact given."""
        given = [self.corpus, self.datasets, self.validation, *self.checkpoints, *self.evaluations]
        return [item for item in given if item is not None]


@dataclass(frozen=True)
class Report:
    """The finished page, the numbers behind it, its first sentences, and every artifact it leads back to."""

    html: str
    comparison: dict[str, Any]
    stories: tuple[Story, ...]
    artifacts: Sequence[Artifact]


def build_report(inputs: ReportInputs, title: str, resampling: Resampling, num_examples: int) -> Report:
    """Compare the evaluations and render the page; the same inputs give the same bytes.

    Raises InputError where evaluations cannot be compared.
    """
    evaluated = [(json.loads(item.file(METRICS).read_text()), item) for item in inputs.evaluations]
    _require_same_engine(evaluated)
    comparison = compare([metrics for metrics, _ in evaluated], resampling)
    parts = [
        _modality(compared, [item for item in evaluated if item[0]["modality"] == compared["modality"]], inputs,
                  resampling, num_examples)
        for compared in comparison["modalities"]
    ]  # fmt: skip
    artifacts, missing = everything_behind(inputs.all())
    lineage = background.lineage_section(artifacts, missing)
    page = _environment().get_template("report.html.jinja")
    html = page.render(
        title=title,
        resampling=resampling,
        measures=(*MEASURES, *sections.EXTRA_MEASURES),
        modalities=parts,
        training=background.training_section(inputs.checkpoints),
        data=background.data_section(inputs.corpus, inputs.datasets),
        validation=background.validation_section(inputs.validation),
        lineage=lineage,
        graph=lineage_graph(lineage["levels"], lineage["edges"]),
        absent=_absent(inputs),
    )
    return Report(html, comparison, tuple(part["story"] for part in parts), artifacts)


def _modality(
    compared: Compared,
    evaluated: Sequence[Evaluated],
    inputs: ReportInputs,
    resampling: Resampling,
    num_examples: int,
) -> dict[str, Any]:
    """Everything the page shows of one modality."""
    ordered = sorted(evaluated, key=lambda item: model_order(item[0]["model"]))
    metrics = [item[0] for item in ordered]
    questions = {item["id"]: item["question"] for item in metrics[0]["items"]}
    return {
        "compared": compared,
        "story": tell(compared, metrics, resampling.confidence),
        "score_chart": sections.score_chart(compared),
        "difference_chart": sections.difference_chart(compared),
        "measures": sections.measure_table(compared),
        "pairs": sections.pair_table(compared),
        "items": sections.item_rows(compared, questions, resampling.confidence),
        "factors": sections.factor_rows(compared, resampling.confidence),
        "length_chart": sections.length_chart(metrics),
        "lengths": sections.length_rows(compared),
        "examples": _examples(compared, ordered, inputs.corpus, num_examples, resampling.seed),
    }


def _examples(
    compared: Compared, evaluated: Sequence[Evaluated], corpus: Artifact | None, count: int, seed: int
) -> list[Example]:
    pair = main_pair(compared)
    first, last = (pair["baseline"], pair["candidate"]) if pair else (compared["models"][-1]["model"],) * 2
    scores = {
        metrics["model"]: {row["paper_id"]: row["measures"]["checkmark_score"] for row in metrics["papers"]}
        for metrics, _ in evaluated
    }
    return read_examples(evaluated, choose_papers(scores[first], scores[last], count, seed), corpus)


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


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # reviews are other people's text: shown, never run
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"key_marker": key_marker, "series_class": series_class, "break": Markup("<wbr>")}
    environment.filters["thousands"] = _thousands
    environment.filters["count"] = lambda number, noun: f"{_thousands(number)} {noun}{'' if number == 1 else 's'}"
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    return environment


def _thousands(number: int) -> str:
    return f"{number:,}".replace(",", "\u202f")
