"""A key that was renamed: accepted under its former name with a note, and no reason to make anything again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import toys
from toys import MakeConfig, UseConfig, toy_plan

from prefmill.core import config as core_config
from prefmill.core.config import StrictConfig, load, renamed, runtime
from prefmill.core.errors import ConfigError
from prefmill.core.stage import Metrics, Task
from prefmill.pipeline.plan import Plan, read_pipeline
from prefmill.pipeline.state import differences, inspect
from prefmill.pipeline.worker import execute
from prefmill.slurm.cluster import ClusterFile, resources_for
from prefmill.store.artifacts import read


class RenamedMake(StrictConfig):
    count: int = renamed("rows", 3)
    fail: str = runtime("")


class RenamedUse(StrictConfig):
    factor: int = 2
    kind: str = renamed("modality", "clean")


def make(config: RenamedMake, task: Task) -> Metrics:
    return toys.make(MakeConfig(rows=config.count, fail=config.fail), task)


def use(config: RenamedUse, task: Task) -> Metrics:
    return toys.use(UseConfig(factor=config.factor, modality=config.kind), task)


def rename(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toys.STAGES, "make", replace(toys.STAGES["make"], config=RenamedMake, run=make))
    monkeypatch.setitem(toys.STAGES, "use", replace(toys.STAGES["use"], config=RenamedUse, run=use))


def freshness(plan: Plan) -> list[str]:
    return [state.freshness for state in inspect(plan).values()]


def test_what_was_made_under_the_former_name_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in toy_plan(tmp_path).tasks:
        execute(task)
    rename(monkeypatch)
    for key in ("rows", "count"):
        assert freshness(toy_plan(tmp_path, make={"set": {key: 3}}, use={})) == ["complete", "complete"]
    other = inspect(toy_plan(tmp_path, make={"set": {"count": 4}}, use={}))["make:all"]
    assert (other.freshness, other.reasons) == ("stale", ("count was 3, is 4",))


def test_what_was_interrupted_under_the_former_name_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = toy_plan(tmp_path, make={"set": {"fail": "bug"}}).tasks
    with pytest.raises(Exception, match="a bug"):
        execute(task)
    rename(monkeypatch)
    (task,) = toy_plan(tmp_path, make={}).tasks
    execute(task)
    assert read(task.output).manifest.metrics["attempt"] == "resumed"
    assert read(task.output).manifest.config == {"count": 3, "fail": ""}


def test_former_names_count_wherever_keys_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename(monkeypatch)
    folder = tmp_path / "configs" / "make"
    folder.mkdir(parents=True)
    (folder / "old.yaml").write_text("rows: 5\n")
    needs = {"numbers": "make", "same": {"stage": "use", "where": {"modality": "b"}, "match": "elementwise"}}
    stages = {"make": {"config": "old", "set": {"count": 4}}, "use": {"array": {"modality": ["a", "b"]}}}
    plan = toy_plan(tmp_path, **stages, pair={"needs": needs})
    configs = {task.key: task.config.model_dump() for task in plan.tasks}
    assert configs["make:all"]["count"] == 4  # a later layer wins, whichever name it uses
    assert [configs[f"use:{name}"]["kind"] for name in "ab"] == ["a", "b"]
    assert plan.select("pair")[0].inputs["same"] == (plan.select("use:b")[0].output,)
    path = tmp_path / "pipeline.yaml"
    path.write_text("name: toy\nstages: { make: { set: { fail: '' } } }\n")
    assert read_pipeline(path, ["make.rows=6"]).stages["make"].set["rows"] == 6


def test_the_note_is_one_line_and_both_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    core_config._tell.cache_clear()
    for _ in range(2):
        assert load(RenamedMake, {}, ["rows=7"]).count == 7
    assert capsys.readouterr().err == "note: rows is read as count; the next release refuses it\n"
    with pytest.raises(ConfigError, match="one key under two names") as error:
        load(RenamedMake, {"rows": 1}, ["count=2"])
    assert "rows and count" in str(error.value)
    assert "leave out rows" in str(error.value)


def test_a_pipelines_limit_goes_over_a_cluster_files_former_one() -> None:
    cluster = load(ClusterFile, {"resources": {"minutes": 10}, "stages": {"sft": {"max_running": 3}}})
    given = resources_for(cluster, "sft", {"time_limit_minutes": 20})
    assert (given.time_limit_minutes, given.max_concurrent) == (20, 3)


def test_what_differs_is_told_by_its_own_key_and_not_by_the_whole_it_stands_in() -> None:
    def made(path: str, kind: str) -> dict[str, object]:
        return {"config": {"sources": [{"path": path * 64, "format": "csv"}, {"path": "a" * 64, "format": kind}]}}

    filled = differences({"columns": {}, "x": {}}, {"columns": {"title": "Paper"}})
    assert filled == ["columns.title was '(absent)', is 'Paper'", "x was {}, is '(absent)'"]
    assert differences(made("a", "csv"), made("b", "jsonl")) == [
        "sources[0].path names another file, or its content is new", "sources[1].format was 'csv', is 'jsonl'",
    ]  # fmt: skip
