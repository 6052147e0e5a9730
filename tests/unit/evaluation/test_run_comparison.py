"""Runs side by side: only what differs is shown, and differences are those of the same papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.statistics import Resampling
from prefmill.report.run_comparison import RunValues, compare_runs, comparison_page
from prefmill.store.artifacts import publish
from tests.unit.evaluation.test_comparison import evaluated, scores

QUICK = Resampling(2000)


def evaluation(folder: Path, config: dict[str, Any], content: dict[str, Any]) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    origin = Provenance("evaluate", "all", "f", {"config": config}, config, "0", {})
    return publish(folder, "evaluation", origin, {"num_papers": content["num_papers"]})


@pytest.fixture
def outputs(tmp_path: Path) -> dict[str, dict[str, Artifact]]:
    """Run `zeta` is the first given, though it is sorted behind `alpha`."""
    made = {"zeta": scores(0), "alpha": scores(0.5, seed=1)}
    return {
        run: {
            "evaluate:dpo": evaluation(tmp_path / run, {"seed": 1, "engine": {"beta": beta}}, evaluated("dpo", given))
        }
        for (run, given), beta in zip(made.items(), (0.1, 0.2), strict=True)
    }


def test_keys_that_differ_and_paired_differences_to_the_first_run(outputs: dict[str, dict[str, Artifact]]) -> None:
    found = compare_runs(outputs, QUICK)
    assert found.keys == [RunValues("evaluate:dpo", "engine.beta", (0.1, 0.2))]
    assert found.metrics == []
    (score,) = [line for line in found.paired if line.measure == "checkmark_score"]
    before, after = scores(0), scores(0.5, seed=1)
    expected = np.mean([np.mean(after[paper]) - np.mean(before[paper]) for paper in before])
    assert score.value == pytest.approx(expected, abs=1e-6)
    assert score.low < score.value < score.high
    assert (score.run, score.num_papers) == ("alpha", 20)


def test_evaluations_that_cannot_be_paired_are_named(tmp_path: Path) -> None:
    made = {
        run: {"evaluate:dpo": evaluation(tmp_path / run, {}, evaluated("dpo", scores(shift), checklist=run))}
        for run, shift in (("one", 0.0), ("two", 1.0))
    }
    found = compare_runs(made, QUICK)
    assert found.paired == []
    (note,) = found.notes
    assert "differ in checklist" in note


def test_the_page_escapes_names(outputs: dict[str, dict[str, Artifact]]) -> None:
    outputs["<script>"] = outputs.pop("alpha")
    page = comparison_page(compare_runs(outputs, QUICK))
    assert "<script>" not in page
    assert "engine.beta" in page
