"""A study outlives trials that diverge and a journal that a killed worker left torn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.stage import load_stage
from prefmill.store.jsonl import read_jsonl
from prefmill.sweep import study as studies
from prefmill.sweep.config import StudyConfig
from prefmill.sweep.run import TRIALS
from prefmill.sweep.trial import TrialDivergedError, TrialError, TrialInterrupted, _value, check_space
from prefmill.training.checkpoints import mark_complete
from tests.conftest import REPOSITORY
from tests.unit.sweep.test_sweep_worker import Params, go, ran, score, use

__all__ = ["ran"]


def test_trials_that_diverge_are_failed_trials_and_end_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(number: int, params: Params) -> float:
        if number < 4:
            raise TrialDivergedError("metric val_f1 is no finite number", got=math.nan)
        return score(params)

    numbers: list[int] = []
    use(monkeypatch, diverges, numbers)
    told = go(tmp_path, n_trials=6)
    assert (told["complete"], told["failed"], told["best_trial"] >= 4) == (2, 4, True)
    assert told["conclusion"][1:] == ["4 of 6 trials failed: their `reason` is in trials.jsonl."]
    rows = list(read_jsonl(next(tmp_path.rglob(TRIALS))))
    assert all("is no finite number" in row["reason"] and row["diverged"] for row in rows[:4])
    assert all("reason" not in row for row in rows[4:])


@pytest.mark.parametrize(("value", "error"), [(math.nan, TrialDivergedError), (math.inf, TrialDivergedError)])
def test_a_metric_that_is_not_finite_is_a_trial_that_diverged(value: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="is no finite number"):
        _value({"val_f1": value}, "val_f1", load_stage("train_reward"), Path("trial"))
    with pytest.raises(TrialError, match="is no number") as raised:
        _value({"val_f1": None}, "val_f1", load_stage("train_reward"), Path("trial"))
    assert not isinstance(raised.value, TrialDivergedError)


IMAGES = {"stage": "sdxl_dpo", "space": {"learning_rate": {"low": 1e-5, "high": 1e-4}}}
LEAST = {"metric": "val_loss", "direction": "minimize"}
JUDGE = {"judge": {"stage": "evaluate_images", "input": "tuned"}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"metric": "val_acuracy"}, r"sdxl_dpo has no metric 'val_acuracy' \(did you mean 'val_accuracy'\?\)"),
        ({"metric": "winrate", **JUDGE}, r"evaluate_images has no metric 'winrate' \(did you mean 'win_rate'\?\)"),
        ({"metric": "val_f1", **JUDGE}, r"evaluate_images has no metric 'val_f1'[\s\S]*win_rate"),
        ({"stage": "train_reward", "metric": "f1"}, r"train_reward has no metric 'f1'[\s\S]*val_f1"),
        ({"stage": "sft", "metric": "val_accuracy"}, r"sft has no metric 'val_accuracy'[\s\S]*val_loss"),
        ({"metric": "val_loss", "direction": "minimize"}, r"sdxl_dpo has no metric 'val_loss'[\s\S]*val_accuracy"),
        ({"stage": "sft", **LEAST, "pruner": "median", "prune_by": "eval_accuracy"}, "none to prune by"),
        ({"metric": "val_f1", "pruner": "median", "prune_by": "eval_acc"}, "no evaluation 'eval_acc'"),
    ],
)
def test_names_of_metrics_are_checked_before_the_first_trial(keys: dict[str, Any], said: str) -> None:
    """A trial may take a day: its whole training ran before a wrong name was told."""
    with pytest.raises(ConfigError, match=said):
        check_space(validate(StudyConfig, {**IMAGES, **keys}), "sweep")


@pytest.mark.parametrize(("saves", "failed"), [(True, 0), (False, 1)])
def test_a_trial_that_comes_further_each_time_outlives_its_workers(
    saves: bool, failed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a queue that preempts, a trial was failed after `max_attempts` jobs however far they had taken it."""
    numbers: list[int] = []

    def preempted(number: int, params: Params) -> float:
        times = numbers.count(number)
        if number == 1 and times < 5:
            trial = next(tmp_path.rglob("trials")) / "0001" / "checkpoints" / "trial" / "train_reward" / "all"
            checkpoint = trial / f"checkpoint-{times * 10}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "weights").write_bytes(b"w")
            if saves:
                mark_complete(checkpoint)
            raise TrialInterrupted("by signal 15")
        return score(params)

    use(monkeypatch, preempted, numbers)
    assert go(tmp_path, n_trials=3, max_attempts=2)["failed"] == failed
    assert numbers.count(1) == (5 if saves else 2)


@pytest.mark.parametrize("followed", [False, True])
def test_a_torn_line_of_the_journal_ends_no_study(tmp_path: Path, ran: list[int], followed: bool) -> None:
    go(tmp_path, n_trials=2)
    journal = next(tmp_path.rglob(studies.JOURNAL))
    whole = journal.read_bytes()
    case = REPOSITORY.parent / "shared" / "cases" / "images" / "torn_journal.log"
    torn = case.read_bytes() if case.is_file() else b'{"op_code": 4,'
    last = whole.splitlines(keepends=True)[-1]
    journal.write_bytes(whole[: -len(last)] + torn + last if followed else whole + torn)
    assert go(tmp_path, n_trials=4)["complete"] == 4
    assert ran == [0, 1, 2, 3]
    assert torn not in journal.read_bytes()


def test_a_line_of_the_journal_that_is_no_entry_is_named(tmp_path: Path, ran: list[int]) -> None:
    go(tmp_path, n_trials=1)
    journal = next(tmp_path.rglob(studies.JOURNAL))
    journal.write_bytes(b"not an entry\n" + journal.read_bytes())
    with pytest.raises(PipelineError, match=r"no entry[\s\S]*journal\.log:1[\s\S]*not an entry"):
        go(tmp_path, n_trials=2)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"type": "float", "low": 1e-5, "high": 1e-3}, [".type: unknown key; valid keys: "]),
        ({"min": 0.1, "max": 0.5}, [".low: required", ".min: unknown key"]),
        ({"choices": [1], "log": True}, [".choices = [1]", ".log: unknown key"]),
        (0.1, [" = 0.1: Input should be keys with values"]),
    ],
)
def test_what_is_wrong_with_a_space_is_told_of_what_is_meant(item: object, said: list[str]) -> None:
    """Optuna's and W&B's ways: the faults of both kinds were listed, under the names of pydantic's functions."""
    with pytest.raises(ConfigError) as caught:
        validate(StudyConfig, {"stage": "dpo", "metric": "val_f1", "space": {"learning_rate": item}})
    lines = [line for line in str(caught.value).splitlines() if "space." in line]
    assert len(lines) <= 4
    assert not any("function-after" in line for line in lines)
    assert all(any(f"space.learning_rate{part}" in line for line in lines) for part in said), lines
