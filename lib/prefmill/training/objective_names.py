"""The names of all objectives and what each needs, for configurations, which load no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from prefmill.core.errors import nearest

Need = Literal[
    "reference", "lengths", "label_smoothing", "errors", "noise_errors", "velocity_errors", "residuals", "soft_label",
    "heads", "bounds",
]  # fmt: skip
NEEDS: dict[str, frozenset[Need]] = {
    "sigmoid": frozenset({"reference"}),
    "hinge": frozenset({"reference"}),
    "robust": frozenset({"reference", "label_smoothing"}),
    "ipo": frozenset({"reference"}),
    "ipo_mean": frozenset({"reference", "lengths"}),
    "sigmoid_norm": frozenset({"reference", "lengths"}),
    "simpo": frozenset({"lengths"}),
    "sft": frozenset(),
    "spg": frozenset({"reference", "bounds"}),
    "espo": frozenset({"reference", "lengths", "bounds"}),
    "dpo": frozenset({"reference", "noise_errors"}),
    "flow_dpo": frozenset({"reference", "velocity_errors"}),
    "dspo": frozenset({"reference", "noise_errors", "residuals"}),
    "dspo_official_sdxl": frozenset({"reference", "noise_errors", "residuals"}),
    "dspo_rm": frozenset({"reference", "errors", "soft_label"}),
    "mapo": frozenset({"noise_errors"}),
    "bradley_terry_heads": frozenset({"heads"}),
}

# The metrics of every preference training, and the value of its last evaluation that each is.
VAL_METRICS = {"val_accuracy": "eval_accuracy", "val_f1": "eval_f1", "val_margin": "eval_margin"}

# The objectives that read a key; every other key of theirs is read by all.
READ_BY = {
    "beta": NEEDS.keys() - {"sft"},
    "label_smoothing": {"sigmoid", "sigmoid_norm", "robust", "spg"},
    "simpo_gamma": {"simpo"},
    "upper_power": {"spg"},
    "upper_weight": {"spg"},
    "clip": {"espo"},
}


OF_TEXT: frozenset[Need] = frozenset({"reference", "lengths", "label_smoothing"})  # what a text model supplies


def usable_with(supplies: frozenset[Need]) -> list[str]:
    """The objectives that need no more than this."""
    return [name for name, needs in NEEDS.items() if needs <= supplies]


def require_usable(names: list[str], supplies: frozenset[Need]) -> list[str]:
    """`names` as they are; raises ValueError for one that no objective has, or one that needs more."""
    usable = usable_with(supplies)
    for name in names:
        if name not in usable:
            fault = f"no objective '{name}'{nearest(name, usable)}"
            other = f"'{name}' is an objective of other stages (DPO of text is sigmoid, as in TRL)"
            raise ValueError(f"{other if name in NEEDS else fault}; objectives are {', '.join(usable)}")
    return names


def listed(given: Any) -> Any:
    """A word as a list of one, as other trainers' files and flags have it."""
    return [given] if isinstance(given, str) else given


ObjectiveNames = Annotated[list[str], BeforeValidator(listed)]
