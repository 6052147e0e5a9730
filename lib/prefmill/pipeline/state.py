"""What state each task is in, and why, judged by manifests on disk alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prefmill import __version__
from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.config import flatten, former_names, identity, modern
from prefmill.core.errors import ArtifactError, InputError
from prefmill.core.files import digest_json, known_digest, read_record
from prefmill.core.places import MANIFEST, STARTED, WANTED_AGAIN, WORK
from prefmill.core.revisions import models_changed, models_in, models_named
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.task_status import manifest_fault
from prefmill.store.artifacts import read, read_manifest, remaking
from prefmill.store.stamps import check_content

CODE_VERSION = "code_version.txt"  # in the copy of the code that a submission keeps
Inputs = Mapping[str, tuple[Artifact, ...]]
Freshness = Literal["complete", "stale", "missing", "waiting"]


@dataclass(frozen=True)
class TaskState:
    """Whether a task's output can be used as it is, and the reasons if not.

    `stale`: made from another configuration, code version of the stage, or input content; `missing`: never
    finished; `waiting`: an input is itself not complete, so nothing can be said yet.
    """

    freshness: Freshness
    reasons: tuple[str, ...] = ()
    waiting_for: tuple[str, ...] = field(default=())


def inspect(plan: Plan) -> dict[str, TaskState]:
    """Every task's state by key, upstream first."""
    states: dict[str, TaskState] = {}
    for task in plan.tasks:
        upstream = [other.key for other in plan.upstream(task) if states[other.key].freshness != "complete"]
        states[task.key] = _waiting(task, upstream) if upstream else inspect_task(task)
    return states


def inspect_task(task: PlannedTask) -> TaskState:
    """A task's state, given that its inputs are complete; raises ArtifactError when one is missing or damaged.

    What is wrong with its own output makes it stale, an unreadable manifest too.
    """
    try:
        manifest = read_manifest(task.output)
    except ArtifactError as error:
        return TaskState("stale", (_in_words(error),))
    if manifest is None:
        return TaskState("missing", _begun(task, task.output) or ("not run yet",))
    if (task.logs / WANTED_AGAIN).exists():
        return TaskState("stale", ("asked for with `prefmill rerun`",))
    wanted = task_identity(task, read_inputs(task))
    if manifest.fingerprint not in fingerprints(task, wanted):
        made = {**manifest.identity, "config": modern(type(task.config), manifest.identity["config"])}
        return TaskState("stale", (*differences(made, wanted), *_begun(task, remaking(task.output))))
    try:
        # Plans look at more files than they use: only those written to since are hashed here.
        check_content(read(task.output, task.stage.writes), only_touched=True)
    except ArtifactError as error:
        return TaskState("stale", (_in_words(error),))
    since = (f"{name} was written to since: --force makes it again" for name in written_since(task, task.output))
    made_by = f"up to date: content {manifest.content_digest[:12]}, made by {manifest.code_version}"
    return TaskState("complete", (made_by, *since))


def written_since(task: PlannedTask, folder: Path) -> Iterator[str]:
    """Models whose weights are newer than what was made of them in `folder`: a plan knows them by name alone."""
    made = (folder / MANIFEST).stat().st_mtime
    for name, _ in models_named(task.config):
        if any(path.stat().st_mtime > made for path in Path(name).rglob("*.safetensors")):
            yield name


def read_outside(task: PlannedTask, asked: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """What a task reads that its plan does not make, as far as it is `asked` for by its path: path and content.

    What is not there is left out: a path may be on the disks of compute nodes alone.
    """
    files: list[Path] = []
    identity(task.config, files.append)
    for path in files:
        if asked(str(path)) and path.exists():
            yield str(path), known_digest(path)
    for folder in (path for paths in task.inputs.values() for path in paths):
        if asked(str(folder)) and (made := read_manifest(folder)):
            yield str(folder), made.content_digest
    yield from ((name, held) for name, held in models_in(task.config).items() if asked(name))


def _begun(task: PlannedTask, folder: Path) -> tuple[str, ...]:
    """Of an attempt that did not finish: that a run resumes it, or discards it since these settings are others."""
    if not (made := read_record(folder / WORK / STARTED)):
        return ()
    wanted = task_identity(task, read_inputs(task))
    other = [f"{name} held another model" for name in models_changed(task.config, made)]
    if made["fingerprint"] not in fingerprints(task, wanted):
        # A folder from before the identity was noted has its fingerprint alone.
        other = differences(made.get("identity", wanted), wanted) or ["other settings"]
    return (f"interrupted with other settings, starts over: {'; '.join(other)}" if other else "interrupted: resumes",)


def read_inputs(task: PlannedTask) -> Inputs:
    """A task's input artifacts by name; raises ArtifactError for one that is missing, damaged or of a wrong kind."""
    return {
        name: tuple(read(path, task.stage.reads[name].kind) for path in paths) for name, paths in task.inputs.items()
    }


def task_identity(task: PlannedTask, inputs: Inputs) -> dict[str, Any]:
    """What decides a task's content: stage and its version, configuration, share of the rows, input content."""
    # The values of other array keys are in the configuration already.
    outside = {key: [value, task.sizes[key]] for key, value in task.values.items() if key == "shard"}
    return {
        "stage": task.stage.name,
        # Not the code's version: every commit would then make everything anew.
        "version": task.stage.version,
        "config": identity(task.config),
        "element": outside,
        # By content: where an upstream is made again and comes out the same, nothing after it runs.
        "inputs": {name: [item.manifest.content_digest for item in items] for name, items in inputs.items()},
    }


def fingerprints(task: PlannedTask, wanted: Mapping[str, Any]) -> tuple[str, str]:
    """What marks an output made of the identity `wanted`: under its keys' names now, and under their former ones."""
    # All keys were renamed in one step, so one set of former names is enough.
    former = former_names(type(task.config))
    before = {former.get(key, key): value for key, value in wanted["config"].items()}
    return digest_json(wanted), digest_json({**wanted, "config": before})


def provenance(task: PlannedTask, inputs: Inputs, noted: Mapping[str, str]) -> Provenance:
    """Where the artifact of `task` comes from, for its manifest.

    Raises InputError where what it reads from outside the pipeline is not what was `noted` at its submission.
    """
    for name in (name for name, held in read_outside(task, noted.__contains__) if held != noted[name]):
        raise InputError(
            "changed since this job was submitted", where=name, expected="what it held then",
            fix="`prefmill submit` again, for a job that reads it as it is now; or put the old content back and "
            f"`prefmill rerun {task.key}`",
        )  # fmt: skip
    wanted = task_identity(task, inputs)
    return Provenance(
        stage=task.stage.name,
        task=task.name,
        fingerprint=digest_json(wanted),
        identity=wanted,
        config=task.config.model_dump(mode="json"),
        code_version=code_version(),
        inputs=wanted["inputs"],
    )


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for every key in which two identities differ, in the words of the configuration."""
    before, after = dict(flatten(made)), dict(flatten(wanted))
    lines, keys = [], before.keys() | after.keys()
    for key in sorted(keys):
        old, new = before.get(key, "(absent)"), after.get(key, "(absent)")
        if {} in (old, new) and any(other.startswith(f"{key}.") for other in keys):
            continue  # an empty mapping that was filled, or emptied: the keys in it are told
        if old != new and key.startswith("inputs."):
            lines.append(f"input {key.removeprefix('inputs.')} has new content")
        elif old != new and all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in (old, new)):
            lines.append(f"{key.removeprefix('config.')} names another file, or its content is new")
        elif old != new:
            lines.append(f"{key.removeprefix('config.')} was {old!r}, is {new!r}")
    return lines


@cache
def code_version() -> str:
    """The package's version, with the commit and `dirty` where prefmill runs from a git checkout or a copy of one."""
    import subprocess

    # Asked first: the copy of a submission may lie in a checkout that has gone on since.
    root = Path(__file__).parents[3]
    if (root / CODE_VERSION).is_file():
        return (root / CODE_VERSION).read_text().strip()
    if not (root / "pyproject.toml").is_file():  # installed: git would describe the repository around it
        return __version__
    # A colleague's checkout is described too, and nothing that its configuration names is started.
    trusting = ["-c", "safe.directory=*", "-c", "core.fsmonitor=false"]
    command = ["git", *trusting, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout: the version alone is the truth
        return __version__
    return f"{__version__}+{described}"


def _waiting(task: PlannedTask, upstream: list[str]) -> TaskState:
    made = manifest_fault(task.output) == ""
    one = upstream[0] if len(upstream) == 1 else "these"
    verb = "does" if len(upstream) == 1 else "do"
    note = f" (output reused if {one} {verb} not change)" if made else ""
    return TaskState("waiting", (f"waiting for {', '.join(upstream)}{note}",), tuple(upstream))


def _in_words(error: ArtifactError) -> str:
    return f"{error.what}: {error.details['where']}"
