"""The configuration of a sweep: which stage, over what, judged by what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from prefmill.core.config import ExternalPath, StrictConfig, later, runtime


class Choices(StrictConfig):
    """One of these values."""

    choices: list[bool | int | float | str] = Field(min_length=2)


class SearchInterval(StrictConfig):
    """A number from `low` to `high`, both included; uniform, or log-uniform with `log`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _is_an_interval(self) -> SearchInterval:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with log")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("an integer lies between integers")
        return self


def _kind(item: Any) -> str:
    """Which of the two is meant: pydantic would list the faults of both, by names of its own."""
    has_choices = isinstance(item, Choices) or (isinstance(item, Mapping) and "choices" in item)
    return "listed" if has_choices else "interval"


SpaceItem = Annotated[
    Annotated[Choices, Tag("listed")] | Annotated[SearchInterval, Tag("interval")], Discriminator(_kind)
]


class TrialJudge(StrictConfig):
    """A stage that runs on every trial's output, given to it as `input`; the metric is then one of its own."""

    stage: str = Field(min_length=1)
    config: ExternalPath | None = None
    set: dict[str, Any] = {}
    input: str = Field(min_length=1)


class StudyConfig(StrictConfig):
    """Keys of the stage sweep; `stage`, `config`, `set`, `space`, `metric`, `judge` and `seed` define a study."""

    stage: str = Field(min_length=1, description="the training stage that every trial runs")
    config: ExternalPath | None = Field(None, description="its configuration file")
    set: dict[str, Any] = Field({}, description="keys laid over that file")
    space: dict[str, SpaceItem] = Field(
        min_length=1,
        description="what a trial draws, by the stage's key: {choices: [...]}, or {low, high} with log, integer",
    )
    metric: str = Field(min_length=1, description="of the finished stage, or of the judge: what is to be best")
    direction: Literal["maximize", "minimize"] = Field("maximize", description="which way is best")
    judge: TrialJudge | None = Field(None, description="a stage that evaluates what a trial trained")
    study_name: str = Field("study", pattern=r"[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names the study's folder")
    n_trials: int = Field(20, ge=1, description="trials of the study, over all workers; raise it to go on")
    sampler: Literal["tpe", "random"] = Field("tpe", description="tpe learns from the trials that have ended")
    seed: int = Field(0, ge=0, description="of what trials draw")
    pruner: Literal["none", "median", "hyperband"] = later("none", description="ends trials that others are ahead of")
    prune_by: str = later("eval_accuracy", description="the evaluations' value that a pruner compares")
    startup_trials: int = later(5, ge=1, description="that median leaves to end before it prunes")
    worker: int = runtime(0, ge=0, description="array key: which of the workers this is")
    heartbeat_seconds: float = runtime(10.0, gt=0, description="between signs of life of a running trial")
    stale_seconds: float = runtime(120.0, gt=0, description="without one before others take the trial over")
    max_attempts: int = runtime(3, ge=1, description="of a trial whose workers die before a new checkpoint")

    @model_validator(mode="after")
    def _comparable(self) -> StudyConfig:
        # That of held-out chats is one: it has no beta, and is measured on the same tokens for every learning rate.
        for name in ("metric", "prune_by"):
            if "loss" in (said := getattr(self, name)) and (name, said) != ("metric", "val_loss"):
                raise ValueError(
                    f"{name}: losses of different beta or learning rate cannot be compared; use a held-out F1, or of "
                    "sft and mdlm_sft val_loss"
                )
        if self.metric == "val_loss" and self.direction == "maximize":
            raise ValueError("metric: of val_loss the least is best, set direction: minimize")
        reads = {"median": ("startup_trials", "prune_by"), "hyperband": ("prune_by",), "none": ()}[self.pruner]
        if unread := [key for key in self.changed("startup_trials", "prune_by") if key not in reads]:
            raise ValueError(f"{', '.join(unread)}: no effect with pruner: {self.pruner}, leave it out")
        # One beat that is late on a slow disk must not cost a living worker its trial.
        if self.stale_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("stale_seconds must be at least 2 x heartbeat_seconds")
        return self

    @property
    def sign(self) -> int:
        """Times a metric: the more the better."""
        return 1 if self.direction == "maximize" else -1

    def definition(self) -> dict[str, Any]:
        """What every trial of a study has in common."""
        from prefmill.core.config import identity

        # Not n_trials and nothing of the workers: a study may go on with more of both.
        shared = {"stage", "config", "set", "space", "metric", "direction", "judge", "seed", "sampler"}
        shared |= {"pruner", "prune_by", "startup_trials"}
        return {name: value for name, value in identity(self).items() if name in shared}


def corners(space: dict[str, Choices | SearchInterval]) -> list[dict[str, Any]]:
    """Parameters that together take every end and choice of the space, to see that the stage accepts them."""
    ends = {name: _ends(item) for name, item in space.items()}
    # Not every combination, whose number grows with each key: a stage checks most keys by themselves.
    return [
        {name: values[min(place, len(values) - 1)] for name, values in ends.items()}
        for place in range(max(map(len, ends.values())))
    ]


def _ends(item: Choices | SearchInterval) -> list[Any]:
    if isinstance(item, Choices):
        return list(item.choices)
    if item.integer:
        return [math.floor(item.low), math.floor(item.high)]
    return [item.low, item.high]
