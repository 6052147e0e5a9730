"""Sweep workers without processes: who gets which trial, what happens to those of the dead, what ends a study."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.stage import Task
from prefmill.report.sweep_page import sweep_page
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl
from prefmill.sweep import run as worker
from prefmill.sweep import study as studies
from prefmill.sweep.config import StudyConfig, corners
from prefmill.sweep.run import BEST, PAGE, TRIALS, sweep, trial_folder
from prefmill.sweep.study import HEARTBEAT, Watch, beating, claim, read_claim
from prefmill.sweep.trial import TrialError, TrialInterrupted

pytestmark = pytest.mark.timing

KEYS: dict[str, Any] = {
    "stage": "train_reward", "metric": "val_f1", "n_trials": 6,
    "space": {"learning_rate": {"low": 2e-5, "high": 2e-4, "log": True}, "hidden_size": {"choices": [4, 8, 16]}},
    "heartbeat_seconds": 0.05, "stale_seconds": 2.0,
}  # fmt: skip
Params = Mapping[str, Any]


class Killed(BaseException):
    """What ends a worker without letting it do anything more."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The trials run, in order; a trial's value is best where the learning rate is 1e-4 and the head 8 wide."""
    numbers: list[int] = []
    use(monkeypatch, lambda number, params: score(params), numbers)
    return numbers


def score(params: Params) -> float:
    return float(-abs(params["learning_rate"] - 1e-4) * 1e4 - abs(params.get("hidden_size", 8) - 8) / 10)


def use(patch: pytest.MonkeyPatch, value: Callable[[int, Params], float], numbers: list[int]) -> None:
    """Have trials give `value(number, params)`."""

    def run_trial(config: Any, folder: Path, params: Params, inputs: Any, watch: Any) -> float:
        numbers.append(int(folder.name))
        return value(int(folder.name), params)

    patch.setattr(worker, "run_trial", run_trial)
    patch.setattr(worker, "_POLL_SECONDS", 0.02)
    patch.setattr(worker, "_DYING_SECONDS", 0.0)


def task(folder: Path, name: str = "worker0") -> Task:
    output = folder / "sweep" / name
    output.mkdir(parents=True, exist_ok=True)
    return Task("r", "sweep", name, {}, {}, {}, output, folder / "logs" / name)


def go(folder: Path, name: str = "worker0", **keys: Any) -> dict[str, Any]:
    return dict(sweep(validate(StudyConfig, {**KEYS, **keys}), task(folder, name), sweep_page))


def content(folder: Path, name: str = "worker0") -> dict[str, bytes]:
    output = folder / "sweep" / name
    return {path.name: path.read_bytes() for path in payload(output)}


def worker_of(trial: Path) -> str:
    known = read_claim(trial)
    assert known is not None
    return known.worker


def attempts(folder: Path, name: str = "study") -> dict[int, tuple[str, ...]]:
    found = {}
    for path in sorted((folder / "sweep" / f"study-{name}" / "trials").iterdir()):
        known = read_claim(path)
        assert known is not None
        found[int(path.name)] = known.attempts
    return found


def test_a_study_of_one_worker_is_the_same_every_time(tmp_path: Path, ran: list[int]) -> None:
    told = go(tmp_path / "a")
    assert ran == [0, 1, 2, 3, 4, 5]
    go(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    rows = list(read_jsonl(tmp_path / "a" / "sweep" / "worker0" / TRIALS))
    best = max(rows, key=lambda row: row["value"])
    assert (told["best_trial"], told["best_value"]) == (best["number"], best["value"])
    assert told["best_params"] == best["params"]
    assert all(2e-5 <= row["params"]["learning_rate"] <= 2e-4 for row in rows)
    assert {row["params"]["hidden_size"] for row in rows} <= {4, 8, 16}
    assert f"learning_rate: {best['params']['learning_rate']}" in (tmp_path / "a/sweep/worker0" / BEST).read_text()
    page = (tmp_path / "a" / "sweep" / "worker0" / PAGE).read_text()
    assert page.count("<svg") == 3
    assert "best so far" in page


def test_more_trials_go_on_where_the_study_stands(tmp_path: Path, ran: list[int]) -> None:
    go(tmp_path)
    go(tmp_path, n_trials=8)
    assert ran == list(range(8))
    go(tmp_path, n_trials=8)
    assert ran == list(range(8)), "a finished study runs nothing"


def test_a_worker_that_was_killed_goes_on_with_the_trial_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []

    def dies_once(number: int, params: Params) -> float:
        if number == 2 and numbers.count(2) == 1:
            raise Killed
        return score(params)

    use(monkeypatch, dies_once, numbers)
    with pytest.raises(Killed):
        go(tmp_path)
    go(tmp_path)
    assert numbers == [0, 1, 2, 2, 3, 4, 5]
    assert attempts(tmp_path)[2] == ("worker0", "worker0")
    calm = tmp_path / "calm"
    use(monkeypatch, lambda number, params: score(params), numbers)
    go(calm)
    assert content(tmp_path) == content(calm), "the kill changes nothing of the study"


@pytest.mark.slow
def test_four_workers_share_a_study_and_take_over_from_one_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    died = threading.Event()

    def value(number: int, params: Params) -> float:
        if threading.current_thread().name == "worker1":
            died.set()
            raise Killed
        assert died.wait(60), "the others leave a trial for the one that is to die"
        return score(params)

    use(monkeypatch, value, numbers)
    # On a busy machine a heart may be silent for long: only the one that died has no process any more.
    monkeypatch.setattr(worker, "still_runs", lambda _, trial: worker_of(trial) != "worker1")

    def live(name: str) -> None:
        with contextlib.suppress(Killed):
            go(tmp_path, name, n_trials=12, stale_seconds=0.2)

    threads = [threading.Thread(target=live, args=(f"worker{n}",), name=f"worker{n}") for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert died.is_set()
    rows = list(read_jsonl(tmp_path / "sweep" / "worker0" / TRIALS))
    assert [row["number"] for row in rows] == list(range(12))
    assert {row["state"] for row in rows} == {"complete"}
    tried = attempts(tmp_path)
    twice = [number for number, names in tried.items() if len(names) > 1]
    assert len(twice) == 1
    assert tried[twice[0]][0] == "worker1" != tried[twice[0]][1]
    assert Counter(numbers) == Counter([*range(12), twice[0]])
    assert content(tmp_path, "worker0") == content(tmp_path, "worker2") == content(tmp_path, "worker3")


def test_a_process_that_is_killed_is_not_a_failed_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def killed(number: int, params: Params) -> float:
        if number == 1 and numbers.count(1) < 3:
            raise TrialInterrupted("by signal 9")
        if number == 3:
            raise TrialInterrupted("always")
        return score(params)

    use(monkeypatch, killed, numbers)
    told = go(tmp_path, n_trials=5)
    assert (told["complete"], told["failed"]) == (4, 1)
    assert numbers == [0, 1, 1, 1, 2, 3, 3, 3, 4]


def test_failed_trials_are_counted_and_hopeless_studies_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(places: tuple[int, ...]) -> Callable[[int, Params], float]:
        def value(number: int, params: Params) -> float:
            if number in places:
                raise TrialError("the loss is no longer a number")
            return score(params)

        return value

    numbers: list[int] = []
    use(monkeypatch, fails((1, 4)), numbers)
    assert go(tmp_path / "a")["failed"] == 2
    use(monkeypatch, fails(tuple(range(9))), numbers)
    with pytest.raises(PipelineError, match="the first 3 trials have all failed"):
        go(tmp_path / "b")
    with pytest.raises(PipelineError, match="no trial of the study has a value"):
        go(tmp_path / "c", n_trials=2)


def test_another_space_is_another_study(tmp_path: Path, ran: list[int]) -> None:
    go(tmp_path, n_trials=1)
    other = {"learning_rate": {"low": 1e-5, "high": 2e-4, "log": True}}
    with pytest.raises(ConfigError, match=r"was begun with other settings[\s\S]*space"):
        go(tmp_path, space=other)
    go(tmp_path, space=other, study_name="wider", n_trials=1)
    assert len(ran) == 2


def next_beat(trial: Path) -> None:
    """Return when the heart has beaten again."""
    before, deadline = (trial / HEARTBEAT).read_text(), time.monotonic() + 60
    while (trial / HEARTBEAT).read_text() == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_heart_that_stops_is_noticed_by_the_observers_own_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr(studies, "time", SimpleNamespace(monotonic=lambda: seconds, time_ns=time.time_ns))
    watch = Watch(stale_seconds=1.0)
    claim(tmp_path, "a")
    with beating(tmp_path, 0.01):
        for _ in range(12):
            assert not watch.is_stale(tmp_path)
            next_beat(tmp_path)
            seconds += 1.1
    assert not watch.is_stale(tmp_path)
    seconds += 1.1
    assert watch.is_stale(tmp_path)
    assert not Watch(1.0).is_stale(tmp_path), "whoever has just come has heard nothing yet"
    assert json.loads((tmp_path / "claim.json").read_text()) == {"worker": "a", "attempts": ["a"], "reached": 0}
    assert trial_folder(tmp_path, 7).name == "0007"


def test_a_heart_beats_on_behind_a_disk_that_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ended, and others took the trial of a living worker over."""
    claim(tmp_path, "a")

    def full(*_: object) -> None:
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(studies, "write_atomic", full)
    with beating(tmp_path, 0.01):
        next_beat(tmp_path)


def test_who_takes_over_a_trial_is_not_taken_for_dead_before_its_first_beat(tmp_path: Path) -> None:
    claim(tmp_path, "dead")
    watches = [Watch(0.1), Watch(0.1)]
    assert [watch.is_stale(tmp_path) for watch in watches] == [False, False]
    time.sleep(0.2)
    assert watches[0].is_stale(tmp_path)
    claim(tmp_path, "worker0")
    assert not watches[1].is_stale(tmp_path), "both would run it"


@pytest.mark.slow
def test_a_lock_whose_holder_was_killed_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for it costs a look now and then, not a processor."""
    monkeypatch.setattr(studies, "_LOCK_GRACE_SECONDS", 3)
    code = f"""
import os, pathlib, signal
from prefmill.sweep.study import locked
with locked(pathlib.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    begun = time.monotonic(), time.process_time()
    with studies.locked(tmp_path):
        waited, used = time.monotonic() - begun[0], time.process_time() - begun[1]
    assert 3 < waited < 30
    assert used < waited / 3


def test_a_silent_heart_is_no_death_while_the_trials_process_lives(tmp_path: Path, ran: list[int]) -> None:
    """On a disk that stalls no beat may be written; the lock of the trial's stage still tells."""
    import fcntl

    config = validate(StudyConfig, {**KEYS, "stale_seconds": 0.1})
    claim(tmp_path, "worker1")
    watch = Watch(0.1)
    assert not worker._is_free(config, tmp_path, "worker0", watch)
    time.sleep(0.2)
    logs = tmp_path / "logs" / "trial" / "train_reward" / "all"
    logs.mkdir(parents=True)
    with (logs / "lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not worker._is_free(config, tmp_path, "worker0", watch)
    assert worker._is_free(config, tmp_path, "worker0", watch)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric": "train_loss"}, "losses"),
        ({"prune_by": "eval_loss"}, "losses"),
        ({"metric": "val_loss"}, "the least is best, set direction: minimize"),
        ({"metric": "steps", "space": {"learning_rat": {"low": 1.0, "high": 2.0}}}, "did you mean 'learning_rate'"),
        ({"space": {"learning_rate": {"low": -1.0, "high": 2.0}}}, "greater than 0"),
        ({"space": {"learning_rate": {"low": 2.0, "high": 1.0}}}, "low must be below high"),
        ({"stage": "report"}, "not a stage that trains"),
        ({"judge": {"stage": "evaluate_images", "input": "adapter"}}, "has no input 'adapter'"),
        ({"stale_seconds": 0.06}, "at least 2 x heartbeat_seconds"),
    ],
)
def test_what_no_trial_could_run_is_refused_first(
    keys: dict[str, Any], message: str, tmp_path: Path, ran: list[int]
) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        go(tmp_path, **keys)
    assert ran == []


def test_corners_take_every_end_and_choice() -> None:
    config = validate(StudyConfig, KEYS)
    taken = corners(config.space)
    assert {row["hidden_size"] for row in taken} == {4, 8, 16}
    assert {row["learning_rate"] for row in taken} == {2e-5, 2e-4}
