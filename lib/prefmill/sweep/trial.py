"""One trial: the stage's own entrypoint in a folder of the trial's, then its judge's; the value is a metric."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.core.config import ExternalPath, lay_over, load, merge, read_yaml
from prefmill.core.errors import ConfigError, DivergedError, PrefmillError, nearest
from prefmill.core.files import write_atomic
from prefmill.core.places import MANIFEST, STAGES, stages_folder
from prefmill.core.stage import Stage, load_stage
from prefmill.distributed.isolation import end_with_parent
from prefmill.pipeline.task_status import is_running, read_status
from prefmill.store.artifacts import read, read_manifest
from prefmill.sweep.config import StudyConfig, corners
from prefmill.training.checkpoints import STEPS, newest_checkpoint, read_curve
from prefmill.training.objective_names import VAL_METRICS

RUN = "trial"
LOG = "log.txt"
_LOOK_SECONDS = 1.0

Watch = Callable[[Path], None]  # called with the curve's file while a training runs and after it; ends it by raising


class TrialError(PrefmillError):
    """A trial that ended without a value."""


class TrialDivergedError(TrialError):
    """A trial whose training or metric became NaN or infinite: its parameters are at fault, not the study."""


class TrialInterrupted(Exception):  # noqa: N818 - nothing is wrong with the trial
    """The trial's process was ended by a signal: perhaps this worker's next, or memory has run out."""


class TrialPruned(Exception):  # noqa: N818 - nothing is wrong with the trial
    """The trial's evaluations are behind those of other trials."""


def check_space(config: StudyConfig, where: object) -> None:
    """Raise ConfigError before any trial runs when the stage, or the judge, does not accept what they will get."""
    stage = load_stage(config.stage)
    if not stage.trains:
        raise ConfigError("not a stage that trains", where=where, got=config.stage, fix="sweep over a training stage")
    for parameters in corners(config.space):
        load(stage.config, stage_values(config.config, config.set, parameters), where=f"{where} ({config.stage})")
    judge = None
    if config.judge is not None:
        judge = load_stage(config.judge.stage)
        load(judge.config, stage_values(config.judge.config, config.judge.set), where=f"{where} ({judge.name})")
        if config.judge.input not in judge.reads:
            raise ConfigError(
                f"stage {judge.name} has no input '{config.judge.input}'", where=where,
                expected=", ".join(judge.reads), fix="correct judge.input",
            )  # fmt: skip
    _require_metric(judge or stage, config.metric, where)
    known = [logged for name, logged in VAL_METRICS.items() if name in (stage.metrics or ())]
    if config.pruner != "none" and stage.metrics is not None and config.prune_by not in known:
        raise ConfigError(
            f"stage {stage.name} has no evaluation '{config.prune_by}'{nearest(config.prune_by, known)}", where=where,
            expected=", ".join(known) or "none to prune by", fix="correct prune_by" if known else "set pruner: none",
        )  # fmt: skip


def _require_metric(stage: Stage[Any], name: str, where: object) -> None:
    if stage.metrics is not None and name not in stage.metrics:
        raise ConfigError(
            f"stage {stage.name} has no metric '{name}'{nearest(name, stage.metrics)}", where=where,
            expected=", ".join(stage.metrics), fix="correct metric",
        )  # fmt: skip


def stage_values(
    file: ExternalPath | None, given: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A stage's configuration: its file, keys laid over it, and a trial's parameters by dotted key."""
    # Before references are resolved, so that ${...} in the file sees a trial's parameters.
    merged = lay_over(lay_over(read_yaml(file) if file else {}, given), parameters or {})
    return merge(merged, where=file)


def run_trial(
    config: StudyConfig, folder: Path, parameters: Mapping[str, Any], inputs: Mapping[str, tuple[Artifact, ...]],
    watch: Watch | None = None,
) -> float:  # fmt: skip
    """The value of a trial in `folder`; what an earlier attempt finished is not done again, the rest is resumed.

    Raises TrialError when a stage fails or its metric is not a number (TrialDivergedError where it became NaN or
    infinite), TrialInterrupted when it is killed, what `watch` raises, and ConfigError when there is no such metric.
    """
    stage = load_stage(config.stage)
    values = stage_values(config.config, config.set, parameters)
    if "cache_dir" in stage.config.model_fields and "cache_dir" not in values:
        values["cache_dir"] = str(folder.parent.parent / "cache")  # what does not hang on the parameters, once for all
    output = _run_stage(
        stage, values, folder, {name: item for name, item in inputs.items() if name in stage.reads}, watch
    )
    if watch is not None:
        _require_evaluations(_logs(folder, stage.name) / STEPS, config.prune_by, stage)
    metrics, last = output.manifest.metrics, stage
    if config.judge is not None:
        last = load_stage(config.judge.stage)
        given = {name: item for name, item in inputs.items() if name in last.reads} | {config.judge.input: (output,)}
        judged = _run_stage(last, stage_values(config.judge.config, config.judge.set), folder, given)
        metrics = judged.manifest.metrics
    return _value(metrics, config.metric, last, folder)


def independent(config: StudyConfig, inputs: Mapping[str, tuple[Artifact, ...]]) -> None:
    """Raise ConfigError when the judge's reward model is the one that trials are trained by."""
    if config.judge is None:
        return
    trained_by = {
        item.manifest.content_digest: name
        for name in load_stage(config.stage).reads
        for item in inputs.get(name, ())
        if item.manifest.kind == "reward_model"
    }
    for name in load_stage(config.judge.stage).reads:
        for item in inputs.get(name, ()):
            if item.manifest.content_digest in trained_by:
                raise ConfigError(
                    "the judge is the reward that trials are trained by", where=item.path, got=f"inputs.{name}",
                    fix="give the judge a reward model of prompt_half=judge, the trials one of prompt_half=policy",
                )  # fmt: skip


def _run_stage(
    stage: Stage[Any], values: Mapping[str, Any], folder: Path, inputs: Mapping[str, tuple[Artifact, ...]],
    watch: Watch | None = None,
) -> Artifact:  # fmt: skip
    """What the stage makes below `folder`, in a process of its own that dies with this one."""
    config = folder / f"{stage.name}.yaml"
    write_atomic(config, to_yaml(values))
    given = [f"inputs.{name}=[{','.join(str(item.path) for item in items)}]" for name, items in inputs.items() if items]
    command = [sys.executable, "-m", f"{STAGES}.{stage.name}", str(config), f"run={RUN}", f"workspace={folder}", *given]
    # Appended to: what an earlier attempt said stays.
    with (folder / LOG).open("ab") as log:
        child = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=end_with_parent,
        )  # fmt: skip
        code = _wait(child, partial(watch, _logs(folder, stage.name) / STEPS) if watch else lambda: None)
    if code < 0:
        raise TrialInterrupted(f"stage {stage.name} was ended by signal {-code}")
    output, logs = folder / stage.root / RUN / stage.name / "all", _logs(folder, stage.name)
    # The stage found its task's lock held: the worker that this trial was taken from is alive after all.
    if code and is_running(logs):
        raise TrialInterrupted(f"stage {stage.name} still runs in another worker")
    if code or read_manifest(output) is None:
        status = read_status(logs)
        reason = str(status.get("error", "")).strip()
        raise (TrialDivergedError if status.get("kind") == DivergedError.__name__ else TrialError)(
            f"stage {stage.name} failed with exit code {code}", where=folder / LOG,
            got=reason.splitlines()[0] if reason else None, fix="see the end of its log",
        )  # fmt: skip
    return read(output, stage.writes)


def _wait(child: subprocess.Popen[bytes], look: Callable[[], None]) -> int:
    """The child's exit code, after a last `look`; what `look` raises ends the child."""
    try:
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_LOOK_SECONDS)
            look()
        return int(child.returncode)
    finally:
        # A pruned training, or one whose worker ends by an error, must not keep the GPU.
        child.kill()
        child.wait()


def evaluations(curve: Path, name: str) -> list[float]:
    """The value `name` of each evaluation of a curve, in their order."""
    return [float(row[name]) for row in read_curve(curve) if name in row]


def _require_evaluations(curve: Path, name: str, stage: Stage[Any]) -> None:
    if not evaluations(curve, name):
        known = sorted(
            {key for row in read_curve(curve) for key in row if key.startswith("eval_") and "loss" not in key}
        )
        raise ConfigError(
            f"stage {stage.name} has no evaluation '{name}' to prune by", where=curve,
            got=", ".join(known) or "no evaluation", fix="correct prune_by and see that it has held-out data, "
            "or set pruner: none, and give the study a new study_name",
        )  # fmt: skip


def still_runs(config: StudyConfig, folder: Path) -> bool:
    """Whether a process holds one of the trial's stages: a file lock tells, as far as the disk passes it on."""
    names = [config.stage, *([config.judge.stage] if config.judge else [])]
    return any(is_running(_logs(folder, name)) for name in names)


def reached(config: StudyConfig, folder: Path) -> int:
    """The step of the newest complete checkpoint of a trial; more than any where it is trained."""
    output = folder / load_stage(config.stage).root / RUN / config.stage / "all"
    newest = newest_checkpoint(output, delete_torn=False)
    return sys.maxsize if (output / MANIFEST).is_file() else int((newest or "-0").rpartition("-")[2])


def _logs(folder: Path, stage: str) -> Path:
    return folder / "logs" / RUN / stage / "all"


def _value(metrics: Mapping[str, Any], name: str, stage: Stage[Any], folder: Path) -> float:
    if name not in metrics:
        numbers = [key for key, value in metrics.items() if isinstance(value, (int, float)) and "loss" not in key]
        raise ConfigError(
            f"stage {stage.name} has no metric '{name}'", where=folder, expected=", ".join(numbers),
            fix="correct metric, and give the study a new study_name",
        )  # fmt: skip
    value = metrics[name]
    if not isinstance(value, (int, float)):
        raise TrialError(f"metric {name} is no number", where=folder, got=value, fix="see that it has held-out data")
    if not math.isfinite(value):
        raise TrialDivergedError(f"metric {name} is no finite number", where=folder, got=value, fix="narrow the space")
    return float(value)


def _environment() -> dict[str, str]:
    """This process's, but that the stage does not take itself for the Slurm job around it."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    repository = str(stages_folder().parent)
    # `python -m stages.X` must find the checkout, whatever folder this worker was started in.
    paths = [repository, *filter(None, [outside.get("PYTHONPATH")])]
    return {**outside, "PYTHONPATH": os.pathsep.join(paths)}


def to_yaml(values: Mapping[str, Any]) -> str:
    """A configuration's file."""
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.create(dict(values)))
    return text
