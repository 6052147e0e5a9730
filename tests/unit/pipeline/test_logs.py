"""Logs are read from their end, whole lines only, and followed without losing or repeating any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefmill.core.errors import PipelineError
from prefmill.core.places import SHARED_FROM
from prefmill.slurm.logs import read_end, read_on, select_logs, show_logs


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    keys = ["sft:clean", "dpo:clean", "dpo:vision"]
    logs = tmp_path / "logs" / "r"
    logs.mkdir(parents=True)
    tasks = [{"key": key, "output": "", "logs": f"/w/logs/r/{key.replace(':', '/')}"} for key in keys]
    (logs / "plan.json").write_text(json.dumps({"run": "r", "tasks": tasks}))
    (logs / "dpo").mkdir()
    (logs / "dpo" / "clean.log").write_text("a\nb\nc\n")
    return tmp_path


def test_the_last_lines_of_every_task_of_a_stage(workspace: Path) -> None:
    said: list[str] = []
    show_logs(workspace, "r", "dpo", 2, False, said.append)
    assert said[:2] == ["dpo:clean  | b", "dpo:clean  | c"]
    assert said[2].startswith("dpo:vision: no log yet")
    said.clear()
    show_logs(workspace, "r", "dpo:clean", 1, False, said.append)
    assert said == ["c"]


def test_what_is_not_there_is_named(workspace: Path) -> None:
    with pytest.raises(PipelineError, match="did you mean 'dpo:clean'"):
        select_logs(workspace, "r", "dpo:clear")
    with pytest.raises(PipelineError, match="no such run"):
        select_logs(workspace, "other", "dpo")


def test_following_reads_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    assert read_end(path, 5) == ([], 0)
    path.write_bytes(b"one\ntw")
    lines, place = read_end(path, 5)
    assert lines == ["one"]
    with path.open("ab") as stream:
        stream.write(b"o\n 10%\r 50%\r 100%\nfour")
    lines, place = read_on(path, place)
    assert lines == ["two", " 100%"]  # of a progress bar its last state
    assert read_on(path, place) == ([], place)
    path.write_bytes(b"anew\n")  # shorter: another file of that name
    assert read_on(path, place)[0] == ["anew"]


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("".join(f"{n}\n" for n in range(400_000)))
    lines, place = read_end(path, 3)
    assert lines == ["399997", "399998", "399999"]
    assert place == path.stat().st_size


def test_a_task_that_was_taken_names_the_log_of_the_run_that_made_it(workspace: Path) -> None:
    taken = workspace / "logs" / "r" / "dpo" / "vision"
    taken.mkdir()
    (taken / SHARED_FROM).write_text("first\n")
    said: list[str] = []
    show_logs(workspace, "r", "dpo:vision", 5, False, said.append)
    assert said == [f"dpo:vision: made by run first: see {workspace}/logs/first/dpo/vision.log"]
