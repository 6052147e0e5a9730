"""A finished task in a line with its warnings, and a heartbeat where no terminal shows a bar."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefmill.cli.headlines import describe, headline
from prefmill.core.artifact import Provenance
from prefmill.core.places import PROGRESS
from prefmill.pipeline import progress_display
from prefmill.pipeline.progress_display import Bar
from prefmill.store.artifacts import publish


def finished(folder: Path, metrics: dict[str, Any], **files: Any) -> Any:
    """A task with these metrics and JSON files."""
    output, logs = folder / "output", folder / "logs"
    output.mkdir(parents=True)
    logs.mkdir()
    for name, content in {"payload": 1, **files}.items():
        (output / f"{name}.json").write_text(json.dumps(content))
    publish(output, "validation", Provenance("s", "all", "f", {}, {}, "0", {}), metrics)
    return SimpleNamespace(output=output, logs=logs)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"rows": {"dpo_clean_train": 1112, "sft_clean_train": 9}}, "1,112 dpo clean train, 9 sft clean train"),
        ({"pairs": 112, "val_accuracy": 0.9535, "layout": "group"}, "112 pairs, validation accuracy 95.3%"),
        ({"errors": 0, "warnings": 1}, "0 errors, 1 warning"),
        ({"warnings": ["told"], "verdict": {}}, ""),
        (
            {"win_rate": 0.75, "win_rate_low": 0.65, "win_rate_high": 0.78, "num_prompts": 26, "winner_drift": 0.1},
            "win rate 75% (65% to 78%), 26 prompts",
        ),
    ],
)  # fmt: skip
def test_the_headline_has_the_numbers_worth_a_glance(metrics: dict[str, Any], expected: str) -> None:
    assert headline(metrics) == expected


def test_warnings_reach_the_console_the_first_three_of_them(tmp_path: Path) -> None:
    findings = [{"severity": "warning", "where": f"d{n}", "what": "longer is chosen"} for n in range(3)]
    findings.append({"severity": "error", "where": "d9", "what": "no warning"})
    task = finished(tmp_path, {"quarantined_rows": 2}, report={"findings": findings})
    assert describe(task) == [
        "! 2 rows set aside: see quarantine.jsonl",
        "! d0: longer is chosen",
        "! d1: longer is chosen",
        "! 1 more warning",
    ]
    (task.logs / "alarms.jsonl").write_text('{"step": 5}\n')
    assert describe(task)[-1] == "! 2 more warnings"


def test_a_log_file_gets_a_line_now_and_then_in_place_of_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    bar = Bar("dpo:all", tmp_path, said.append)
    (tmp_path / PROGRESS).write_text(json.dumps({"done": 30, "total": 100, "unit": "steps", "time": 1.0}))
    for clock[0] in (1.0, 59.0, 61.0, 90.0, 125.0):
        bar.show()
    bar.close()
    assert said == [". dpo:all running for 1 min, 30/100 steps", ". dpo:all running for 2 min, 30/100 steps"]
