"""An Optuna study that workers on several machines share through a journal on a common disk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import ConfigError
from prefmill.core.files import digest_json
from prefmill.sweep.config import Choices, Interval, StudyConfig

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
_DEFINITION, _REASON = "definition", "reason"
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the study's lock: a file that only one can create, on network file systems too (NFS version 3 and later).

    Not Optuna's symbolic link: it is as old as the file it points to, so who waits cannot tell one holder from the
    next, and where that file is missing waits for a dead one for ever, on a whole processor.
    """
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(str(folder / "claims"), grace_period=_LOCK_GRACE_SECONDS)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def ask(study: optuna.Study, config: StudyConfig) -> optuna.Trial:
    """A new trial with its parameters; what is drawn follows from the seed, its number and the trials that ended."""
    import optuna

    number = len(study.get_trials(deepcopy=False))
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{number}".encode()).digest()[:4])
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    study.sampler = samplers[config.sampler]()
    return study.ask({name: distribution(item) for name, item in config.space.items()})


def distribution(item: Choices | Interval) -> optuna.distributions.BaseDistribution:
    """A part of the space in Optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(item, Choices):
        return CategoricalDistribution(item.choices)
    if item.integer:
        return IntDistribution(int(item.low), int(item.high), log=item.log)
    return FloatDistribution(item.low, item.high, log=item.log)


def fail(study: optuna.Study, number: int, reason: str) -> None:
    """End a trial without a value; `reason` is kept with it."""
    import optuna

    trial = study.get_trials(deepcopy=False)[number]
    study._storage.set_trial_user_attr(trial._trial_id, _REASON, reason)
    study.tell(number, state=optuna.trial.TrialState.FAIL)


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial in the order of the numbers: `number`, `state` (complete, fail, running), `value`, `params`."""
    return [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value if trial.state.name == "COMPLETE" else None,
            "params": dict(sorted(trial.params.items())),
        }
        for trial in study.get_trials(deepcopy=False)
    ]


def last_reason(study: optuna.Study) -> str:
    """Why the newest failed trial failed."""
    reasons = [trial.user_attrs.get(_REASON, "") for trial in study.get_trials(deepcopy=False)]
    return next((reason for reason in reversed(reasons) if reason), "")
