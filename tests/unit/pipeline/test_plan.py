"""A plan names every task, its inputs and folders, and refuses what cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import toy_plan

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.pipeline.plan import PipelineFile, PlannedTask, make_plan, read_pipeline
from prefmill.pipeline.stage_entry import elements


def task(plan_tasks: tuple[PlannedTask, ...], key: str) -> PlannedTask:
    (found,) = [item for item in plan_tasks if item.key == key]
    return found


def test_folders_follow_run_stage_task(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    assert [item.key for item in plan.tasks] == ["make:all", "use:all"]
    made, used = plan.tasks
    assert made.output == tmp_path / "data" / "toy" / "make" / "all"
    assert used.inputs == {"numbers": (made.output,)}
    assert used.logs == tmp_path / "logs" / "toy" / "use" / "all"
    assert plan.upstream(used) == [made]


def test_all_takes_every_shard_and_elementwise_its_own_modality(tmp_path: Path) -> None:
    modalities = {"array": {"modality": ["clean", "vision"]}}
    plan = toy_plan(tmp_path, make={"array": {"shard": 3}}, use=modalities, pair=modalities)
    assert [item.name for item in plan.tasks[:3]] == ["shard0", "shard1", "shard2"]
    pair = task(plan.tasks, "pair:vision")
    assert len(pair.inputs["numbers"]) == 3
    assert pair.inputs["same"] == (task(plan.tasks, "use:vision").output,)
    assert pair.config.model_dump()["modality"] == "vision"


def test_an_array_over_listed_numbers(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, make={"array": {"rows": [5, 10]}}, use={"array": {"factor": [1, 3], "modality": ["b"]}})
    assert [item.key for item in plan.tasks] == ["make:rows5", "make:rows10", "use:factor1-b", "use:factor3-b"]
    assert [item.config.model_dump()["rows"] for item in plan.tasks[:2]] == [5, 10]
    assert list(elements("s", {"rate": [0.1, 1e-5]})) == [("rate0.1", {"rate": 0.1}), ("rate1e-05", {"rate": 1e-5})]


def test_a_pipeline_anywhere_finds_what_is_laid_down_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workspace is the current folder, though the checkout is another; a file beside its folder comes first."""
    for folder, rows in (("work/configs", 1), ("work/mine", 2)):
        file = tmp_path / folder / "make" / "small.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(f"rows: {rows}\n")
    (tmp_path / "work/configs/pipelines").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    pipeline = validate(PipelineFile, {"name": "own", "stages": {"make": {"config": "small"}}})
    for source, rows in (("own.yaml", 1), ("mine/pipelines/own.yaml", 2)):
        plan = make_plan(pipeline, Path(source))
        assert plan.workspace == tmp_path / "work"
        assert plan.tasks[0].config.model_dump()["rows"] == rows


def test_need_by_array_value(tmp_path: Path) -> None:
    need = {"same": {"by": "modality", "stages": {"b": "use"}}}
    plan = toy_plan(tmp_path, make={}, use={}, pair={"array": {"modality": ["a", "b"]}, "needs": need})
    assert task(plan.tasks, "pair:a").inputs["same"] == ()
    assert task(plan.tasks, "pair:b").inputs["same"] == (task(plan.tasks, "use:all").output,)


def test_need_of_some_elements(tmp_path: Path) -> None:
    array = {"array": {"modality": ["a", "b"]}}
    pairs = {**array, "needs": {"same": {"stage": "use", "where": {"modality": "b"}}}}
    plan = toy_plan(tmp_path, make={"array": {"shard": 3}}, use=array, pair=pairs)
    for name in ("a", "b"):
        assert task(plan.tasks, f"pair:{name}").inputs["same"] == (task(plan.tasks, "use:b").output,)
    one = {"needs": {"numbers": {"stage": "make", "where": {"shard": 1}}}}
    plan = toy_plan(tmp_path, make={"array": {"shard": 3}}, use=one)
    assert task(plan.tasks, "use:all").inputs["numbers"] == (task(plan.tasks, "make:shard1").output,)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"make": {"array": {"shard": [0, 2]}}}, "counted, not listed"),
        ({"make": {"array": {"rows": [1, 1]}}}, "distinct values"),
        ({"make": {"array": {"rows": [-0.5]}}}, "rows"),
        ({"make": {}, "use": {"needs": {"numbers": {"stage": "make", "where": {"shard": 1}}}}}, "no array key 'shard'"),
        (
            {
                "make": {},
                "use": {"array": {"modality": ["a"]}},
                "pair": {"needs": {"same": {"stage": "use", "where": {"modality": "b"}}}},
            },
            "nothing makes input 'same'",
        ),
        ({"use": {}}, "nothing makes input 'numbers'"),
        ({"make": {"set": {"row": 1}}}, "did you mean 'rows'"),
        ({"make": {"array": {"colour": ["a"]}}}, "array key 'colour' is no key"),
        ({"make": {"array": {"shard": 0}}}, "needs distinct values"),
        ({"make": {"array": {"rows": ["../x"]}}}, "cannot be named"),
        ({"make": {}, "use": {"needs": {"numbrs": "make"}}}, "has no input 'numbrs'"),
        ({"make": {}, "use": {"needs": {"numbers": "mke"}}}, "not in this pipeline"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, stages: dict[str, object], expected: str) -> None:
    with pytest.raises((ConfigError, PipelineError), match=expected):
        toy_plan(tmp_path, **stages)


def test_a_circle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="circle"):
        toy_plan(tmp_path, make={}, use={"needs": {"numbers": "pair"}}, pair={})


@pytest.mark.parametrize("name", ["../up", "a b", "$(touch x)", "", "a/b", ".hidden"])
def test_a_run_name_is_a_folder_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: toy\nstages: {make: {}}\n")
    with pytest.raises(ConfigError, match="run"):
        read_pipeline(path, [f"run='{name}'"])


def test_overrides_reach_stage_and_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: toy\nstages: {make: {}}\n")
    pipeline = read_pipeline(path, ["make.rows=5", "run=other", "stages.make.array.shard=2"])
    assert (pipeline.run, pipeline.stages["make"].set, pipeline.stages["make"].array) == (
        "other",
        {"rows": 5},
        {"shard": 2},
    )
