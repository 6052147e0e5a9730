"""Checks that need one row only: pure functions from an example to what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from prefmill.core.records import IMAGE_MARKER
from prefmill.datasets.examples import CheckedRow
from prefmill.reviews.prompt import asked_scale
from prefmill.store.pictures import ImageError, open_image


def rating_problems(example: CheckedRow) -> Iterator[str]:
    """A completion without a rating on the prompt's scale in its last line, or with nothing before it."""
    for answer in example.answers:
        if answer.rating is None:
            low, high = asked_scale(example.prompt)
            yield f"no last line 'Rating: N' with N from {low:g} to {high:g}, but {answer.completion[-40:]!r}"
        elif not answer.text:
            yield "no review before the rating"


def contrast_problems(example: CheckedRow, min_rating_diff: float, min_checkmark_diff: float) -> Iterator[str]:
    """A pair whose differences are too small, or whose rating_diff is not what its two completions say."""
    if example.rating_diff is None or example.checkmark_diff is None:
        return
    chosen, rejected = (answer.rating for answer in example.answers)
    # A missing rating is told by rating_problems, once.
    if (
        chosen is not None
        and rejected is not None
        and not math.isclose(
            chosen - rejected,
            example.rating_diff,
            abs_tol=1e-4,  # completions give six digits
        )
    ):
        yield f"rating_diff is {example.rating_diff:g}, but the ratings are {chosen:g} and {rejected:g}"
    if example.rating_diff < min_rating_diff:
        yield f"rating_diff is {example.rating_diff:g}, under {min_rating_diff:g}"
    if example.checkmark_diff < min_checkmark_diff:
        yield f"checkmark_diff is {example.checkmark_diff:g}, under {min_checkmark_diff:g}"
    if example.answers[0].text.split() == example.answers[1].text.split():
        yield "chosen and rejected are the same text"


def marker_problems(example: CheckedRow) -> Iterator[str]:
    """Image markers that are not as many as the images, or that stand in a completion."""
    markers = example.prompt.count(IMAGE_MARKER)
    if markers != len(example.images):
        yield f"{markers} {IMAGE_MARKER} markers for {len(example.images)} images"
    if any(IMAGE_MARKER in answer.completion for answer in example.answers):
        yield f"{IMAGE_MARKER} in a completion"


def image_problems(example: CheckedRow, folder: Path) -> Iterator[str]:
    """Images that are missing, lead out of the artifact or cannot be read."""
    for name in example.images:
        problem = unreadable(folder, name)
        if problem:
            yield f"{name}: {problem}"


@lru_cache(maxsize=4096)  # the rows of a paper stand together and share its images
def unreadable(folder: Path, name: str) -> str | None:
    """Why the image `name` below `folder` cannot be read, or None."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "not a path below the dataset folder"
    try:
        open_image(folder / name)  # a header can be whole where the pixels are cut off
    except ImageError as error:
        return ": ".join(str(part) for part in (error.what, error.details["got"]) if part)
    return None
