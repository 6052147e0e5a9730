"""The worker does only what is needed, resumes what was interrupted, and tells the truth about failures."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import replace
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import scan_cache_dir
from toys import RUNS, toy_plan

from prefmill.core import files
from prefmill.core.errors import PrefmillError
from prefmill.core.places import MANIFEST, STATUS
from prefmill.core.stage import Metrics, Task
from prefmill.pipeline import worker
from prefmill.pipeline.plan import Plan
from prefmill.pipeline.sharing import share, share_finished
from prefmill.pipeline.state import inspect, read_outside
from prefmill.pipeline.task_status import is_running
from prefmill.pipeline.worker import execute
from prefmill.store.artifacts import read, read_manifest


def run(plan: Plan) -> list[str]:
    RUNS.clear()
    for task in plan.tasks:
        execute(task)
    return list(RUNS)


def status(plan: Plan, index: int = 0) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((plan.tasks[index].logs / STATUS).read_text())
    return record


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    assert run(toy_plan(tmp_path)) == ["make:all", "use:all"]
    assert run(toy_plan(tmp_path)) == []
    assert {state.freshness for state in inspect(toy_plan(tmp_path)).values()} == {"complete"}


def test_a_file_that_all_elements_read_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what `prefmill submit` does: take from other runs, look at each element, note what it reads."""
    source = tmp_path / "reviews.csv"
    source.write_text("first")
    plan = toy_plan(tmp_path, make={"array": {"shard": 3}, "set": {"source": str(source)}})
    run(plan)
    source.write_text("other")
    opened, digest = list[str](), hashlib.file_digest

    def counted(stream: Any, name: str) -> Any:
        opened.append(stream.name)
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    later = time.time_ns() + 10**10  # what was written just now is read each time
    monkeypatch.setattr(files.time, "time_ns", lambda: later)
    share_finished(plan, (), print)
    assert {state.freshness for state in inspect(plan).values()} == {"stale"}
    noted = [dict(read_outside(task, str(source).__eq__)) for task in plan.tasks]
    assert noted == [{str(source): sha256(b"other").hexdigest()}] * 3
    assert opened == [str(source)]
    source.write_text("a third one")
    assert dict(read_outside(plan.tasks[0], str(source).__eq__)) == {str(source): sha256(b"a third one").hexdigest()}


def test_a_touched_key_reruns_what_depends_on_it_and_is_named(tmp_path: Path) -> None:
    run(toy_plan(tmp_path))
    plan = toy_plan(tmp_path, make={}, use={"set": {"factor": 3}})
    states = inspect(plan)
    assert states["make:all"].freshness == "complete"
    assert states["use:all"].reasons == ("factor was 2, is 3",)
    assert run(plan) == ["use:all"]
    plan = toy_plan(tmp_path, make={"set": {"rows": 4}}, use={"set": {"factor": 3}})
    states = inspect(plan)
    assert states["make:all"].reasons == ("rows was 3, is 4",)
    assert states["use:all"].freshness == "waiting"
    assert run(plan) == ["make:all", "use:all"]


def test_a_model_that_was_written_to_since_is_told(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "unet" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    plan = toy_plan(tmp_path, make={"set": {"model_name_or_path": str(tmp_path / "model")}})
    run(plan)
    assert len(inspect(plan)["make:all"].reasons) == 1
    later = (plan.tasks[0].output / MANIFEST).stat().st_mtime + 9
    os.utime(weights, (later, later))
    state = inspect(plan)["make:all"]
    assert state.freshness == "complete"
    assert state.reasons[1:] == (f"{tmp_path}/model was written to since: --force makes it again",)


def test_an_attempt_on_another_model_is_dropped_and_no_run_shares_it(tmp_path: Path) -> None:
    """Of a folder written over since a training began its checkpoints are no part; a copy of it is the same model."""
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first" * 1000)
    keys = {"model_name_or_path": str(weights.parent)}
    broken, whole = (toy_plan(tmp_path, make={"set": {**keys, "fail": fail}}) for fail in ("bug", ""))
    with pytest.raises(ValueError, match="a bug"):
        run(broken)
    weights.unlink()
    weights.write_bytes(b"first" * 1000)
    assert inspect(whole)["make:all"].reasons == ("interrupted: resumes",)
    weights.write_bytes(b"other" * 1000)
    told = f"interrupted with other settings, starts over: {weights.parent} held another model"
    assert inspect(whole)["make:all"].reasons == (told,)
    run(whole)
    manifest = read_manifest(whole.tasks[0].output)
    assert manifest is not None
    assert manifest.metrics["attempt"] == "started"
    elsewhere = replace(whole.tasks[0], run="next", output=tmp_path / "data" / "next" / "make" / "all")
    later = (whole.tasks[0].output / MANIFEST).stat().st_mtime + 9
    os.utime(weights, (later, later))
    assert share(elsewhere) is None
    os.utime(weights, (later - 99, later - 99))
    assert share(elsewhere) == "toy"


def in_hub_cache(cache: Path, commit: str, **files: str) -> None:
    """A repository's branch as the hub's library keeps it: links to content by its hash."""
    place = cache / "models--org--model"
    for name, content in files.items():
        blob, link = place / "blobs" / sha256(content.encode()).hexdigest(), place / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    (found,) = scan_cache_dir(cache).repos
    assert found.refs["main"].commit_hash == commit


def test_an_attempt_ends_where_a_branch_on_the_hub_has_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that came since it began, and another README, change nothing."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    in_hub_cache(cache, "a" * 40, **{"config.json": "{}"})
    keys = {"model_name_or_path": "org/model"}
    broken, whole = (toy_plan(tmp_path, make={"set": {**keys, "fail": fail}}) for fail in ("bug", ""))
    with pytest.raises(ValueError, match="a bug"):
        run(broken)
    in_hub_cache(cache, "a" * 40, **{"model.safetensors": "first"})
    with pytest.raises(ValueError, match="a bug"):
        run(broken)
    in_hub_cache(cache, "b" * 40, **{"config.json": "{}", "model.safetensors": "first", "README.md": "new"})
    assert inspect(whole)["make:all"].reasons == ("interrupted: resumes",)
    in_hub_cache(cache, "c" * 40, **{"config.json": "{}", "model.safetensors": "other"})
    told = "interrupted with other settings, starts over: org/model/model.safetensors held another model"
    assert inspect(whole)["make:all"].reasons == (told,)


def test_an_upstream_that_comes_out_the_same_stops_there(tmp_path: Path) -> None:
    run(toy_plan(tmp_path))
    plan = toy_plan(tmp_path)
    execute(plan.tasks[0], force=True)
    assert run(plan) == []


def test_a_runtime_key_changes_nothing(tmp_path: Path) -> None:
    run(toy_plan(tmp_path))
    assert run(toy_plan(tmp_path, make={"set": {"fail": "bug"}}, use={})) == []


def test_an_interrupted_attempt_resumes_and_another_content_starts_over(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"):
        run(toy_plan(tmp_path, make={"set": {"fail": "bug"}}))
    run(toy_plan(tmp_path, make={}))
    manifest = read_manifest(toy_plan(tmp_path).tasks[0].output)
    assert manifest is not None
    assert manifest.metrics["attempt"] == "resumed"
    with pytest.raises(ValueError, match="a bug"):
        run(toy_plan(tmp_path, make={"set": {"fail": "bug", "rows": 7}}))
    begun = [inspect(toy_plan(tmp_path, make={"set": {"rows": rows}}))["make:all"] for rows in (7, 8)]
    assert [state.reasons[-1] for state in begun] == [
        "interrupted: resumes", "interrupted with other settings, starts over: rows was 7, is 8"
    ]  # fmt: skip
    assert begun[0].reasons[:-1] == ("rows was 3, is 7",)
    run(toy_plan(tmp_path, make={"set": {"rows": 8}}))
    manifest = read_manifest(toy_plan(tmp_path).tasks[0].output)
    assert manifest is not None
    assert manifest.metrics == {"rows": 8, "attempt": "started"}


def test_a_resumed_task_keeps_the_day_it_began_on(tmp_path: Path) -> None:
    (task,) = toy_plan(tmp_path, make={"set": {"fail": "bug"}}).tasks[:1]
    seen: list[date] = []

    def stop(context: Task) -> Metrics:
        seen.append(context.began_on)
        raise ValueError("killed")

    for day in ("today", "2020-02-29"):
        if day != "today":  # as an attempt of that day left it
            marker = task.output / "work" / "started.json"
            marker.write_text(json.dumps({**json.loads(marker.read_text()), "date": day}))
        with pytest.raises(ValueError, match="killed"):
            execute(task, run=stop)
    assert seen == [datetime.now(UTC).date(), date(2020, 2, 29)]


def test_replaced_output_is_set_aside(tmp_path: Path) -> None:
    run(toy_plan(tmp_path))
    run(toy_plan(tmp_path, make={"set": {"rows": 9}}))
    kept = read(tmp_path / "data" / "toy" / ".superseded" / "make" / "all")
    assert kept.manifest.metrics["rows"] == 3


def test_a_disk_error_says_what_to_do_and_is_recorded(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, make={"set": {"fail": "disk"}})
    with pytest.raises(PrefmillError, match="No space left on device"):
        run(plan)
    assert status(plan)["state"] == "failed"
    assert "free space on that disk" in status(plan)["error"]
    assert not (plan.tasks[0].output / MANIFEST).exists()


def test_a_disk_that_takes_no_lock_or_status_is_explained_too(tmp_path: Path) -> None:
    (task,) = toy_plan(tmp_path, make={}).tasks
    task.logs.parents[1].mkdir(parents=True)
    task.logs.parent.write_text("")  # in the way, before the task has a place for its status
    with pytest.raises(PrefmillError, match="a file is where a folder should be"):
        execute(task)


def test_missing_and_damaged_inputs_stop_the_task_before_it_runs(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    with pytest.raises(PrefmillError, match="no finished artifact"):
        execute(plan.tasks[1])
    run(plan)
    (plan.tasks[0].output / "numbers.jsonl").write_text("{}")
    with pytest.raises(PrefmillError, match="damaged"):
        execute(plan.tasks[1])
    assert inspect(plan)["make:all"].freshness == "stale"
    assert run(plan) == ["make:all"]


def test_two_workers_do_not_share_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LOCK_PATIENCE_SECONDS", 0.1)
    plan = toy_plan(tmp_path)
    plan.tasks[0].logs.mkdir(parents=True)
    with (plan.tasks[0].logs / "lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert is_running(plan.tasks[0].logs)
        with pytest.raises(PrefmillError, match="already running"):
            execute(plan.tasks[0])
    assert not is_running(plan.tasks[0].logs)


def test_shards_partition_the_rows(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, make={"array": {"shard": 3}, "set": {"rows": 50}})
    run(plan)
    texts = [(task.output / "numbers.jsonl").read_text().splitlines() for task in plan.tasks]
    assert sorted(line for text in texts for line in text) == sorted(f'{{"n":{n}}}' for n in range(50))
    assert min(map(len, texts)) > 5
