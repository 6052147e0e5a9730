"""The page of `prefmill compare` in a browser: no serious finding of axe-core, and it fits a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.core.statistics import Resampling
from prefmill.report.run_comparison import compare_runs, comparison_page
from tests.e2e.browser import started
from tests.unit.evaluation.test_comparison import evaluated, scores
from tests.unit.evaluation.test_run_comparison import evaluation

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", [1280, 390])
def test_anybody_can_read_it(chromium: str, tmp_path: Path, width: int) -> None:
    made = {
        run: {"evaluate:dpo": evaluation(tmp_path / run, {"beta": beta}, evaluated("dpo", scores(beta)))}
        for run, beta in (("mine", 0.1), ("other", 0.5))
    }
    path = tmp_path / "page.html"
    path.write_text(comparison_page(compare_runs(made, Resampling(2000))))
    with started(chromium, tmp_path) as browser, browser.tab() as tab:
        tab.resize(width, 844)
        tab.open(path.as_uri())
        tab.wait("document.readyState == 'complete' && document.querySelector('h1') != null")
        assert tab.read("document.querySelectorAll('#paired tbody tr').length") > 0
        assert tab.accessibility_faults() == []
        assert tab.read("document.documentElement.scrollWidth") <= width
