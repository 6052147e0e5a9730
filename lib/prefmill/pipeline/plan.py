"""From a pipeline file to a plan: every stage's tasks with their configurations, inputs and folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from prefmill.core.config import (
    COMMAND_LINE,
    ConfigT,
    ExternalPath,
    StrictConfig,
    lay_over,
    load,
    merge,
    modern,
    read_yaml,
    split_override,
    validate,
)
from prefmill.core.errors import ConfigError, PipelineError, nearest, select
from prefmill.core.places import MANIFEST, NO_RUNS, STAGES, default_workspace, expand_home
from prefmill.core.stage import ArrayValue, Match, Reads, Stage, load_stage, stage_names
from prefmill.pipeline.overrides import config_path, of_stages_and_pipeline, with_stage_keys
from prefmill.pipeline.stage_entry import (
    SAFE_NAME,
    SINGLE_TASK,
    ElementEntry,
    Need,
    StageEntry,
    elements,
    refuse_set_beside_array,
    with_settings,
)


class PipelineFile(StrictConfig):
    """A pipeline: its stages by name, the run its outputs belong to, and the folder they are kept under.

    With `share` a task is taken from another run of the workspace that has finished the same one.
    """

    name: str
    run: str | None = None
    workspace: ExternalPath | None = None
    share: bool = True
    stages: dict[str, StageEntry] = Field(min_length=1)

    _overridden: frozenset[str] = PrivateAttr(frozenset())  # STAGE.KEY of the command line, to name it in errors

    @field_validator("name", "run", mode="before")
    @classmethod
    def _may_be_a_number(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value  # `run=1`, which YAML reads as one

    @field_validator("name", "run")
    @classmethod
    def _is_a_folder_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not SAFE_NAME.fullmatch(value):
            raise ValueError("as it becomes a folder: letters a to z, digits, and after the first '_', '-' and '.'")
        if value in NO_RUNS:
            raise ValueError("a folder beside those of runs has this name: give another name")
        return value


@dataclass(frozen=True)
class PlannedTask:
    """One element of a stage's array, with everything needed to run it; `inputs` are artifact folders."""

    run: str
    stage: Stage[Any]
    name: str
    values: Mapping[str, ArrayValue]
    sizes: Mapping[str, int]
    config: StrictConfig
    inputs: Mapping[str, tuple[Path, ...]]
    output: Path
    logs: Path
    processes: int | None = None

    @cached_property
    def key(self) -> str:
        """`stage:task`, the name users give."""
        return f"{self.stage.name}:{self.name}"


@dataclass(frozen=True)
class Plan:
    """The tasks of a pipeline, each after those it reads from."""

    run: str
    workspace: Path
    tasks: tuple[PlannedTask, ...]
    share: bool = False

    def upstream(self, task: PlannedTask) -> list[PlannedTask]:
        """The tasks of this plan whose outputs `task` reads, in the plan's order."""
        return self._upstream[task.key]

    @cached_property
    def _upstream(self) -> dict[str, list[PlannedTask]]:
        made = {task.output: place for place, task in enumerate(self.tasks)}
        found = {}
        for task in self.tasks:
            # Places and no set of paths, whose order is another in every process.
            places = {made[path] for paths in task.inputs.values() for path in paths if path in made}
            found[task.key] = [self.tasks[place] for place in sorted(places)]
        return found

    def select(self, selector: str) -> list[PlannedTask]:
        """The tasks named by `STAGE` or `STAGE:TASK`; raises PipelineError when there are none."""
        tasks = {task.key: task for task in self.tasks}
        return [tasks[key] for key in select(selector, tasks, "in this pipeline")]


def read_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineFile:
    """The pipeline in `path`; an override `dpo.beta=0.2` sets a key of that stage, others one of the pipeline."""
    values = modern(PipelineFile, read_yaml(path))
    if "stages" not in values:
        raise ConfigError(
            "this is no pipeline", where=path, got=", ".join(values) or "an empty file", expected="name, stages",
            fix=f"name a file of configs/pipelines/; one stage's own file is for `python -m {STAGES}.STAGE FILE`",
        )  # fmt: skip
    stages = values["stages"] if isinstance(values["stages"], Mapping) else {}
    own, others = of_stages_and_pipeline(overrides, list(stages), list(PipelineFile.model_fields))
    said = {split_override(item)[0]: COMMAND_LINE for item in others}
    pipeline = validate(PipelineFile, with_stage_keys(merge(values, others, path), own), path, said)
    pipeline._overridden = frozenset(split_override(item)[0] for item in own)
    return pipeline


def make_plan(pipeline: PipelineFile, source: Path) -> Plan:
    """The plan of `pipeline`; `source` is its file: configs are looked up beside its folder, then in `configs` here.

    Raises ConfigError or PipelineError before anything runs: unknown stages and keys, inputs nobody makes, cycles.
    """
    planner = _Planner(pipeline, source)
    tasks = [task for name in planner.order() for task in planner.tasks(name)]
    return Plan(planner.run, planner.workspace, tuple(tasks), pipeline.share)


def plan_task(pipeline: PipelineFile, source: Path, stage: str, name: str) -> PlannedTask:
    """One task of `pipeline`, without planning the others; raises PipelineError when it has no such task."""
    for task in _Planner(pipeline, source).tasks(stage, only=name):
        return task
    raise PipelineError(f"no task '{stage}:{name}' in this pipeline", where=source, fix="submit the pipeline again")


def _stage_file(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if "stages" in values:
        raise ConfigError("a pipeline in place of a stage's file", where=path, fix=f"run it: prefmill run {path}")
    return values


class _Planner:
    def __init__(self, pipeline: PipelineFile, source: Path) -> None:
        self.pipeline, self.run, self.source = pipeline, pipeline.run or pipeline.name, source
        self.workspace = Path(pipeline.workspace) if pipeline.workspace else default_workspace()
        self.stages = {name: load_stage(name) for name in pipeline.stages}
        self.arrays = {name: modern(self.stages[name].config, entry.array) for name, entry in pipeline.stages.items()}
        self.elements = {name: dict(elements(name, array)) for name, array in self.arrays.items()}
        self.folders: dict[str, Path] = {}
        self.needs: dict[tuple[str, str], Need] = {}
        self.configs: dict[tuple[Any, ...], StrictConfig] = {}
        self.outputs: dict[tuple[str, tuple[str, ...]], dict[tuple[ArrayValue, ...], list[Path]]] = {}

    def order(self) -> list[str]:
        graph = {name: self._upstream_stages(name) for name in self.stages}
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise PipelineError(
                "the stages need each other in a circle", where=self.source, got=" -> ".join(error.args[1]),
                fix="remove one of these `needs`",
            ) from None  # fmt: skip

    def tasks(self, name: str, only: str | None = None) -> Iterator[PlannedTask]:
        stage, entry = self.stages[name], self.pipeline.stages[name]
        unknown = sorted({*entry.needs, *entry.inputs} - set(stage.reads))
        if unknown:
            raise ConfigError(
                f"stage {name} has no input '{unknown[0]}'{nearest(unknown[0], list(stage.reads))}",
                where=self.source, expected=", ".join(stage.reads), fix="correct `needs` or `inputs`",
            )  # fmt: skip
        if (entry.processes or 1) > 1 and not stage.trains:
            raise ConfigError(f"stage {name} runs in one process", where=self.source, fix="take out its `processes`")
        logs = self.workspace / "logs" / self.run / name
        for task, values in self.elements[name].items():
            if only not in (None, task):
                continue
            yield PlannedTask(
                run=self.run,
                stage=stage,
                name=task,
                values=values,
                sizes={key: item if isinstance(item, int) else len(item) for key, item in self.arrays[name].items()},
                config=self._config(stage, entry, values),
                inputs={key: self._inputs(name, task, values, key, reads) for key, reads in stage.reads.items()},
                output=self._folder(stage, task),
                logs=logs / task,
                processes=entry.processes,
            )

    def _config(self, stage: Stage[Any], entry: StageEntry, values: Mapping[str, ArrayValue]) -> StrictConfig:
        """The configuration of one element; elements that differ only in what is no key of it share one."""
        keys = {*stage.config.model_fields, with_settings(self.arrays[stage.name])}
        own = tuple((key, value) for key, value in values.items() if key in keys)
        if (stage.name, own) not in self.configs:
            self.configs[stage.name, own] = self._load_config(stage, entry, values)
        return self.configs[stage.name, own]

    def _load_config(self, stage: Stage[ConfigT], entry: StageEntry, values: Mapping[str, ArrayValue]) -> ConfigT:
        settings = with_settings(self.arrays[stage.name])
        mine = self.arrays[stage.name][settings][values[settings]] if settings else ElementEntry()
        name = mine.config or entry.config
        path = config_path(self.source, stage.name, name) if name else None
        given = modern(stage.config, merge(_stage_file(path), where=path)) if path else {}
        fields = stage.config.model_fields
        element = {key: value for key, value in values.items() if key in fields}
        stray = [key for key in values if key not in fields and key not in ("shard", settings)]
        if stray:
            raise ConfigError(
                f"array key '{stray[0]}' is no key of stage {stage.name}{nearest(stray[0], list(fields))}",
                where=self.source, expected=", ".join(["shard", *fields]), fix="correct the stage's `array`",
            )  # fmt: skip
        # Each layer is put under present names first, so that the later one wins whichever name it uses.
        whole, own = modern(stage.config, entry.set), modern(stage.config, mine.set)
        origins = self._origins(stage.name, entry, path)
        refuse_set_beside_array(stage.name, element, {**whole, **own}, origins)
        keys = {**lay_over(lay_over(given, whole), own), **element}
        return load(stage.config, keys, where=f"stage {stage.name}", origins=origins)

    def _origins(self, name: str, entry: StageEntry, path: Path | None) -> dict[str, str]:
        """Where each key of a stage was given: in its file, in the pipeline's, or on the command line."""
        of_file, said = dict.fromkeys(read_yaml(path), f"in {path}") if path else {}, self.pipeline._overridden
        of_set = {key: COMMAND_LINE if f"{name}.{key}" in said else f"in {self.source}" for key in entry.set}
        return {**of_file, **of_set}

    def _need(self, name: str, key: str, reads: Reads) -> Need:
        if (name, key) not in self.needs:
            given = self.pipeline.stages[name].needs.get(key)
            need = Need(stage=given) if isinstance(given, str) else given or Need(stage=reads.stage)
            self.needs[name, key] = need.model_copy(update={"match": need.match or reads.match})
        return self.needs[name, key]

    def _upstream_stages(self, name: str) -> set[str]:
        entry = self.pipeline.stages[name]
        needs = [self._need(name, key, reads) for key, reads in self.stages[name].reads.items()]
        explicit = {need.stage for need in entry.needs.values() if isinstance(need, Need) and need.stage}
        explicit |= {need for need in entry.needs.values() if isinstance(need, str)}
        unknown = sorted(stage for stage in explicit if stage not in self.stages)
        if unknown:
            hint = nearest(unknown[0], list(self.stages))
            raise PipelineError(
                f"stage {name} needs '{unknown[0]}', which is not in this pipeline{hint}",
                where=self.source, expected=", ".join(self.stages), fix="add that stage or correct `needs`",
            )  # fmt: skip
        names = {stage for need in needs for stage in [need.stage, *need.stages.values()] if stage}
        # Inputs of a stage that is not in this pipeline are looked for on disk.
        return names & set(self.stages)

    def _inputs(
        self, name: str, task: str, values: Mapping[str, ArrayValue], key: str, reads: Reads
    ) -> tuple[Path, ...]:
        given = self.pipeline.stages[name].inputs.get(key)
        if given is not None:
            paths = [given] if isinstance(given, str) else given
            return tuple(expand_home(path).absolute() for path in paths)
        need = self._need(name, key, reads)
        producer = need.stages.get(str(values.get(need.by))) if need.by else need.stage
        if producer in self.stages:
            found = self._planned(producer, values, need)
        else:
            found = self._on_disk(producer, task, need.match) if producer in stage_names() else []
        # An input picked by `where` is required, also where the stage could do without one.
        if not found and (need.where or not reads.optional):
            raise PipelineError(
                f"nothing makes input '{key}' ({reads.kind}) of {name}:{task}", where=self.source,
                expected=f"stage {reads.stage} in the pipeline, or finished in run {self.run}",
                fix=f"add the stage, or give the artifact's folder as inputs.{key}=PATH",
            )  # fmt: skip
        return tuple(found)

    def _planned(self, producer: str, values: Mapping[str, ArrayValue], need: Need) -> list[Path]:
        array = self.arrays[producer]
        where = modern(self.stages[producer].config, need.where) if need.where else {}
        for key in where.keys() - array:
            raise PipelineError(f"stage {producer} has no array key '{key}'", where=self.source, fix="correct `where`")
        values = where if need.match == "all" else {**values, **where}
        keys = tuple(key for key in array if key in values)
        if (producer, keys) not in self.outputs:  # a plan of thousands of tasks asks thousands of times
            by_values: dict[tuple[ArrayValue, ...], list[Path]] = {}
            for task, theirs in self.elements[producer].items():
                folder = self._folder(self.stages[producer], task)
                by_values.setdefault(tuple(theirs[key] for key in keys), []).append(folder)
            self.outputs[producer, keys] = by_values
        return self.outputs[producer, keys].get(tuple(values[key] for key in keys), [])

    def _on_disk(self, producer: str | None, task: str, match: Match | None) -> list[Path]:
        assert producer is not None
        folder = self._folder(load_stage(producer), SINGLE_TASK).parent
        # A dot in front marks output that is being remade.
        names = [task, SINGLE_TASK] if match == "elementwise" else sorted(p.name for p in folder.glob("[!.]*"))
        # The manifest is written last, so a folder that has one is complete.
        finished = [folder / name for name in names if (folder / name / MANIFEST).is_file()]
        return finished[:1] if match == "elementwise" else finished

    def _folder(self, stage: Stage[Any], task: str) -> Path:
        if stage.name not in self.folders:
            self.folders[stage.name] = self.workspace / stage.root / self.run / stage.name
        return self.folders[stage.name] / task
