"""The reports that real runs of the review and mdlm pipelines end with, in a browser; for images see their pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_checks import opens_cleanly
from pipeline_runs import DEMO, SMALL, run
from test_report import text_of

from tests.documented_runs import DocumentedRun

pytestmark = pytest.mark.slow

EXPECTED = {
    "demo": ("Two scoring engines", "What to doubt", "Length-bias audit", "Margins in the last epoch", "dpo:clean"),
    "mdlm": ("Before and after", "kind", "mdlm_dpo:all", "Curves as the trainer logged them"),
}


@pytest.fixture(scope="module")
def reports(documented_mdlm: DocumentedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages, costs included, and of reviews with a second engine."""
    folder = tmp_path_factory.mktemp("runs")
    second = "evaluate.second_engine={engine: transformers, model_name_or_path: "
    any_judge = "evaluate.judge={min_answer_mass: 0, max_same_answer: 1}"
    base = folder / "checkpoints" / "demo" / "tiny_model" / "all"
    keys = [*SMALL, "report.show_cost=true", f"{second}{base}, truncate_reviews: true}}", any_judge]
    run(folder, *keys, pipeline=DEMO)
    folders = {"demo": folder, "mdlm": documented_mdlm.checkout}
    return {name: (at / "data" / name / "report" / "all" / "report.html").read_text() for name, at in folders.items()}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", EXPECTED)
def test_it_opens_without_a_complaint_or_a_request(
    chromium: str, reports: dict[str, str], tmp_path: Path, name: str, width: int
) -> None:
    opens_cleanly(chromium, tmp_path, reports[name], width)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_says_what_a_run_has_to_say(reports: dict[str, str], name: str) -> None:
    page = text_of(reports[name])
    for words in (*EXPECTED[name], "Every task was complete at its first attempt.", "no GPU was held"):
        assert words in page
    assert "is not recorded here" not in page
