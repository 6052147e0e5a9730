"""Which images are compared, and the ratings that a program gives them."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prefmill.core.errors import InputError
from prefmill.core.image_rows import DIMENSIONS, HEADS, Dimension, Rating
from prefmill.images.collection import GoodImage, Quarantine
from prefmill.store.missing import Progress, in_batches, kept_rows
from prefmill.store.pictures import open_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Scorer = Callable[[Sequence[str], Sequence[Path]], NDArray[np.float32]]

_BLOCK = 64  # images scored between two that are kept


@dataclass(frozen=True)
class Matchup:
    """Two images of a prompt to compare, the smaller id first."""

    first: GoodImage
    second: GoodImage

    @property
    def prompt_id(self) -> str:
        return self.first.source.prompt_id

    @property
    def matchup_id(self) -> str:
        """Names the two images."""
        return f"{self.first.source.image_id}:{self.second.source.image_id}"

    def placed(self, seed: int, rater: str) -> tuple[GoodImage, GoodImage]:
        """Left and right for one rater: at random, and the same whenever that rater is shown the pair."""
        # By rater too: a habit of choosing one side then evens out over raters.
        return (self.first, self.second) if draw(seed, rater, self.matchup_id) % 2 else (self.second, self.first)


def draw(seed: int, *names: str) -> int:
    """A random number that follows from its arguments alone."""
    # Joined by a byte that no name holds: ("a", "bc") and ("ab", "c") must not give the same number.
    return int.from_bytes(hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()[:8])


def plan_matchups(
    images: Iterable[GoodImage], most_per_prompt: int | None, seed: int, quarantine: Quarantine | None = None
) -> list[Matchup]:
    """Every two different images of a prompt, or `most_per_prompt` of them drawn at random; sorted.

    Raises InputError when there are none, which tells what was set aside.
    """
    by_prompt: dict[str, list[GoodImage]] = defaultdict(list)
    for image in images:
        by_prompt[image.source.prompt_id].append(image)
    found = []
    for prompt_id in sorted(by_prompt):
        ordered = sorted(by_prompt[prompt_id], key=lambda image: image.source.image_id)
        every = [Matchup(a, b) for a, b in itertools.combinations(ordered, 2) if a.pixels_sha256 != b.pixels_sha256]
        # By a number per pair, not by shuffling: a further image leaves the order of the other pairs as it was.
        drawn = sorted(every, key=lambda item: draw(seed, item.matchup_id))[:most_per_prompt]
        found += sorted(drawn, key=lambda item: item.matchup_id)
    if not found:
        are_equal = any(len(held) > 1 for held in by_prompt.values())
        where, got = None, f"{sum(map(len, by_prompt.values()))} images of {len(by_prompt)} prompts"
        if quarantine and quarantine.rows:
            where, got = quarantine.rows[0]["where"], f"{got}; set aside: {quarantine.reasons()}"
        raise InputError(
            "the images of each prompt are the same picture" if are_equal else "no two images of one prompt",
            where=where, got=got, fix="make at least two images per prompt that differ: `seeds` of generate_images, or "
            "lines of images.csv; put whole pictures where some were set aside",
        )  # fmt: skip
    return found


def rate_by_scores(
    matchups: Sequence[Matchup], scores: Mapping[str, Mapping[Dimension, float]], rater: str,
    dimensions: Sequence[Dimension], tie_margin: float, seed: int,
) -> list[Rating]:  # fmt: skip
    """The ratings of a program whose `scores` by image id are given; `overall` is the mean of the others.

    The side an image stands on is random, as for people. Scores that differ by `tie_margin` or less are a tie.
    """
    ratings = []
    for matchup in matchups:
        left, right = (image.source.image_id for image in matchup.placed(seed, rater))
        for dimension in dimensions:
            margin = scores[left][dimension] - scores[right][dimension]
            choice = choice_of(margin, tie_margin)
            ratings.append(Rating(
                prompt_id=matchup.prompt_id, left=left, right=right, rater=rater, dimension=dimension, choice=choice
            ))  # fmt: skip
    return ratings


def score_all(
    images: Sequence[GoodImage], scorer: Scorer, folder: Path, progress: Progress
) -> dict[str, dict[Dimension, float]]:
    """Each image's scores by dimension, `overall` their mean; kept in `folder` as they come, to resume from."""

    def score(block: Sequence[GoodImage]) -> list[list[float]]:
        found = scorer([image.source.prompt for image in block], [image.source.path for image in block])
        return [[float(value) for value in row] for row in found]

    rows = kept_rows(folder, "scores", in_batches(images, _BLOCK), score, progress, "images scored")
    scores: dict[str, dict[Dimension, float]] = {}
    for image, row in zip(images, rows, strict=True):
        by_head: dict[Dimension, float] = dict(zip(HEADS, row, strict=True))
        scores[image.source.image_id] = {**by_head, "overall": sum(row) / len(row)}
    return scores


def sharpness(prompts: Sequence[str], paths: Sequence[Path]) -> NDArray[np.float32]:
    """[N, 5]: the logarithm of the variance of each image's Laplacian, on every dimension alike.

    It tells a picture from a blurred copy of it, and knows nothing of prompts: a stand-in for a rater in demos.
    """
    import numpy as np

    def measure(grey: NDArray[np.float64]) -> float:
        # The edge is repeated: zeros around a bright picture would count as its sharpest line.
        edges = np.pad(grey, 1, mode="edge")
        around = edges[:-2, 1:-1] + edges[2:, 1:-1] + edges[1:-1, :-2] + edges[1:-1, 2:]
        return float(np.log1p((around - 4 * grey).var()))

    return _measured(prompts, paths, measure)


def brightness(prompts: Sequence[str], paths: Sequence[Path]) -> NDArray[np.float32]:
    """[N, 5]: the mean of each image's grey levels, 0 to 255, on every dimension alike: a stand-in too."""
    return _measured(prompts, paths, lambda grey: float(grey.mean()))


def _measured(
    prompts: Sequence[str], paths: Sequence[Path], measure: Callable[[NDArray[np.float64]], float]
) -> NDArray[np.float32]:
    import numpy as np

    assert len(prompts) == len(paths)
    values = [measure(np.asarray(open_image(path).convert("L"), dtype=np.float64)) for path in paths]
    return np.repeat(np.array(values, dtype=np.float32)[:, None], len(HEADS), axis=1)


def in_order(ratings: Iterable[Rating]) -> list[Rating]:
    """Ratings as a file holds them: by prompt, images, rater and dimension."""
    return sorted(ratings, key=lambda row: (
        row["prompt_id"], *sorted((row["left"], row["right"])), row["rater"], DIMENSIONS.index(row["dimension"])
    ))  # fmt: skip


def choice_of(margin: float, tie_margin: float = 0.0) -> Literal["left", "right", "tie"]:
    """The choice that follows from how much better the left image is."""
    if abs(margin) <= tie_margin:
        return "tie"
    return "left" if margin > 0 else "right"
