"""A run on this machine says which failure keeps a task from being done, however far upstream it was."""

from __future__ import annotations

from pathlib import Path

from toys import toy_plan

from prefmill.pipeline.local import run_plan


def test_a_task_left_out_names_the_failure_and_not_the_others_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    plan = toy_plan(tmp_path, make={"set": {"fail": "bug"}}, use={}, pair={})
    assert run_plan(plan, say=said.append) != 0
    assert [line for line in said if line.startswith("- ")] == [
        "- use:all left out: make:all failed",
        "- pair:all left out: make:all failed",
    ]
