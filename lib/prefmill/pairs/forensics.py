"""What became of every pair over a training: its margins, and which pairs look wrong.

Reads only the margins log that preference training writes; nothing here needs the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from prefmill.core.errors import InputError
from prefmill.core.files import read_appended, write_atomic
from prefmill.core.statistics import correlation

Suspicion = Literal["never_learned", "forgotten", "length_only"]
SUSPICIONS: Mapping[Suspicion, str] = {
    "never_learned": "its margin was never above 0 after the first time it was trained on",
    "forgotten": "its margin was above 0 and is not any more",
    "length_only": "its margin is above 0, but no more than the difference in length alone predicts",
}


class Sighting(NamedTuple):
    """A pair at one optimizer step, before that step was taken."""

    step: int
    epoch: int
    margin: float
    gradient_coefficient: float


@dataclass(frozen=True)
class History:
    """All sightings of one pair by step; lengths in tokens."""

    pair_id: str
    sightings: tuple[Sighting, ...]
    chosen_length: float
    rejected_length: float

    @property
    def last(self) -> float:
        """Its margin when it was last seen."""
        return self.sightings[-1].margin

    @property
    def length_difference(self) -> float:
        """Tokens by which the chosen side is longer."""
        return self.chosen_length - self.rejected_length


class LengthEffect(NamedTuple):
    """What length says about last margins: margin = slope x (tokens the chosen side is longer), and correlation."""

    slope: float
    correlation: float
    num_pairs: int

    @property
    def is_real(self) -> bool:
        """Whether longer chosen sides have higher margins beyond two standard errors of no correlation."""
        # Without a relation the standard error of a correlation of n points is about 1 / sqrt(n).
        return self.num_pairs > 0 and self.correlation > 2 / self.num_pairs**0.5


class Suspect(NamedTuple):
    """A pair that looks wrong, and why."""

    history: History
    reasons: tuple[Suspicion, ...]


def margins_logs(run_logs: Path, task: str | None = None) -> list[Path]:
    """The margins logs of every rank of a preference training, which `task` names as TASK or STAGE:TASK.

    Raises InputError where there is none, or several fit.
    """
    found = {f"{path.parts[-3]}:{path.parts[-2]}": path for path in sorted(run_logs.glob("*/*/margins"))}
    tasks = {key: path for key, path in found.items() if task in (None, key, key.split(":")[1])}
    if not tasks:
        raise InputError(
            "no preference training has left margins here", where=run_logs, got=", ".join(found) or None,
            fix="name a run whose dpo has begun: prefmill pairs RUN",
        )  # fmt: skip
    if len(tasks) > 1:
        raise InputError(
            "several preference trainings in this run", where=run_logs, got=", ".join(tasks), fix="choose one by --task"
        )
    (folder,) = tasks.values()
    return sorted(folder.glob("margins_log*.jsonl"))


def read_histories(logs: Iterable[Path]) -> dict[str, History]:
    """The history of every pair, by its id; of a step that was taken twice, after a kill, the later row counts."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for path in logs:
        for row in read_appended(path, step=int, pair_id=str):
            rows.setdefault(row["pair_id"], {})[row["step"]] = row
    return {pair_id: _history(pair_id, [steps[step] for step in sorted(steps)]) for pair_id, steps in rows.items()}


def length_effect(histories: Iterable[History]) -> LengthEffect:
    """Least squares through the origin of last margins on length differences; zeros where lengths do not differ."""
    points = np.array([(item.length_difference, item.last) for item in histories]).reshape(-1, 2)
    lengths, margins = points.T
    # No intercept: sides of one length leave nothing for length to explain.
    squares = float(lengths @ lengths)
    slope = float(lengths @ margins) / squares if squares else 0.0
    return LengthEffect(slope, correlation(lengths, margins), len(points))


def suspicions(history: History, effect: LengthEffect) -> tuple[Suspicion, ...]:
    """Why a pair looks wrong, or nothing. A pair seen once has not shown yet whether it was learned."""
    # The first sighting is from before the pair's first update: it tells nothing of what was learned.
    later = [sighting.margin for sighting in history.sightings[1:]]
    predicted = effect.slope * history.length_difference
    found: list[Suspicion] = []
    if later and max(later) <= 0:
        found.append("never_learned")
    elif later and later[-1] <= 0:
        found.append("forgotten")
    if later and effect.is_real and 0 < history.last <= predicted:
        found.append("length_only")
    return tuple(found)


def suspects(histories: Mapping[str, History]) -> list[Suspect]:
    """The pairs that look wrong, the lowest last margin first."""
    effect = length_effect(histories.values())
    found = [Suspect(item, suspicions(item, effect)) for item in histories.values()]
    wrong = [suspect for suspect in found if suspect.reasons]
    return sorted(wrong, key=lambda item: (item.history.last, item.history.pair_id))


def write_exclude(path: Path, found: Sequence[Suspect]) -> None:
    """Write the suspects' ids as build_datasets reads them in `exclude`, with the reason above each."""
    lines = ["# Pairs to leave out: `exclude` of build_datasets. Lines with # do not count; delete what should stay."]
    for suspect in found:
        margins = " ".join(f"{sighting.margin:.3g}" for sighting in suspect.history.sightings)
        lines += [f"# {', '.join(suspect.reasons)}; margins {margins}", suspect.history.pair_id]
    write_atomic(path, "\n".join(lines) + "\n")


def _history(pair_id: str, rows: Sequence[Mapping[str, Any]]) -> History:
    sightings = tuple(Sighting(row["step"], row["epoch"], row["margin"], row["gradient_coefficient"]) for row in rows)
    return History(pair_id, sightings, rows[-1]["chosen_length"], rows[-1]["rejected_length"])
