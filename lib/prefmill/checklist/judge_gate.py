"""Whether a judge judges: the mass it puts on yes and no, how often it says yes, and whether its answers differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefmill.core.config import StrictConfig, runtime
from prefmill.core.errors import InputError
from prefmill.core.records import Answer

_DIGITS = 4
_MOST_WITH_FEW = 20  # of reviews: with fewer, all alike says nothing
_FEW_ITEMS = 2  # so many may well have one answer in every review


class JudgeGate(StrictConfig):
    """When a model is not believed; rules are never stopped. What was scored is kept for a rerun with another gate."""

    @property
    def mass_alone(self) -> JudgeGate:
        """The gate for texts that may well be alike: reviews of a poor model lack, of a good one have, every item."""
        return self.model_copy(update={"max_same_answer": 1.0})

    # Models that do not answer were measured at 0.02 and less; weak judges lie well above 0.1.
    min_answer_mass: float = runtime(
        0.1, ge=0, le=1, description="least mean probability that the model gives to yes and no together; 0: any"
    )
    # Of all items together: a single item may well be true of every review.
    max_same_answer: float = runtime(
        0.98, ge=0.5, le=1, description="most of all answers that may be the same, yes or no; 1: any"
    )
    after_reviews: int = runtime(50, ge=1, description="reviews after which it is judged, and again at the end")


@dataclass
class ItemCount:
    """One item's answers, summed; `mass` over those whose mass is known."""

    # Sums alone, so that memory does not grow with the corpus.
    num: int = 0
    yes: int = 0
    p_sum: float = 0.0
    p_squares: float = 0.0
    num_mass: int = 0
    mass_sum: float = 0.0
    stderr_squares: float = 0.0

    def add(self, answer: Answer) -> None:
        """Take in one answer."""
        p = answer["p_yes"]
        self.num += 1
        self.yes += answer["yes"]
        self.p_sum += p
        self.p_squares += p * p
        self.stderr_squares += answer.get("p_yes_stderr", 0.0) ** 2
        if "mass" in answer:
            self.num_mass += 1
            self.mass_sum += answer["mass"]

    def merged(self, other: ItemCount) -> ItemCount:
        """The sums over both."""
        return ItemCount(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def figures(self) -> dict[str, float | None]:
        """Yes share, mean and spread (standard deviation) of P(yes), mean mass on yes and no; None where unknown."""
        num = max(1, self.num)
        mean = self.p_sum / num
        return {
            "yes_share": round(self.yes / num, _DIGITS),
            "mean_p_yes": round(mean, _DIGITS),
            # Rounding may leave the variance of equal numbers a little below 0.
            "spread": round(math.sqrt(max(0.0, self.p_squares / num - mean * mean)), _DIGITS),
            "answer_mass": round(self.mass_sum / self.num_mass, _DIGITS) if self.num_mass else None,
            "p_yes_stderr": round(math.sqrt(self.stderr_squares / num), _DIGITS) if self.stderr_squares else None,
        }


@dataclass
class AnswerCounts:
    """The answers to every item so far."""

    items: dict[str, ItemCount] = field(default_factory=dict)
    num_reviews: int = 0
    num_level: int = 0  # reviews with one and the same P(yes) for all of several items

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Take in a review's answers."""
        self.num_reviews += 1
        self.num_level += len(answers) > _FEW_ITEMS and len({answer["p_yes"] for answer in answers.values()}) == 1
        for name, answer in answers.items():
            self.items.setdefault(name, ItemCount()).add(answer)

    def overall(self) -> dict[str, Any]:
        """The figures over all items, and the items that were answered alike for every review."""
        total = ItemCount()
        for count in self.items.values():
            total = total.merged(count)
        alike = [name for name, count in self.items.items() if count.yes in (0, count.num)]
        return {**total.figures(), "same_throughout": sorted(alike) if self.num_reviews >= _MOST_WITH_FEW else []}

    def by_item(self, names: Iterable[str]) -> dict[str, dict[str, float | None]]:
        """Each item's figures."""
        return {name: self.items.get(name, ItemCount()).figures() for name in names}


def in_words(found: Mapping[str, Any]) -> str:
    """`this judge says yes to 98% and puts 2% of its mass on an answer`, from `overall`'s figures."""
    mass = found["answer_mass"]
    puts = "" if mass is None else f" and puts {_percent(mass)} of its mass on an answer"
    return f"this judge says yes to {_percent(found['yes_share'])}{puts}"


def check(counts: AnswerCounts, gate: JudgeGate, key: str = "judge") -> None:
    """Raise InputError where the answers so far are not to be believed; `key` is where the gate is configured."""
    found = counts.overall()
    mass, yes = found["answer_mass"], found["yes_share"]
    if mass is not None and mass < gate.min_answer_mass:
        raise _not_believed(
            in_words(found), f"at least {_percent(gate.min_answer_mass)} ({key}.min_answer_mass)",
            f"use a model that follows instructions, or another chat template, or set {key}.min_answer_mass=0",
        )  # fmt: skip
    if counts.num_reviews < _MOST_WITH_FEW:
        return
    most = f"at most {_percent(gate.max_same_answer)} of one answer ({key}.max_same_answer)"
    if max(yes, 1 - yes) > gate.max_same_answer:
        raise _not_believed(
            in_words(found), most,
            f"use a stronger model, or items that tell reviews apart, or set {key}.max_same_answer=1",
        )  # fmt: skip
    if (level := counts.num_level / counts.num_reviews) > gate.max_same_answer:
        raise _not_believed(
            f"all items of a review have one and the same P(yes), in {_percent(level)} of the reviews", most,
            f"look for a cache before the server that leaves the question out, or set {key}.max_same_answer=1",
        )  # fmt: skip


def warnings(found: Mapping[str, Any], num_items: int) -> list[str]:
    """What a reader of the scores must know of their judge, a sentence each."""
    said = []
    if (alike := found["same_throughout"]) and len(alike) < num_items:
        shown = ", ".join(alike[:5]) + (f" and {len(alike) - 5} more" if len(alike) > 5 else "")
        said.append(f"{len(alike)} of {num_items} items are answered alike for every review: {shown}")
    # A real model's is below: such a server normalises over the two. Of sampled answers all may be one of them.
    if found["answer_mass"] == 1 and found["p_yes_stderr"] is None:
        said.append("the server hides the mass on yes and no: start it without --logprobs-mode processed_logprobs")
    if found["answer_mass"] is not None and found["answer_mass"] < 0.5:
        said.append(f"{in_words(found)}: look at its template, or take another model")
    return said


def _not_believed(got: str, expected: str, fix: str) -> InputError:
    return InputError(
        "the judge is not to be believed", got=got, expected=expected, fix=f"{fix}; what is scored is kept"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"
