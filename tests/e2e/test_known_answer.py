"""The demo's known answer: reviews get better from base to SFT to DPO, and not when the preferences are shuffled.

What is expected was written down before the runs: with true labels both steps are improvements whose 95 % interval
(bootstrap over held-out papers) lies above zero, by the checklist and by the generator's own quality factors; with
labels shuffled by a coin DPO's change of the checklist score stays within `SHUFFLED_WITHIN` of its 24 points (training
on noise can cost a little, a quarter of what SFT gains at most, but must not help), and below that of true labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import comparison, ran, run

SHUFFLED_WITHIN = (-1.5, 0.5)
MEASURES = ("checkmark_score", "num_factors")


def overrides(seed: int) -> list[str]:
    """Everything that is drawn, drawn anew."""
    return [
        f"ingest_reviews.sources=[{{format: generated, num_papers: 800, seed: {seed}}}]",
        *(f"{stage}.seed={seed}" for stage in ("tiny_model", "sft", "dpo", "evaluate")),
    ]


def step(compared: dict[str, Any], baseline: str, candidate: str) -> dict[str, Any]:
    """The differences from one model to another."""
    (found,) = [p for p in compared["pairs"] if (p["baseline"], p["candidate"]) == (baseline, candidate)]
    return dict(found["measures"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reviews_improve_from_base_to_sft_to_dpo_and_only_with_true_labels(seed: int, tmp_path: Path) -> None:
    printed = run(tmp_path, *overrides(seed), threads=2)
    true = comparison(tmp_path)
    for baseline, candidate in (("base", "sft"), ("sft", "dpo")):
        for measure in MEASURES:
            difference = step(true, baseline, candidate)[measure]
            assert difference["low"] > 0, f"{baseline} -> {candidate}, {measure}: {difference}"
    assert "[clean] Yes: on held-out papers, reviews by dpo fulfil more of the checklist than base" in printed
    page = next(tmp_path.glob("data/demo/report/all/report.html")).read_text()
    gain = step(true, "base", "dpo")["checkmark_score"]
    assert f"+{gain['value']:.2f}" in page
    assert f"+{gain['low']:.2f}" in page

    control = run(tmp_path, *overrides(seed), "dpo.shuffle_labels=true", threads=2)
    assert ran(control) == {"dpo:clean", "evaluate:dpo-clean", "report:all"}
    shuffled = step(comparison(tmp_path), "sft", "dpo")["checkmark_score"]
    assert SHUFFLED_WITHIN[0] < shuffled["value"] < SHUFFLED_WITHIN[1]
    assert shuffled["value"] < step(true, "sft", "dpo")["checkmark_score"]["value"]
