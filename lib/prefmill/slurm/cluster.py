"""The cluster file: what differs between sites, and what a stage's tasks are given there."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import ExternalPath, StrictConfig, load, merge, modern, renamed, validate
from prefmill.core.errors import ConfigError, nearest
from prefmill.core.stage import stage_names
from prefmill.core.variables import VariableName

SIGNAL_SECONDS = 120  # a batch script submitted by hand asks for the same: sbatch/*.sbatch
# Not sbatch's ALL: what the shell holds, secrets among it, would stay in Slurm's spool.
_BASIC_EXPORTS = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TZ", "USER")
_OPTION = re.compile(r"[a-z][a-z-]*")
# What prefmill decides itself; an option of the site must not undo it.
_OWN_OPTIONS = {
    "array", "dependency", "export", "export-file", "get-user-env", "kill-on-invalid-dep", "output", "error",
    "open-mode", "requeue", "no-requeue", "signal", "ntasks", "ntasks-per-node", "job-name", "wrap", "parsable",
    "chdir", "wait", "test-only", "quiet", "clusters",
}  # fmt: skip
# Settings of libraries that tasks use, and of the network: a model is looked for where HF_HOME says.
_LIBRARIES = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|WANDB|NCCL|VLLM|TORCH|PYTORCH|TRITON|OPENAI)_\w+|(https?|all|no)_proxy", re.I
)
# Those that a key says: of both Slurm takes one, and what is checked and estimated goes by the key.
_KEY_OF_OPTION = {
    "partition": "partition", "nodes": "nodes", "cpus-per-task": "cpus", "time": "time_limit_minutes",
    "gpus": "gpus", "gpus-per-node": "gpus and gpu_type", "gpus-per-task": "gpus and gpu_type",
}  # fmt: skip
_MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")


class Resources(StrictConfig):
    """What one task gets; counts of GPUs, CPUs and memory are for each of its nodes.

    `partition` may be a list such as `a,b`, of which Slurm takes any. `gpu_type` is the site's name of it, as `h100`.
    `processes` is how many of a training stage's processes run on a node: by default one for every GPU it has.
    """

    partition: str | None = None
    nodes: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    gpu_type: str | None = Field(None, pattern=r"^[\w.-]+$")
    cpus: int = Field(1, ge=1)
    memory_gb: float | None = Field(None, gt=0)
    time_limit_minutes: int = renamed("minutes", 60, ge=1)
    processes: int | None = Field(None, ge=1)
    max_concurrent: int | None = renamed("max_running", None, ge=1)
    python: str | None = None
    setup: list[str] = []
    options: dict[str, str | int | bool] = {}

    def ranks(self, processes: int | None) -> int:
        """Ranks that train together; `processes` are the stage's own, of a node, where the cluster says nothing."""
        return self.nodes * (self.processes or processes or max(self.gpus, 1))

    @field_validator("options")
    @classmethod
    def _leave_ours_alone(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        wrong = [name for name in options if not _OPTION.fullmatch(name) or name in _OWN_OPTIONS]
        if wrong:
            raise ValueError(f"'{wrong[0]}' is decided by prefmill or is no long option of sbatch")
        for name, value in options.items():
            key = _KEY_OF_OPTION.get(name) or ("gpus and gpu_type" if name == "gres" and "gpu" in str(value) else None)
            if key:
                raise ValueError(f"'{name}' is said by the key {key}: write that instead")
        # A layer takes back so what one below it gives, such as `exclusive`.
        return {name: value for name, value in options.items() if value is not False}

    @model_validator(mode="after")
    def _say_memory_once(self) -> Self:
        given = [name for name in _MEMORY_OPTIONS if name in self.options]
        if given and self.memory_gb is not None:
            raise ValueError(
                f"memory_gb and the option '{given[0]}' both say the memory: set memory_gb: null, or leave that out"
            )
        return self


class Secrets(StrictConfig):
    """Names of secrets, and the file of NAME=value lines they are read from when a task starts, never before."""

    file: ExternalPath
    names: list[VariableName] = Field(min_length=1)


class ClusterFile(StrictConfig):
    """A site: `resources` are every stage's defaults and `stages` those of single ones (`advance` is the repair job).

    A pipeline's own `resources` are laid over both. `export` names variables that jobs take along from the shell
    that submits; secrets do not belong there. `signal_seconds` is how long before its end a task is told to save.
    `advance` adds one small job to a run; it classifies failures and resubmits failed tasks that can be retried.
    `webhook` names the secret or variable that holds an address to tell when a run has ended. `throughput` are rows a
    second and GPU by kind of GPU and stage, {h100: {dpo: 12.5}}: `estimate` makes hours of them.
    """

    account: str | None = None
    qos: str | None = None
    max_array_size: int | None = Field(None, ge=2)
    signal_seconds: int = Field(SIGNAL_SECONDS, ge=1)
    python: str | None = None
    setup: list[str] = []
    export: list[VariableName] = []
    secrets: Secrets | None = None
    advance: bool = True
    webhook: VariableName | None = None
    resources: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    throughput: dict[str, dict[str, Annotated[float, Field(gt=0)]]] = {}

    @field_validator("throughput")
    @classmethod
    def _are_stages(cls, table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        unknown = sorted({name for rates in table.values() for name in rates} - set(stage_names()))
        if unknown:
            raise ValueError(f"no stage '{unknown[0]}'{nearest(unknown[0], stage_names())}")
        return table

    @property
    def exported(self) -> list[str]:
        """Every variable a job takes along."""
        secret = self.secrets.names if self.secrets else []
        return [name for name in dict.fromkeys([*_BASIC_EXPORTS, *self.export]) if name not in secret]


def read_cluster(path: Path) -> ClusterFile:
    """The cluster file at `path`, its stages' resources checked; raises ConfigError."""
    cluster = load(ClusterFile, path)
    for stage in ["(defaults)", *cluster.stages]:
        resources_for(cluster, stage, where=path)
    if cluster.secrets is not None:
        clash = sorted(set(cluster.export) & set(cluster.secrets.names))
        if clash:
            raise ConfigError(
                f"'{clash[0]}' is exported and a secret", where=path, fix="take it out of `export`: values exported to "
                "jobs are kept by Slurm",
            )  # fmt: skip
        # Read to be checked alone: a missing name would otherwise show hours later, when a task starts.
        read_secrets(cluster.secrets)
    return cluster


def resources_for(
    cluster: ClusterFile, stage: str, given: Mapping[str, Any] | None = None, where: object = None
) -> Resources:
    """What a task of `stage` gets: the site's defaults, then the site's for that stage, then the pipeline's."""
    layered: dict[str, Any] = {}
    for layer in (cluster.resources, cluster.stages.get(stage, {}), given or {}):
        # Each layer by its present names first: else a key under a former name could not be overridden by its new one.
        layered |= modern(Resources, merge(layer))
    return validate(Resources, layered, where=f"{where or 'the cluster file'}: resources of {stage}")


def not_taken_along(cluster: ClusterFile, environment: Mapping[str, str]) -> Iterator[str]:
    """A note that names variables of this shell that libraries read and that jobs do not get."""
    layers = (cluster.resources, *cluster.stages.values())
    lines = [*cluster.setup, *(str(line) for layer in layers for line in layer.get("setup") or ())]
    known = {*cluster.exported, *(cluster.secrets.names if cluster.secrets else ())}
    left = sorted(name for name in environment if _LIBRARIES.fullmatch(name) and name not in known)
    if left := [name for name in left if not any(name in line for line in lines)]:
        yield f"set here, and not for jobs: {', '.join(left)} (name them in `export`, what is secret in `secrets`)"


def read_secrets(secrets: Secrets) -> dict[str, str]:
    """The values of the named secrets; raises ConfigError for a file others can read or a name it does not hold."""
    try:
        status = secrets.file.stat()
        text = secrets.file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "cannot read the secrets", where=secrets.file, got=error.strerror,
            fix="write NAME=value lines into that file, then chmod 600 it",
        ) from None  # fmt: skip
    if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.getuid():
        raise ConfigError(
            "others can read the secrets", where=secrets.file, got=stat.filemode(status.st_mode),
            expected="-rw------- and owned by you", fix=f"chmod 600 '{secrets.file}'",
        )  # fmt: skip
    # Such a file is often one that a shell sources as well.
    pairs = [line.strip().removeprefix("export ").split("=", 1) for line in text.splitlines() if "=" in line]
    values = {name.strip(): value.strip().strip("'\"") for name, value in pairs if not name.strip().startswith("#")}
    missing = [name for name in secrets.names if name not in values]
    if missing:
        raise ConfigError(
            f"the secrets file has no {missing[0]}", where=secrets.file, expected=", ".join(secrets.names),
            fix=f"add a line {missing[0]}=value, or take the name out of the cluster file",
        )  # fmt: skip
    return {name: values[name] for name in secrets.names}
