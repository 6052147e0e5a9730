"""The stage contract: what a stage reads, what it writes, its configuration and its `run`."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Generic, Literal

from prefmill.core.artifact import Artifact
from prefmill.core.config import ConfigT
from prefmill.core.errors import PipelineError, nearest
from prefmill.core.files import read_record, write_record
from prefmill.core.graceful_stop import STOP, Stopped
from prefmill.core.places import PROGRESS, STAGES, STARTED, WORK, stages_folder

Metrics = dict[str, Any]
ArrayValue = str | int | float
Match = Literal["all", "elementwise"]
PROGRESS_INTERVAL_SECONDS = 1.0  # a write is synced to disk, which is too dear for every row


@dataclass(frozen=True)
class Reads:
    """An input: the kind of artifact, and the stage that makes it unless the pipeline names another.

    `match="elementwise"` takes the tasks of that stage that agree on every array key both have; `all` takes all.
    An input that stands `instead_of` keys of the configuration is given, or one of them is: never both, never none.
    One that is `asked_by` KEY=VALUE is given with that and with nothing else; without it nothing reads its `keys`.
    """

    kind: str
    stage: str | None = None
    match: Match = "all"
    optional: bool = False
    instead_of: tuple[str, ...] = ()
    asked_by: str | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of the rows."""

    index: int
    count: int

    def holds(self, key: str) -> bool:
        """Whether the row or group named `key` belongs here; stable across runs, machines and row order."""
        import hashlib

        # Not Python's hash() of a text, which is another in every process.
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % self.count == self.index


@dataclass(frozen=True)
class Task:
    """One element of a stage's array, as its `run` sees it."""

    run: str
    stage: str
    name: str
    values: Mapping[str, ArrayValue]
    sizes: Mapping[str, int]
    inputs: Mapping[str, tuple[Artifact, ...]]
    output: Path
    logs: Path
    _last_progress: list[float] = field(default_factory=lambda: [0.0], repr=False, compare=False)

    @property
    def key(self) -> str:
        """STAGE:TASK."""
        return f"{self.stage}:{self.name}"

    def input(self, name: str) -> Artifact:
        """The one artifact given as input `name`."""
        (artifact,) = self.inputs[name]
        return artifact

    def optional_input(self, name: str) -> Artifact | None:
        """The one artifact given as input `name`, or None."""
        artifacts = self.inputs.get(name, ())
        return artifacts[0] if artifacts else None

    @property
    def work(self) -> Path:
        """Scratch below the output: kept when the task is interrupted, removed when it is done."""
        folder = self.output / WORK
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def began_on(self) -> date:
        """The day (UTC) on which the first attempt at this content began: the same in whatever attempt ends it."""
        record = read_record(self.work / STARTED)
        # Chat templates may write the day: resumed past midnight, a training must see the first one.
        return date.fromisoformat(record["date"]) if "date" in record else datetime.now(UTC).date()

    @property
    def shard(self) -> Shard:
        """This task's share of the rows, by the array key `shard`; everything where there is none."""
        return Shard(int(self.values.get("shard", 0)), self.sizes.get("shard", 1))

    def progress(self, done: int, total: int | None, unit: str) -> None:
        """Publish how far the task is for `prefmill status`; cheap enough to call for every row."""
        now = time.monotonic()
        if done != total and now - self._last_progress[0] < PROGRESS_INTERVAL_SECONDS:
            return
        self._last_progress[0] = now
        record = {"done": done, "total": total, "unit": unit, "time": time.time()}
        write_record(self.logs / PROGRESS, record)

    def stop_asked(self) -> bool:
        """Whether this attempt was asked to keep what it has made and to stop (core.graceful_stop)."""
        return (self.logs / STOP).is_file()

    def advance(self, done: int, total: int | None, unit: str) -> None:
        """`progress` of work that is kept as far as it is done; raises Stopped where a stop was asked for."""
        self.progress(done, total, unit)
        # When all is done there is nothing left to stop.
        if done != total and self.stop_asked():
            raise Stopped(f"kept {done} of {total} {unit} and stopped")


@dataclass(frozen=True)
class Stage(Generic[ConfigT]):
    """A step of a pipeline. Its `run` writes payload files below `task.output` and returns metrics.

    `root` is where outputs live (`data` or `checkpoints`), `writes` the kind of artifact. Raise `version`
    when the same configuration would make different content. `preload` names slow imports, done before
    `run`, and once for all tasks of a local run. `result` is the payload file a user opens; a finished run
    prints where it is, with the lines of the metric `conclusion` where the stage returns one. A stage that
    `trains` runs once per GPU under torchrun, and saves and stops when asked to (prefmill.core.graceful_stop). The
    output of one that `names_run` has the run's name in it, so that it is never taken from another run. `metrics` are
    those that a sweep may choose by; None where they are not known before a run.
    """

    name: str
    config: type[ConfigT]
    run: Callable[[ConfigT, Task], Metrics]
    root: Literal["data", "checkpoints"]
    writes: str
    reads: Mapping[str, Reads] = field(default_factory=dict)
    version: int = 1
    preload: tuple[str, ...] = ()
    result: str | None = None
    trains: bool = False
    names_run: bool = False
    metrics: tuple[str, ...] | None = None
    on: Literal["text", "images", "both"] = "text"

    @property
    def summary(self) -> str:
        """The first line of the stage's module documentation."""
        module = importlib.import_module(self.run.__module__)
        return (module.__doc__ or "").strip().splitlines()[0]


def stage_names() -> list[str]:
    """Every stage's name, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules([str(stages_folder())]))


def load_stage(name: str) -> Stage[Any]:
    """The stage called `name`; raises PipelineError listing the stages there are."""
    names = stage_names()
    if name not in names:
        raise PipelineError(
            f"no stage '{name}'{nearest(name, names)}", expected=", ".join(names), fix="correct the stage's name"
        )
    stage = importlib.import_module(f"{STAGES}.{name}").STAGE
    assert isinstance(stage, Stage), f"stages/{name}.py must define STAGE"
    assert stage.name == name, f"stages/{name}.py defines a STAGE named {stage.name}"
    return stage


def describe_stages(markdown: bool = False) -> str:
    """Every stage with its purpose, what it reads and what it writes, each after those it usually reads from."""
    stages = {name: load_stage(name) for name in stage_names()}
    graph = {
        name: sorted({reads.stage for reads in stage.reads.values() if reads.stage in stages} - {name})
        for name, stage in stages.items()
    }
    ordered = [stages[str(name)] for name in TopologicalSorter(graph).static_order()]
    parts = {title: [stage for stage in ordered if stage.on == on] for on, title in _SUBJECTS.items()}
    return "\n\n".join((_table if markdown else _list)(title, part) for title, part in parts.items())


_SUBJECTS = {"text": "Text", "images": "Images", "both": "Text and images"}


def _table(title: str, stages: Sequence[Stage[Any]]) -> str:
    rows = [
        f"| [{stage.name}](docs/stages/{stage.name}.md) | {stage.summary} | {_inputs(stage)} | `{stage.writes}` |"
        for stage in stages
    ]
    return "\n".join([f"| {title.lower()} | what it does | reads | writes |", "|---|---|---|---|", *rows])


def _list(title: str, stages: Sequence[Stage[Any]]) -> str:
    width = 20
    lines = [
        f"{stage.name:<{width}} {stage.summary}\n{'':<{width}} reads {_inputs(stage)}; writes {stage.writes}"
        for stage in stages
    ]
    return "\n".join([f"{title}:", *lines])


def _inputs(stage: Stage[Any]) -> str:
    kinds = dict.fromkeys(reads.kind for reads in stage.reads.values() if not reads.optional)
    optional = dict.fromkeys(reads.kind for reads in stage.reads.values() if reads.optional and reads.kind not in kinds)
    return ", ".join([*kinds, *(f"({kind})" for kind in optional)]) or "files"
