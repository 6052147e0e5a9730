"""Runs side by side: what is the same is shared, what is replaced stays until the new is there, what is left goes."""

from __future__ import annotations

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toys import RUNS

from prefmill.cli.main import main
from prefmill.core.errors import PipelineError
from prefmill.core.places import SHARED_FROM
from prefmill.pipeline import runs, sharing
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask, make_plan
from prefmill.pipeline.run_record import closed_runs, point_latest, run_names, write_plan
from prefmill.pipeline.sharing import share, share_finished
from prefmill.pipeline.state import inspect
from prefmill.pipeline.task_status import read_status
from prefmill.pipeline.worker import execute
from prefmill.slurm.submission import read_submission
from prefmill.store.artifacts import read, read_manifest


def plan(workspace: Path, run: str, **stages: object) -> Plan:
    values = {"name": "toy", "run": run, "workspace": str(workspace), "stages": stages or {"make": {}, "use": {}}}
    return make_plan(PipelineFile.model_validate(values), workspace / "configs" / "pipelines" / "toy.yaml")


def finish(made: Plan) -> Plan:
    write_plan(made)
    for task in made.tasks:
        execute(task)
    return made


def digests(made: Plan) -> list[str]:
    return [read(task.output).manifest.content_digest for task in made.tasks]


def test_a_run_with_another_key_takes_what_is_the_same_from_one_that_has_it(tmp_path: Path) -> None:
    first = finish(plan(tmp_path, "first"))
    second = plan(tmp_path, "second", make={}, use={"set": {"factor": 3}})
    RUNS.clear()
    said: list[str] = []
    share_finished(second, (), said.append)
    assert said == ["make:all taken from run first: the same configuration and inputs"]
    finish(second)
    assert RUNS == ["use:all"]
    assert digests(second)[0] == digests(first)[0]
    assert digests(second)[1] != digests(first)[1]
    ours, theirs = second.tasks[0].output / "numbers.jsonl", first.tasks[0].output / "numbers.jsonl"
    assert ours.stat().st_ino == theirs.stat().st_ino  # one copy on the disk
    assert {state.freshness for state in inspect(second).values()} == {"complete"}


def test_a_task_taken_twice_names_the_run_that_made_it(tmp_path: Path) -> None:
    finish(plan(tmp_path, "first"))
    for run in ("second", "third"):
        share_finished(plan(tmp_path, run), (), lambda _: None)
        shutil.rmtree(tmp_path / "data" / "first", ignore_errors=True)
    assert (tmp_path / "logs/third/make/all" / SHARED_FROM).read_text() == "first\n"


def test_nothing_is_taken_that_differs_or_is_damaged(tmp_path: Path) -> None:
    first = finish(plan(tmp_path, "first"))
    assert share(plan(tmp_path, "second", make={"set": {"rows": 4}}).tasks[0]) is None
    (first.tasks[0].output / "numbers.jsonl").write_text("{}")
    assert share(plan(tmp_path, "second").tasks[0]) is None


@pytest.mark.timing
def test_two_commands_at_once_take_a_shared_task_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(plan(tmp_path, "first"))
    task = plan(tmp_path, "second").tasks[0]
    inside: list[int] = []
    take = sharing._take

    def slowly(folder: Path, taken: PlannedTask) -> None:
        inside.append(len(inside))
        time.sleep(0.3)
        take(folder, taken)

    monkeypatch.setattr(sharing, "_take", slowly)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(share, [task, task])) in (["first", "first"], ["first", None], [None, "first"])
    assert inside == [0], "only one of them took it"


def test_a_failing_rerun_leaves_the_finished_output_and_its_curves(tmp_path: Path) -> None:
    made = finish(plan(tmp_path, "r"))
    (made.tasks[0].logs / "steps.jsonl").write_text("a curve")
    before = digests(made)
    other = plan(tmp_path, "r", make={"set": {"rows": 5, "fail": "bug"}}, use={})
    with pytest.raises(ValueError, match="a bug"):
        execute(other.tasks[0])
    assert digests(made) == before
    assert read_status(made.tasks[0].logs)["state"] == "failed"
    execute(made.tasks[0])  # wanted after all
    assert read_status(made.tasks[0].logs)["state"] == "complete"
    assert (made.tasks[0].logs / "steps.jsonl").read_text() == "a curve"
    assert not list(made.tasks[0].output.parent.glob(".*"))


def test_an_interrupted_rerun_resumes_beside_the_finished_output(tmp_path: Path) -> None:
    finish(plan(tmp_path, "r"))
    with pytest.raises(ValueError, match="a bug"):
        execute(plan(tmp_path, "r", make={"set": {"rows": 5, "fail": "bug"}}).tasks[0])
    task = plan(tmp_path, "r", make={"set": {"rows": 5}}).tasks[0]
    execute(task)
    assert read(task.output).manifest.metrics == {"rows": 5, "attempt": "resumed"}


def test_a_superseded_output_is_restored_with_its_curves_and_back(tmp_path: Path) -> None:
    made = finish(plan(tmp_path, "r"))
    output, logs = made.tasks[0].output, made.tasks[0].logs
    (logs / "steps.jsonl").write_text("old")
    with pytest.raises(PipelineError, match="no superseded output of make:all"):
        runs.restore(output, logs)
    execute(plan(tmp_path, "r", make={"set": {"rows": 5}}).tasks[0])
    (logs / "steps.jsonl").write_text("new")
    for rows, curve in ((3, "old"), (5, "new"), (3, "old")):
        runs.restore(output, logs)
        assert read(output).manifest.metrics["rows"] == rows
        assert (logs / "steps.jsonl").read_text() == curve


def test_gc_finds_what_nobody_needs_and_leaves_what_resumes(tmp_path: Path) -> None:
    made = finish(plan(tmp_path, "r"))
    execute(plan(tmp_path, "r", make={"set": {"rows": 5}}).tasks[0])
    finished, unfinished = made.tasks[0].output, made.tasks[1].output.with_name("other")
    for folder in (finished, unfinished):
        (folder / "checkpoint-7").mkdir(parents=True)
        (folder / "checkpoint-7" / "weights").write_text("12345")
    (tmp_path / "data" / "cache" / "reference").mkdir(parents=True)
    found = runs.removable(tmp_path, ["r"])
    assert [(item.reason, item.path.name) for item in found] == [
        ("intermediate checkpoint", "checkpoint-7"),
        ("superseded output", "all"),
        ("superseded output", "all"),
        ("cache, computed again when needed", "reference"),
    ]
    assert found[0].size == 5
    runs.remove(found)
    assert read_manifest(finished) is not None
    assert (unfinished / "checkpoint-7").is_dir()
    assert runs.removable(tmp_path, ["r"]) == []


def test_what_may_not_be_deleted_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(plan(tmp_path, "old"))

    def refuse(_: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "adapter.bin")  # as Python tells it, without a folder

    monkeypatch.setattr(runs.shutil, "rmtree", refuse)
    with pytest.raises(PipelineError, match="cannot delete: Read-only file system") as caught:
        runs.remove(runs.remove_run(tmp_path, "old"))
    assert caught.value.details["where"] == tmp_path / "data" / "old"
    assert "workspace" not in str(caught.value.details["fix"])  # another workspace would delete nothing


def test_runs_are_listed_the_latest_first_and_removed_whole(tmp_path: Path) -> None:
    finish(plan(tmp_path, "old"))
    write_plan(plan(tmp_path, "new"))
    (tmp_path / "logs" / "latest").symlink_to("new")
    found = {item.name: item for item in runs.list_runs(tmp_path)}
    assert (found["old"].state, found["new"].state) == ("complete", "incomplete")
    assert (found["old"].done, found["old"].total, found["new"].done) == (2, 2, 0)
    assert found["old"].size > 100
    runs.remove(runs.remove_run(tmp_path, "new"))
    runs.point_latest_away(tmp_path, "new")
    assert run_names(tmp_path) == ["old"]
    assert (tmp_path / "logs" / "latest").resolve().name == "old"
    with pytest.raises(PipelineError, match=r"no such run \(did you mean 'old'"):
        runs.remove_run(tmp_path, "odl")


def test_a_shared_file_frees_nothing_until_its_last_run_goes(tmp_path: Path) -> None:
    first, second = finish(plan(tmp_path, "first")), plan(tmp_path, "second")
    alone = runs.size_of(first.tasks[0].output)
    share_finished(second, (), lambda _: None)
    assert runs.size_of(second.tasks[0].output) < alone


def test_a_copy_of_a_workspace_never_leads_to_the_original(tmp_path: Path) -> None:
    made = finish(plan(tmp_path / "original", "r"))
    (made.tasks[0].output / "checkpoint-7").mkdir()
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    found = runs.removable(tmp_path / "copy", ["r"])
    assert [item.path.relative_to(tmp_path).parts[0] for item in found] == ["copy"]


def test_a_run_that_its_owner_keeps_to_himself_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One such folder ended `prefmill runs` and `gc` of the whole workspace: "cannot write", of a file to read."""
    for run in ("mine", "theirs"):
        finish(plan(tmp_path, run))
    (tmp_path / "data" / "cache" / "x").mkdir(parents=True)
    theirs = tmp_path / "logs" / "theirs"
    # Root, who runs some of these tests, may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: theirs not in (Path(path), *Path(path).parents))
    assert run_names(tmp_path) == ["mine"]
    assert closed_runs(tmp_path) == ["theirs"]
    assert runs.removable(tmp_path, ["mine"]) == []  # the caches: they may be using them
    for command in ("runs", "gc"):
        assert main([command, "--workspace", str(tmp_path)]) == 0
        assert "not readable for you: theirs" in capsys.readouterr().err
    assert run_names(tmp_path / "nothing") == closed_runs(tmp_path / "nothing") == []


def test_a_link_that_is_another_users_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a workspace with the sticky bit, as on scratch disks, only the first user could run anything."""
    point_latest(plan(tmp_path, "first"))
    replace = os.replace

    def sticky(source: Path, target: Path) -> None:
        if Path(target).name == "latest":  # the tests may run as root, whom no bit stops
            raise PermissionError(errno.EPERM, "Operation not permitted", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", sticky)
    point_latest(plan(tmp_path, "second"))
    assert (tmp_path / "logs" / "latest").resolve().name == "first"
    assert "does not follow run second" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["first", "latest", "second"]


@pytest.mark.parametrize("text", ["", '{"run": "broken", "tasks": [\n{"key": "ma', "[1]"])
def test_a_run_whose_record_is_damaged_does_not_hide_the_others(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--workspace", str(tmp_path)]
    for name in ("broken", "whole"):
        finish(plan(tmp_path, name))
    record = tmp_path / "logs" / "broken" / "plan.json"
    record.write_text(text)
    assert {run.name: run.state for run in runs.list_runs(tmp_path)} == {"broken": "damaged", "whole": "complete"}
    assert main(["__complete", "logs", "--run", "broken", *where, ""]) == 0
    for words in (["status", "broken"], ["gc"], ["rm", "broken"], ["verify", "broken"]):
        assert main([*words, *where]) == 2
        assert f"the record of run broken is damaged\n  where:    {record}" in capsys.readouterr().err
    write_plan(plan(tmp_path, "broken"))  # as `prefmill run` does, which is the first fix
    assert main(["status", "broken", *where]) == 0
    record.write_text(text)
    record.unlink()
    assert main(["gc", *where]) == 0


@pytest.mark.parametrize("text", ["", '{"number": 1,', "null"])
def test_a_damaged_submission_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "submission.json").write_text(text)
    with pytest.raises(PipelineError, match=f"(?s)damaged.*{tmp_path}/submission.json.*delete the folder {tmp_path}"):
        read_submission(tmp_path)


def test_of_a_run_on_another_disk_the_link_alone_is_removed_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`deleted 50 GB`, of which nothing was free: the folder that the link named stayed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "work/data").mkdir(parents=True)
    (tmp_path / "work/data/far").symlink_to(elsewhere)
    finish(plan(tmp_path / "work", "far"))
    assert list(elsewhere.glob("*/*/manifest.json"))
    assert main(["rm", "far", "--yes", "--workspace", str(tmp_path / "work")]) == 0
    assert f"run: a link alone, {elsewhere} stays" in capsys.readouterr().out
    assert list(elsewhere.glob("*/*/manifest.json"))


def test_an_output_that_is_a_link_is_told_with_the_folder_to_link(tmp_path: Path) -> None:
    (task, *_) = plan(tmp_path, "r").tasks
    task.output.parent.mkdir(parents=True)
    task.output.symlink_to(tmp_path)
    with pytest.raises(PipelineError, match=rf"(?s)output is a link.*{task.output}.*link {tmp_path}/data/r, or"):
        execute(task)
