"""Pruning: trials that are behind end at an evaluation, by Optuna's own rule, and their training with them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from prefmill.core.errors import ConfigError
from prefmill.store.jsonl import read_jsonl
from prefmill.sweep import run as worker
from prefmill.sweep import study as studies
from prefmill.sweep.run import TRIALS
from prefmill.sweep.study import claim
from prefmill.sweep.trial import TrialPruned, _require_evaluations, _wait, evaluations
from tests.unit.sweep.test_sweep_worker import go

pytestmark = pytest.mark.timing
CURVES = {number: [quality * step for step in (1, 2, 3, 4)] for number, quality in enumerate((5, 4, 3, 6, 1, 7, 2, 8))}


def write_curve(path: Path, values: Sequence[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 2 * place, "eval_f1": value} for place, value in enumerate(values, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def use(patch: pytest.MonkeyPatch, looks: Sequence[int]) -> dict[int, int]:
    """Trials with these CURVES, looked at after so many evaluations each time; gives how far each came."""
    came: dict[int, int] = {}

    def run_trial(config: Any, folder: Path, params: Any, inputs: Any, watch: Callable[[Path], None]) -> float:
        number = int(folder.name)
        for count in looks:
            came[number] = count
            write_curve(folder / "steps.jsonl", CURVES[number][:count])
            watch(folder / "steps.jsonl")
        return CURVES[number][-1]

    patch.setattr(worker, "run_trial", run_trial)
    return came


def by_optuna(pruner: optuna.pruners.BasePruner) -> list[str]:
    """The states that Optuna's own loop gives the same curves."""

    def objective(trial: optuna.Trial) -> float:
        for step, value in enumerate(CURVES[trial.number], 1):
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return CURVES[trial.number][-1]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", pruner=pruner, study_name="study")
    study.optimize(objective, n_trials=len(CURVES))
    return [trial.state.name.lower() for trial in study.trials]


@pytest.mark.parametrize(
    ("name", "pruner"),
    # Made for each run of the test: Hyperband's remembers its trials.
    [
        ("median", partial(optuna.pruners.MedianPruner, n_startup_trials=3)),
        ("hyperband", optuna.pruners.HyperbandPruner),
    ],
)
def test_the_trials_that_optuna_would_end_are_ended(
    name: str, pruner: Callable[[], optuna.pruners.BasePruner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = use(monkeypatch, looks=(1, 2, 3, 4))
    more: dict[str, Any] = {"startup_trials": 3} if name == "median" else {}
    told = go(tmp_path, n_trials=len(CURVES), pruner=name, prune_by="eval_f1", **more)
    rows = list(read_jsonl(next(tmp_path.rglob(TRIALS))))
    states = [row["state"] for row in rows]
    assert states == by_optuna(pruner())
    assert states.count("pruned") == told["pruned"] >= 2
    assert told["best_trial"] == 7
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert all(row["value"] is None and "eval_f1 = " in row["reason"] for row in pruned)
    assert all(came[row["number"]] < 4 for row in pruned if name == "median")


def test_how_often_the_worker_looks_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"n_trials": len(CURVES), "pruner": "median", "prune_by": "eval_f1", "startup_trials": 3}
    for name, looks in (("often", (1, 2, 3, 4)), ("once", (4,))):
        use(monkeypatch, looks)
        go(tmp_path / name, **keys)
    often, once = (list(read_jsonl(next((tmp_path / name).rglob(TRIALS)))) for name in ("often", "once"))
    assert often == once


def test_a_metric_to_minimize_turns_no_evaluation_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna takes both by one direction: with a calibration error as metric the most accurate trials were ended."""
    keys = {"n_trials": len(CURVES), "pruner": "median", "prune_by": "eval_f1", "startup_trials": 3}
    states = []
    for direction in ("maximize", "minimize"):
        use(monkeypatch, looks=(1, 2, 3, 4))
        go(tmp_path / direction, direction=direction, **keys)
        states.append([row["state"] for row in read_jsonl(next((tmp_path / direction).rglob(TRIALS)))])
    assert states[0] == states[1]
    assert "pruned" in states[0]


def test_a_trial_that_another_worker_has_ended_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node that stood still for minutes: Optuna's refusal ended the worker with a traceback."""
    taken: list[int] = []

    def run_trial(config: Any, folder: Path, params: Any, inputs: Any, watch: Callable[[Path], None]) -> float:
        number = int(folder.name)
        write_curve(folder / "steps.jsonl", CURVES[number][:1])
        watch(folder / "steps.jsonl")
        if not taken:
            taken.append(number)
            claim(folder, "worker1")
            with studies.locked(folder.parents[1]):
                studies.open_study(config, folder.parents[1], {}).tell(number, 0.25)
            write_curve(folder / "steps.jsonl", CURVES[number])
            watch(folder / "steps.jsonl")
            raise AssertionError("the training went on")
        return CURVES[number][-1]

    monkeypatch.setattr(worker, "run_trial", run_trial)
    go(tmp_path, n_trials=3, pruner="median", prune_by="eval_f1")
    rows = list(read_jsonl(next(tmp_path.rglob(TRIALS))))
    assert [row["value"] for row in rows] == [0.25, CURVES[1][-1], CURVES[2][-1]]


def test_a_pruned_trainings_process_ends_at_once(tmp_path: Path) -> None:
    def look() -> None:
        raise TrialPruned("behind")

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    begun = time.monotonic()
    with pytest.raises(TrialPruned):
        _wait(child, look)
    assert child.poll() is not None
    assert time.monotonic() - begun < 60


def test_nothing_to_prune_by_is_told(tmp_path: Path) -> None:
    curve = tmp_path / "steps.jsonl"
    write_curve(curve, [0.5])
    with pytest.raises(ConfigError, match=r"no evaluation 'eval_accuracy' to prune by[\s\S]*eval_f1"):
        _require_evaluations(curve, "eval_accuracy", SimpleNamespace(name="sdxl_dpo"))  # type: ignore[arg-type]
    with curve.open("a") as stream:
        stream.write('{"step": 4, "eval')
    assert evaluations(curve, "eval_f1") == [0.5]  # the next one is being written


@pytest.mark.parametrize(("pruner", "named"), [("none", "startup_trials, prune_by"), ("hyperband", "startup_trials")])
def test_a_key_that_the_pruner_does_not_read_is_refused(tmp_path: Path, pruner: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}: no effect with pruner: {pruner}"):
        go(tmp_path, pruner=pruner, prune_by="eval_f1", startup_trials=3)
