"""Records that are read back: one that is torn, foreign or of another type is named, and hides no other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from prefmill.cli.main import main
from prefmill.core.errors import PipelineError
from prefmill.core.files import read_appended
from prefmill.pipeline import runs
from prefmill.pipeline.attempts import read_attempts
from prefmill.pipeline.decisions import Decisions
from prefmill.pipeline.run_record import write_plan
from prefmill.pipeline.worker import execute
from prefmill.slurm.submission import read_array, read_submission, submissions
from prefmill.sweep.study import read_claim
from tests.unit.pipeline.test_runs import finish, plan

JOB = {
    "kind": "array", "stage": "make", "chunk": 0, "indices": [0], "dependency": "", "time": 1.0, "name": "n",
    "job_id": "41",
}  # fmt: skip
SUBMISSION = {"number": 1, "run": "r", "workspace": "/w", "pipeline": {}, "source": "", "cluster": {}, "code": ""}
ARRAY = {"stage": "make", "chunk": 0, "tasks": ["all"], "resources": {}}
BAD_JOBS = {
    "foreign lines": '{"stage": "x"}', "no object": "[1]", "a number": "3", "a type": json.dumps(JOB | {"indices": 3}),
    "an index": json.dumps(JOB | {"indices": ["0"]}), "a later version's": json.dumps(JOB | {"priority": 3}),
    "an id": json.dumps(JOB | {"job_id": 41}),
}  # fmt: skip


def submitted(folder: Path) -> Path:
    place = folder / "logs/r/submissions/0001"
    place.mkdir(parents=True)
    (place / "submission.json").write_text(json.dumps(SUBMISSION))
    return place


@pytest.mark.parametrize("name", ["jobs", "intents"])
@pytest.mark.parametrize("line", BAD_JOBS.values(), ids=BAD_JOBS)
def test_a_line_that_may_tell_of_a_job_is_named_and_never_passed_over(tmp_path: Path, name: str, line: str) -> None:
    file = submitted(tmp_path) / f"{name}.jsonl"
    good = JOB if name == "jobs" else {key: value for key, value in JOB.items() if key != "job_id"}
    file.write_text(f"{json.dumps(good)}\n{line}\n")
    (one,) = submissions(tmp_path, "r")
    with pytest.raises(PipelineError, match=rf"(?s){file}:2.*squeue --me"):
        one.open_intents()
    file.write_text(json.dumps(good) + '\n{"kind": "arr\n' + json.dumps(good)[:30])  # torn lines tell of nothing
    assert [job.job_id for job in one.jobs()] == ["41"] * (name == "jobs")
    assert len(one.open_intents()) == (name == "intents")


@pytest.mark.parametrize(
    "change", [{"number": "1"}, {"workspace": 3}, {"wanted": [["make"]]}, {"later": 1}, {"run": ...}]
)
def test_a_submission_of_another_form_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    record = submitted(tmp_path) / "submission.json"
    record.write_text(json.dumps({key: value for key, value in (SUBMISSION | change).items() if value is not ...}))
    with pytest.raises(PipelineError, match=rf"(?s)damaged.*{record}.*{next(iter(change))}.*delete"):
        read_submission(record.parent)


@pytest.mark.parametrize("text", ["", "[]", '{"stage": "make"}', json.dumps(ARRAY | {"tasks": "all"})])
def test_a_record_of_an_array_of_another_form_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "make.0.json"
    path.write_text(json.dumps(ARRAY))
    assert read_array(path).tasks == ("all",)
    path.write_text(text)
    with pytest.raises(PipelineError, match=rf"(?s)damaged.*{path}.*submit again"):
        read_array(path)


@pytest.mark.parametrize("line", ["{}", "3", '["task"]', '{"outcome": 3, "task": 3}', "null"])
def test_foreign_lines_of_growing_records_are_named(tmp_path: Path, line: str) -> None:
    decided = tmp_path / "logs/r/submissions/decisions.jsonl"
    decided.parent.mkdir(parents=True)
    for path in (tmp_path / "attempts.jsonl", decided):
        path.write_text(f"{line}\n")
        with pytest.raises(PipelineError, match=rf"(?s){path}:1.*delete that line"):
            read_attempts(tmp_path) if path.parent == tmp_path else Decisions(tmp_path, "r")


def test_what_is_no_text_is_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xff\xfe\n\0\0\0\n{"step": 1}\n{"step"')
    assert read_appended(path, step=int) == [{"step": 1}]


def test_a_claim_of_another_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text('{"worker": "a"}')
    with pytest.raises(PipelineError, match=r"(?s)claim\.json.*attempts"):
        read_claim(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"tasks": [{"key": "make:all"}]}', '{"tasks": 3}', '{"tasks": [{"key": 3, "output": 3}]}']
)
def test_a_plan_of_another_form_hides_no_run(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("broken", "whole"):
        finish(plan(tmp_path, name))
    (tmp_path / "logs/broken/plan.json").write_text(text)
    assert {run.name: run.state for run in runs.list_runs(tmp_path)} == {"broken": "damaged", "whole": "complete"}
    assert main(["status", "broken", "--workspace", str(tmp_path)]) == 2
    assert "the record of run broken is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", '{"kind": "made", "schema_ver', "[1]", "\0\0\0"])
def test_a_manifest_that_cannot_be_read_is_no_finished_task(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("broken", "whole"):
        finish(plan(tmp_path, name))
    where = ["--workspace", str(tmp_path)]
    task = plan(tmp_path, "broken").tasks[0]
    manifest = task.output / "manifest.json"
    manifest.write_text(text)
    found = {run.name: run for run in runs.list_runs(tmp_path)}
    assert (found["broken"].state, found["whole"].state) == ("damaged", "complete")
    assert found["broken"].done == found["whole"].done - 1
    assert str(manifest) in found["broken"].headline
    assert main(["status", "broken", *where]) == 1
    out = capsys.readouterr().out
    assert f"{task.key}  damaged" in out
    assert f"unreadable manifest: {manifest}" in out
    assert main(["status", "whole", *where]) == 0


def test_a_manifest_that_is_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(plan(tmp_path, "r"))
    manifest = plan(tmp_path, "r").tasks[0].output / "manifest.json"
    read = Path.read_text

    def closed(path: Path, *given: Any, **more: Any) -> str:
        if path == manifest:  # the tests may run as root, whom no mode stops
            raise PermissionError(13, os.strerror(13), str(path))
        return read(path, *given, **more)

    monkeypatch.setattr(Path, "read_text", closed)
    assert runs.summarise(tmp_path, "r").state == "damaged"


ATTEMPT = {"job": {}, "node": "n", "gpus": 0, "started": 1.0, "steps_before": 0, "done_before": 0}
STATUS = {"state": "running", "time": 1.0, "host": "n", "pid": 1, "job": {}, "attempt": ATTEMPT}
PROGRESS = {"done": 5, "total": 10, "unit": "rows", "time": 2.0}
BAD_STATUS = {
    "torn": '{"state": "run', "zeros": "\0\0\0", "a list": "[1]", "a state": json.dumps(STATUS | {"state": 3}),
    "no attempt": json.dumps(STATUS | {"attempt": {}}), "null": json.dumps(STATUS | {"attempt": None}),
    "a time": json.dumps(STATUS | {"attempt": ATTEMPT | {"started": "now"}}),
}  # fmt: skip
BAD_PROGRESS = {
    "torn": '{"done": 5,', "empty": "{}", "NaN": json.dumps(PROGRESS | {"done": float("nan")}),
    "a total": json.dumps(PROGRESS | {"total": "10"}), "no total or time": '{"done": 5, "unit": "rows"}',
    "null": json.dumps(PROGRESS | {"done": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["status", "progress"])
@pytest.mark.parametrize("text", [*BAD_STATUS.values(), *BAD_PROGRESS.values()], ids=[*BAD_STATUS, *BAD_PROGRESS])
def test_a_status_or_progress_of_another_form_ends_neither_status_nor_run(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(tmp_path, "r")
    task = made.tasks[0]
    task.logs.mkdir(parents=True)
    write_plan(made)
    (task.logs / "status.json").write_text(json.dumps(STATUS))
    (task.logs / "progress.json").write_text(json.dumps(PROGRESS))
    assert main(["status", "r", "--workspace", str(tmp_path)]) == 0
    assert "interrupted  5/10 rows" in capsys.readouterr().out
    (task.logs / f"{name}.json").write_text(text)
    assert main(["status", "r", "--workspace", str(tmp_path)]) == (name == "status")
    shown = capsys.readouterr().out
    assert (f"its status cannot be read: {task.logs}/status.json" in shown) == (name == "status")
    assert f"{task.key}  {'damaged' if name == 'status' else 'interrupted'}" in shown
    execute(task)
    assert read_attempts(task.logs)[-1]["outcome"] == "complete"
