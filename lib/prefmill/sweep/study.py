"""An Optuna study that workers on several machines share on a common disk: its journal, and who claims a trial."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.files import as_form, digest_json, read_record, write_atomic, write_record
from prefmill.sweep.config import Choices, SearchInterval, StudyConfig

if TYPE_CHECKING:
    import optuna


CLAIM, HEARTBEAT = "claim.json", "heartbeat"


@dataclass(frozen=True)
class Claim:
    """The worker that runs a trial, and all who did since it had `reached` that step; the last is `worker` itself."""

    worker: str
    attempts: tuple[str, ...]
    reached: int = 0


def read_claim(trial: Path) -> Claim | None:
    """The claim on the trial in this folder; None where its worker died before it wrote one."""
    given, path = read_record(trial / CLAIM), trial / CLAIM
    return as_form(given, Claim, path, "delete that file") if given else None


def claim(trial: Path, worker: str, reached: int = 0) -> Claim:
    """Put `worker` in charge of the trial; call it with the study's lock held.

    A claim is a sign of life itself: the next to look must not take for dead who has not come to its first beat.
    """
    before = read_claim(trial)
    # Who was preempted after it had taken the trial further was not killed by it.
    earlier = before.attempts if before and before.reached >= reached else ()
    mine = Claim(worker, (*earlier, worker), reached)
    _beat(trial)
    write_record(trial / CLAIM, asdict(mine))
    return mine


@contextlib.contextmanager
def beating(trial: Path, seconds: float) -> Iterator[None]:
    """Give a sign of life now and every few `seconds` until the block ends or this process does."""
    stopped = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError):  # a full disk, a server that is away: the next beat may be heard again
                _beat(trial)
            if stopped.wait(seconds):
                return

    # A daemon ends with its process, whatever ends that: a heart must not outlive its worker.
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _beat(trial: Path) -> None:
    # Any text that is new each time would do: nobody compares it with a clock of their own.
    write_atomic(trial / HEARTBEAT, str(time.time_ns()))


@dataclass
class Watch:
    """Notes when a trial's heart was last heard, by this process's own clock: clocks of machines may differ."""

    stale_seconds: float
    _heard: dict[Path, tuple[str, float]] = field(default_factory=dict)

    def is_stale(self, trial: Path) -> bool:
        """Whether nothing has been heard for `stale_seconds`; at the first look never."""
        try:
            beat = (trial / HEARTBEAT).read_text()
        except FileNotFoundError:
            beat = ""
        # A clock that is set forward would make all workers look dead.
        now = time.monotonic()
        known = self._heard.get(trial)
        if known is None or known[0] != beat:
            self._heard[trial] = (beat, now)
            return False
        return now - known[1] > self.stale_seconds


JOURNAL = "journal.log"
_DEFINITION, _REASON, _DIVERGED = "definition", "reason", "diverged"
_LOCK_GRACE_SECONDS = 30  # a lock whose holder died is broken after that; nothing holds one for a second


def open_study(config: StudyConfig, folder: Path, inputs: dict[str, str]) -> optuna.Study:
    """The study in `folder`, begun if there is none; call it with the lock held.

    Raises ConfigError where it was begun with another stage, space, metric or input (`inputs`: content digests).
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(
        storage=storage, study_name=config.study_name, direction=config.direction, load_if_exists=True
    )
    mine = {"study": config.definition(), "inputs": inputs}
    known = study.user_attrs.get(_DEFINITION)
    if known is None:
        study.set_user_attr(_DEFINITION, mine)
    elif digest_json(known) != digest_json(mine):
        differing = [key for key in mine["study"] if known["study"].get(key) != mine["study"][key]] or ["inputs"]
        raise ConfigError(
            f"study '{config.study_name}' was begun with other settings", where=folder, got=", ".join(differing),
            fix="give study_name a new name, or set these keys as they were; n_trials may be raised",
        )  # fmt: skip
    return study


def mend_journal(path: Path) -> None:
    """Overwrite what a killed worker left of a line with spaces, which JSON ignores; call it with the lock held.

    No byte moves, so that workers that hold places in the file can go on. A line that was appended to such a part is
    kept. Raises PipelineError for a whole line that holds no entry.
    """
    if not path.exists():
        return
    with path.open("r+b") as stream:
        start = 0
        for number, line in enumerate(stream.readlines(), 1):
            num_torn = _num_torn(line, f"{path}:{number}")
            if num_torn:
                stream.seek(start)
                stream.write(b" " * num_torn)
            start += len(line)


def _num_torn(line: bytes, where: str) -> int:
    """How many bytes of a line stand before its entry; without an end of line, all."""
    if not line.endswith(b"\n"):
        return len(line)
    starts = [0, *(found.start() for found in re.finditer(rb"\{", line))]
    entry = next((start for start in starts if _is_entry(line[start:])), None)
    if entry is None:
        raise PipelineError(
            "a line of the study's journal is no entry", where=where, got=line[:80].decode(errors="replace"),
            fix="delete the line while no worker runs, or give the study a new study_name",
        )  # fmt: skip
    return entry


def _is_entry(text: bytes) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and "op_code" in found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the study's lock, its journal fixed: a file that only one can create, on NFS (version 3 and later) too.

    Not Optuna's symbolic link: it is as old as the file it points to, so who waits cannot tell one holder from the
    next, and where that file is missing waits for a dead one for ever, on a whole processor.
    """
    from optuna.storages.journal import JournalFileOpenLock

    # Not under the journal's own name: Optuna locks that for each line it appends, and would wait for us.
    lock = JournalFileOpenLock(str(folder / "claims"), grace_period=_LOCK_GRACE_SECONDS)
    lock.acquire()
    try:
        mend_journal(folder / JOURNAL)
        yield
    finally:
        lock.release()


def ask(study: optuna.Study, config: StudyConfig) -> optuna.Trial:
    """A new trial with its parameters; what is drawn follows from the seed, its number and the trials that ended."""
    import optuna

    # Only read, so the copies that Optuna makes of all trials by default are left out.
    number = len(study.get_trials(deepcopy=False))
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{number}".encode()).digest()[:4])
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    # A new sampler a trial: one that lives on draws by how often it was asked in this process.
    study.sampler = samplers[config.sampler]()
    return study.ask({name: distribution(item) for name, item in config.space.items()})


def distribution(item: Choices | SearchInterval) -> optuna.distributions.BaseDistribution:
    """A part of the space in Optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(item, Choices):
        return CategoricalDistribution(item.choices)
    if item.integer:
        return IntDistribution(int(item.low), int(item.high), log=item.log)
    return FloatDistribution(item.low, item.high, log=item.log)


def fail(study: optuna.Study, number: int, reason: str, diverged: bool = False) -> None:
    """End a trial without a value; `reason` is kept with it, and whether its training diverged."""
    _end(study, number, "FAIL", {_REASON: reason, _DIVERGED: diverged})


def behind(study: optuna.Study, config: StudyConfig, number: int, values: Sequence[float]) -> int | None:
    """The first of a trial's evaluations (1, 2, ...) at which the pruner ends it, of `values` so far; None to go on.

    What the study has not yet been told is told; call it with the study's lock held.
    """
    from optuna.pruners import HyperbandPruner, MedianPruner

    pruner = MedianPruner(config.startup_trials) if config.pruner == "median" else HyperbandPruner()
    trial = study.get_trials(deepcopy=False)[number]
    if trial.state.is_finished():  # by the worker that took this one for dead: its training need not go on
        return len(values)
    for step in range(len(trial.intermediate_values) + 1, len(values) + 1):
        # Through the storage: only `ask` gives a handle to report by, and another worker may have asked for this trial.
        # Optuna compares them by the metric's direction, and of every evaluation the higher value is the better one.
        study._storage.set_trial_intermediate_value(trial._trial_id, step, config.sign * values[step - 1])
        # One at a time: a pruner looks at the newest, and a slow look must decide as a quick one does.
        if pruner.prune(study, study.get_trials(deepcopy=False)[number]):
            return step
    return None


def prune(study: optuna.Study, number: int, reason: str) -> None:
    """End a trial whose evaluations were behind those of others."""
    _end(study, number, "PRUNED", {_REASON: reason})


def _end(study: optuna.Study, number: int, state: str, kept: Mapping[str, Any]) -> None:
    import optuna

    trial = study.get_trials(deepcopy=False)[number]
    for name, value in kept.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)
    study.tell(number, state=optuna.trial.TrialState[state])


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial in the order of the numbers: `number`, `state` (complete, fail, pruned, running), `value`, `params`.

    A failed or pruned one also has its `reason`, a failed one whether it `diverged`.
    """
    return [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value if trial.state.name == "COMPLETE" else None,
            "params": dict(sorted(trial.params.items())),
            **{key: trial.user_attrs[key] for key in (_REASON, _DIVERGED) if key in trial.user_attrs},
        }
        for trial in study.get_trials(deepcopy=False)
    ]


def last_reason(study: optuna.Study) -> str:
    """Why the newest failed trial failed."""
    reasons = [trial.user_attrs.get(_REASON, "") for trial in study.get_trials(deepcopy=False)]
    return next((reason for reason in reversed(reasons) if reason), "")
