"""A sweep's worker: takes trials until the study has all it is to have, and those of workers that died."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefmill.core.config import flatten
from prefmill.core.errors import PipelineError
from prefmill.core.files import write_atomic
from prefmill.core.stage import Metrics, Task
from prefmill.store.jsonl import write_jsonl
from prefmill.sweep import study as studies
from prefmill.sweep.config import StudyConfig
from prefmill.sweep.study import Watch, beating, claim, read_claim
from prefmill.sweep.trial import (
    TrialDivergedError,
    TrialError,
    TrialInterrupted,
    TrialPruned,
    check_space,
    evaluations,
    independent,
    reached,
    run_trial,
    stage_values,
    still_runs,
    to_yaml,
)

if TYPE_CHECKING:
    import optuna

Draw = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any], StudyConfig], str]  # the page of a finished study

TRIALS, BEST, PAGE = "trials.jsonl", "best.yaml", "sweep.html"
_HOPELESS = 3  # trials that fail before any has succeeded
_POLL_SECONDS, _DYING_SECONDS = 2.0, 3.0


@dataclass(frozen=True)
class Turn:
    """What a worker does next: run a trial, wait for those of others, or finish."""

    does: Literal["run", "wait", "finish"]
    number: int = -1
    params: Mapping[str, Any] | None = None


def sweep(config: StudyConfig, task: Task, draw: Draw) -> Metrics:
    """Work until the study has `n_trials`, then write what they have shown; every worker writes the same.

    The study lies beside the workers' outputs and outlives them: a worker that comes back goes on with the trial it
    had, others take over a trial whose worker gives no sign of life, and a trial that has ended never runs again.
    """
    where = task.key
    check_space(config, where)
    independent(config, task.inputs)
    folder = study_folder(task, config.study_name)
    with studies.locked(folder):
        digests = {name: item.manifest.content_digest for name, items in task.inputs.items() for item in items}
        study = studies.open_study(config, folder, dict(sorted(digests.items())))
    watch = Watch(config.stale_seconds)
    while (turn := _next_turn(study, config, folder, task.name, watch)).does != "finish":
        _report(study, config, task)
        if turn.does == "run":
            _work(study, config, folder, task, turn)
        else:
            # At least once a beat: a worker is taken for dead by what was heard of it, so somebody must listen.
            time.sleep(min(_POLL_SECONDS, config.heartbeat_seconds))
    return _finish(study, config, task, draw)


def study_folder(task: Task, name: str) -> Path:
    """Where all workers of a study meet: beside their outputs."""
    folder = task.output.parent / f"study-{name}"
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    return folder


def trial_folder(study: Path, number: int) -> Path:
    """Where a trial's stages work."""
    folder = study / "trials" / f"{number:04}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _next_turn(study: optuna.Study, config: StudyConfig, folder: Path, worker: str, watch: Watch) -> Turn:
    """Decided, and claimed, with the lock held: no two workers are given the same trial."""
    with studies.locked(folder):
        trials = studies.rows(study)
        running = [trial for trial in trials if trial["state"] == "running"]
        for trial in running:
            place = trial_folder(folder, trial["number"])
            if not _is_free(config, place, worker, watch):
                continue
            # A trial that kills its worker, by memory for one, would otherwise take down one after the other.
            if len(claim(place, worker, reached(config, place)).attempts) > config.max_attempts:
                studies.fail(study, trial["number"], f"its worker died {config.max_attempts} times")
                continue
            return Turn("run", trial["number"], trial["params"])
        if len(trials) < config.n_trials:
            new = studies.ask(study, config)
            claim(trial_folder(folder, new.number), worker)
            return Turn("run", new.number, new.params)
    return Turn("wait" if running else "finish")


def _is_free(config: StudyConfig, trial: Path, worker: str, watch: Watch) -> bool:
    """A running trial that nobody runs: mine from before I was killed, without a claim, or one whose worker is dead."""
    known = read_claim(trial)
    if known is None or known.worker == worker:
        return True
    return watch.is_stale(trial) and not still_runs(config, trial)


def _work(study: optuna.Study, config: StudyConfig, folder: Path, task: Task, turn: Turn) -> None:
    """Run a trial and tell its value, unless somebody else has taken it over in the meantime."""
    assert turn.params is not None
    place = trial_folder(folder, turn.number)
    value, reason, diverged, pruned = None, "", False, False
    watch = _prune_watch(study, config, folder, turn.number) if config.pruner != "none" else None
    with beating(place, config.heartbeat_seconds):
        try:
            value = run_trial(config, place, turn.params, task.inputs, watch)
        except TrialError as error:
            reason, diverged = str(error), isinstance(error, TrialDivergedError)
        except TrialPruned as error:
            reason, pruned = str(error), True
        except TrialInterrupted as error:
            print(f"trial {turn.number}: {error}; it goes on where it stopped", flush=True)
            time.sleep(_DYING_SECONDS)  # what ended it may be about to end this worker
            return
    with studies.locked(folder):
        known = read_claim(place)
        # Another worker took this one for dead and went on with the trial: its value is theirs to tell.
        if known is None or known.worker != task.name or studies.rows(study)[turn.number]["state"] != "running":
            return
        if value is not None:
            study.tell(turn.number, value)
        elif pruned:
            studies.prune(study, turn.number, reason)
        else:
            studies.fail(study, turn.number, reason, diverged)
    print(
        f"trial {turn.number}: {config.metric} = {value} with {json.dumps(turn.params)} {reason}".rstrip(), flush=True
    )
    _require_hope(study, place)


def _prune_watch(study: optuna.Study, config: StudyConfig, folder: Path, number: int) -> Callable[[Path], None]:
    """Tells the study of each evaluation in a trial's curve, and raises TrialPruned at the first that is behind."""
    told = 0

    def look(curve: Path) -> None:
        nonlocal told
        values = evaluations(curve, config.prune_by)
        # All workers share the lock: it is taken only for what is new.
        if len(values) == told:
            return
        told = len(values)
        with studies.locked(folder):
            place = studies.behind(study, config, number, values)
        if place is not None:
            raise TrialPruned(f"pruned at evaluation {place}: {config.prune_by} = {values[place - 1]:.4g}")

    return look


def _require_hope(study: optuna.Study, place: Path) -> None:
    """Trials that diverge are what a search is for: only those that fail otherwise say that none can succeed."""
    trials = studies.rows(study)
    num_broken = sum(trial["state"] == "fail" and not trial.get("diverged") for trial in trials)
    if num_broken >= _HOPELESS and all(trial["state"] != "complete" for trial in trials):
        raise PipelineError(
            f"the first {num_broken} trials have all failed", where=place, got=studies.last_reason(study),
            fix="fix what that says, and give the study a new study_name",
        )  # fmt: skip


def _report(study: optuna.Study, config: StudyConfig, task: Task) -> None:
    ended = sum(trial["state"] != "running" for trial in studies.rows(study))
    task.progress(ended, config.n_trials, "trials")


def _finish(study: optuna.Study, config: StudyConfig, task: Task, draw: Draw) -> Metrics:
    """Write the trials, the best one's configuration and the page."""
    rows = studies.rows(study)
    complete = [row for row in rows if row["state"] == "complete"]
    if not complete:
        raise PipelineError(
            "no trial of the study has a value", where=study_folder(task, config.study_name),
            got=studies.last_reason(study), fix="fix what that says, and give the study a new study_name",
        )  # fmt: skip
    # Of equal values the first, so that every worker writes the same page.
    best = max(complete, key=lambda row: (config.sign * row["value"], -row["number"]))
    write_jsonl(task.output / TRIALS, rows)
    values = stage_values(config.config, config.set, best["params"])
    write_atomic(task.output / BEST, to_yaml(values))
    write_atomic(task.output / PAGE, draw(rows, best, config))
    shown = ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in flatten(best["params"])
    )
    told = (
        f"Best of {len(complete)} trials: {config.metric} = {best['value']:.4f} with {shown} (trial {best['number']})."
    )
    failed = sum(row["state"] == "fail" for row in rows)
    return {
        "trials": len(rows),
        "complete": len(complete),
        "failed": failed,
        "pruned": sum(row["state"] == "pruned" for row in rows),
        "best_value": best["value"],
        "best_trial": best["number"],
        "best_params": best["params"],
        "conclusion": [
            told,
            *([f"{failed} of {len(rows)} trials failed: their `reason` is in {TRIALS}."] if failed else []),
        ],
    }
