"""Sample prompts, pictures, ratings and pairs that prefmill draws itself, whose better picture is known."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from prefmill.core.files import write_atomic
from prefmill.core.image_rows import HEADS, Dimension, ImagePair, ImageSplit, Rating
from prefmill.store.jsonl import write_jsonl

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32
_COLOURS = {
    "red": (200, 40, 40), "blue": (50, 70, 200), "green": (40, 150, 60), "yellow": (230, 200, 40),
    "white": (240, 240, 240), "black": (20, 20, 20),
}  # fmt: skip
_SHAPES = ("circle", "square", "triangle")
_RATERS = ("ada", "ben", "cleo")
_TIE_SHARE, _SKIP_SHARE = 0.8, 0.1  # of the answers on a dimension in which two pictures do not differ


@dataclass(frozen=True)
class Scene:
    """Two things side by side on a ground."""

    left: tuple[str, str]
    right: tuple[str, str]
    ground: tuple[int, int, int]

    @property
    def prompt(self) -> str:
        """What the picture is to show."""
        return f"a {' '.join(self.left)} to the left of a {' '.join(self.right)}"


def write_samples(
    folder: Path, num_prompts: int, pairs_per_prompt: int, held_out_share: float, seed: int
) -> dict[str, int]:
    """Write `prompts.csv`, `images/` with `images.csv`, `ratings.csv` and `pairs.jsonl`; returns their counts.

    Every pair is a good picture and one that is worse on one dimension. Three raters compare them on each dimension,
    so that ratings.csv with images.csv is also a source for build_image_pairs. The last prompts are held out: half of
    `held_out_share` for validation, half for testing.
    """
    draw = random.Random(f"samples:{seed}")
    pairs: list[ImagePair] = []
    ratings: list[Rating] = []
    images: list[tuple[str, str, str]] = []
    prompts: list[tuple[str, str]] = []
    for number, scene in zip(range(num_prompts), _scenes(draw), strict=False):
        prompt_id = f"sample-{number:03}"
        prompts.append((prompt_id, scene.prompt))
        split = _split(number, num_prompts, held_out_share)
        for index in range(pairs_per_prompt):
            worse_on = HEADS[(number + index) % len(HEADS)]
            names = [f"images/{prompt_id}/{2 * index + side}.png" for side in range(2)]
            # A coin: neither a name nor a place may tell which picture is the better one.
            good_first = draw.random() < 0.5
            good, bad = names if good_first else names[::-1]
            (folder / good).parent.mkdir(parents=True, exist_ok=True)
            draw_scene(scene, None, draw).save(folder / good)
            draw_scene(scene, worse_on, draw).save(folder / bad)
            images += [(prompt_id, scene.prompt, name) for name in names]
            answers = list(_answers(prompt_id, names, good_first, worse_on, draw))
            ratings += answers
            labels = _labels(answers, good)
            pairs.append(ImagePair(
                pair_id=f"{prompt_id}-{index}", prompt_id=prompt_id, prompt=scene.prompt, preferred=good, rejected=bad,
                labels=labels, weight=1 / pairs_per_prompt, split=split,
            ))  # fmt: skip
    write_jsonl(folder / "pairs.jsonl", pairs)
    _write_csv(folder / "prompts.csv", ("prompt_id", "prompt"), prompts)
    _write_csv(folder / "images.csv", ("prompt_id", "prompt", "file"), images)
    columns = ("prompt_id", "left", "right", "rater", "dimension", "choice")
    _write_csv(folder / "ratings.csv", columns, [[str(row.get(name)) for name in columns] for row in ratings])
    return {"prompts": len(prompts), "images": len(images), "ratings": len(ratings), "pairs": len(pairs)}


def draw_scene(scene: Scene, worse_on: Dimension | None, draw: random.Random) -> Image:
    """A picture of `scene`, a little different each time; with a fault on the dimension `worse_on`."""
    from PIL import Image

    left, right = scene.left, scene.right
    if worse_on == "spatial":
        left, right = right, left
    if worse_on == "iconographic":
        left = (left[0], _SHAPES[(_SHAPES.index(left[1]) + 1) % len(_SHAPES)])
    image = Image.new("RGB", (SIDE, SIDE), scene.ground)
    for place, (colour, shape) in ((0.27, left), (0.73, right)):
        _draw_thing(image, place, colour, shape, outlined=worse_on == "style", draw=draw)
    return _FAULTS[worse_on](image, draw) if worse_on in _FAULTS else image


def draw_lit(draw: random.Random) -> tuple[str, Image]:
    """A prompt and a picture of it: one thing on a ground of another colour, in anything from dim to full light."""
    from PIL import Image as Images
    from PIL import ImageEnhance

    thing, ground = draw.sample(sorted(_COLOURS), 2)
    shape = draw.choice(_SHAPES)
    picture = Images.new("RGB", (SIDE, SIDE), _COLOURS[ground])
    _draw_thing(picture, 0.5, thing, shape, outlined=False, draw=draw)
    lit = ImageEnhance.Brightness(picture).enhance(draw.uniform(0.3, 1))
    return f"a {thing} {shape} on a {ground} ground", lit


def _scenes(draw: random.Random) -> Iterator[Scene]:
    """One after the other, each with a prompt of its own: one that is held out must not be trained on."""
    known = set[str]()
    while True:
        if (scene := _scene(draw)).prompt not in known:
            known.add(scene.prompt)
            yield scene


def _scene(draw: random.Random) -> Scene:
    first, second = draw.sample(sorted(_COLOURS), 2)
    ground = (draw.randint(90, 170), draw.randint(90, 170), draw.randint(90, 170))
    return Scene((first, draw.choice(_SHAPES)), (second, draw.choice(_SHAPES)), ground)


def _draw_thing(image: Image, place: float, colour: str, shape: str, outlined: bool, draw: random.Random) -> None:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(image)
    x, y = place * SIDE + draw.uniform(-1, 1), SIDE / 2 + draw.uniform(-4, 4)
    size = draw.uniform(0.15, 0.2) * SIDE
    line, fill = _COLOURS[colour], None if outlined else _COLOURS[colour]
    box = (x - size, y - size, x + size, y + size)
    if shape == "circle":
        pen.ellipse(box, fill, line)
    elif shape == "square":
        pen.rectangle(box, fill, line)
    else:
        pen.polygon([(x, y - size), (x + size, y + size), (x - size, y + size)], fill, line)


def _blurred(image: Image, draw: random.Random) -> Image:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(draw.uniform(1.2, 2.2)))


def _grainy(image: Image, draw: random.Random) -> Image:
    import numpy as np
    from PIL import Image as Images

    # Seeded from `draw`, so that one seed decides everything; random itself has no arrays.
    grain = np.random.default_rng(draw.randrange(2**32)).normal(0, 30, (SIDE, SIDE, 1))
    return Images.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


_FAULTS: Mapping[Dimension | None, Callable[[Image, random.Random], Image]] = {
    "fidelity": _blurred,
    "material": _grainy,
}


def _answers(
    prompt_id: str, names: Sequence[str], good_first: bool, worse_on: Dimension, draw: random.Random
) -> Iterator[Rating]:
    """Three raters who see what is worse, call most of the rest ties, and are shown the sides in any order."""
    for rater in _RATERS:
        turned = draw.random() < 0.5
        left, right = (names[1], names[0]) if turned else (names[0], names[1])
        for dimension in get_args(Dimension):
            if dimension in (worse_on, "overall"):
                choice = "left" if good_first != turned else "right"
            else:
                choice = _undecided(draw)
            yield Rating(
                prompt_id=prompt_id, left=left, right=right, rater=rater, dimension=dimension,
                choice=choice,  # type: ignore[typeddict-item]
            )  # fmt: skip


def _undecided(draw: random.Random) -> str:
    chance = draw.random()
    if chance < _TIE_SHARE:
        return "tie"
    return "skip" if chance < _TIE_SHARE + _SKIP_SHARE else draw.choice(("left", "right"))


def _labels(answers: Sequence[Rating], good: str) -> dict[str, float | None]:
    """The share of the votes for the good picture on every dimension, a tie half a vote; None without a vote."""
    # A skip is no vote: the rater did not say that the pictures are alike.
    labels: dict[str, float | None] = {}
    for dimension in get_args(Dimension):
        votes = [_vote(row, good) for row in answers if row["dimension"] == dimension and row["choice"] != "skip"]
        labels[dimension] = round(sum(votes) / len(votes), 4) if votes else None
    return labels


def _vote(row: Rating, good: str) -> float:
    if row["choice"] == "tie":
        return 0.5
    return float((row["left"] == good) == (row["choice"] == "left"))


def _split(number: int, num_prompts: int, held_out_share: float) -> ImageSplit:
    place = num_prompts - 1 - number
    if place < num_prompts * held_out_share / 2:
        return "test"
    return "val" if place < num_prompts * held_out_share else "train"


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # csv ends lines with \r\n unless told otherwise.
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([columns, *rows])
    write_atomic(path, stream.getvalue())
