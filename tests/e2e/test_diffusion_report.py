"""The report of masked-diffusion models: its verdict follows the interval, hostile text is shown, browsers open it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_checks import opens_cleanly
from training_artifacts import make_task

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.config import validate
from prefmill.core.errors import PipelineError
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl
from stages.report import STAGE, ReportConfig

HOSTILE = "<script>alert(1)</script>{{ 7*7 }}<img src='http://127.0.0.1:9/x.png'>"


def likelihood(model: str, pair: int, side: str, bound: float) -> dict[str, Any]:
    return {
        "model": model, "kind": "likelihood", "pair_id": f"p{pair}", "side": side, "num_tokens": 4, "bound": bound,
        "standard_error": 0.1, "chain": None,
    }  # fmt: skip


def answer(model: str, prompt: int, wanted: bool) -> dict[str, Any]:
    return {
        "model": model,
        "kind": "generation",
        "prompt": f"q{prompt}",
        "text": f"{model} {HOSTILE}",
        "wanted": wanted,
    }


def evaluation(folder: Path, after: float) -> Artifact:
    """As mdlm_evaluate writes it: of 40 pairs half are right before, and `after` of them afterwards."""
    folder.mkdir(parents=True)
    shares = {"before": 0.5, "after": after}
    rows = []
    for model, share in shares.items():
        for pair in range(40):
            right = (pair % 20) < 20 * share
            rows += [
                likelihood(model, pair, "chosen", -2.0),
                likelihood(model, pair, "rejected", -3.0 if right else -1.0),
            ]
            rows.append(answer(model, pair, right))
    write_jsonl(folder / "rows.jsonl", rows)
    models = {model: {"preference_accuracy": share, "wanted_share": share} for model, share in shares.items()}
    (folder / "metrics.json").write_text(json.dumps({"models": models}))
    return publish(folder, "diffusion_evaluation", Provenance("mdlm_evaluate", "all", "f", {}, {}, "0", {}), {})


def report(folder: Path, **inputs: Artifact) -> tuple[str, dict[str, Any]]:
    task = make_task("report", folder, **inputs)
    STAGE.run(validate(ReportConfig, {"num_resamples": 2000}), task)
    return (task.output / "report.html").read_text(), json.loads((task.output / "comparison.json").read_text())


@pytest.mark.parametrize(
    ("after", "verdict", "word"), [(0.9, "helped", "rose"), (0.1, "hurt", "fell"), (0.55, "unclear", "did not")]
)
def test_the_verdict_is_that_of_the_interval(tmp_path: Path, after: float, verdict: str, word: str) -> None:
    html, comparison = report(tmp_path / "report", diffusion=evaluation(tmp_path / "evaluation", after))
    assert f'class="verdict {verdict}"' in html
    assert word in html
    change = comparison["evaluations"]["mdlm_evaluate:all"]["changes"]["preference_accuracy"]
    assert change["value"] == pytest.approx(after - 0.5, abs=1e-9)
    assert change["low"] <= change["value"] <= change["high"]


def test_two_kinds_of_evaluation_are_refused(tmp_path: Path) -> None:
    given = evaluation(tmp_path / "evaluation", 0.9)
    with pytest.raises(PipelineError, match="one kind of evaluation"):
        report(tmp_path / "both", diffusion=given, images=given)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_is_run_fetched_or_overflows(chromium: str, tmp_path: Path, width: int) -> None:
    html, _ = report(tmp_path / "report", diffusion=evaluation(tmp_path / "evaluation", 0.9))
    assert "49" not in html.split("Answers side by side")[1].split("</section>")[0]
    opens_cleanly(chromium, tmp_path, html, width)
