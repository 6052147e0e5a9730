"""Images and ratings as people have them: a folder with images.csv, and ratings.csv."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

from prefmill.core.errors import InputError
from prefmill.core.image_rows import DIMENSIONS, Dimension, GeneratedImage, Rating
from prefmill.images.collection import Collection, SourceImage
from prefmill.images.prompts import (
    PROMPT_TOO,
    Line,
    is_safe,
    one_spelling,
    prompt_id_of,
    read_captions,
    read_table,
    safe_name,
    with_slashes,
)
from prefmill.images.rating import choice_of
from prefmill.store.jsonl import read_jsonl
from prefmill.store.picture_formats import FORMATS
from prefmill.store.pictures import on_disk
from prefmill.store.row_files import RATERS

_log = logging.getLogger(__name__)
_PICTURES = {*FORMATS.values(), ".jpeg", ".tiff"}
IMAGES_FILES = ("images.csv", "images.jsonl")
_METADATA = ("metadata.csv", "metadata.jsonl")  # ImageFolder's
_FILE = ("file_name", "filename", "image_path")
_IMAGE_TOO = {**PROMPT_TOO, "file": (*_FILE, "image")}
_SCORE_TOO = {"image": (*_FILE, "file"), "rater": RATERS}
_RATING_TOO = {"choice": ("preference", "winner", "pairwise", "pw"), "rater": RATERS}
RATING_COLUMNS = ("left", "right", "rater", "dimension", "choice")
# Our own names first, then those of tables filled in by hand.
SIDES = (
    ("left", "right"), ("image_a", "image_b"), ("image_0", "image_1"), ("image_1", "image_2"), ("image1", "image2"),
    ("image0", "image1"), ("left_image", "right_image"), ("image_left", "image_right"),
)  # fmt: skip
_CHOICES = {
    **{name: name for name in ("left", "right", "tie", "skip")}, "a": "left", "b": "right", "first": "left",
    "second": "right",
    **dict.fromkeys(("equal", "same", "draw", "both", "neither", "bothbad", "both_bad", "tie_(bothbad)"), "tie"),
}  # fmt: skip
_LABEL = re.compile(r"(?:image|picture|option|model)_?(?=[ab012]\b)")
_ORDER = re.compile(r"(\w+?)_?([<>=])_?(\w+)")
# Label Studio's addresses; what follows is the file, its signs by numbers (%20) where it lies on the server's disk.
_UPLOADED = re.compile(r"(?:https?://[^/]+)?/data/(?:upload/(?:\d+/)?[0-9a-f]{8}-|local-files/\?d=)(.+)")


def read_own_images(folder: Path) -> Iterator[SourceImage]:
    """The images that a list in `folder` names, columns `prompt` and `file`, perhaps `prompt_id`, or with captions.

    Captions are files of text beside the pictures, as kohya's trainers read them: the first line counts.

    An image's id is its `image_id` where given, else `<prompt_id>/<name of the file>`. Raises InputError naming the
    line that lacks a prompt or a file, has an unsafe id, or whose file lies outside the folder.
    """
    if folder.is_file():
        raise InputError("a file, not a folder of images", where=folder, fix=f"give its folder: {folder.parent}")
    ours, theirs = (
        [folder / name for name in names if (folder / name).is_file()] for names in (IMAGES_FILES, _METADATA)
    )
    listings = ours or theirs
    if len(listings) > 1:
        got = " and ".join(path.name for path in listings)
        raise InputError("two lists of the images", where=folder, got=got, fix="remove one")
    rows = list(read_table(listings[0], ("prompt", "file"), _IMAGE_TOO) if listings else _captions(folder))
    listing = listings[0] if listings else folder
    if not listings and not rows:
        raise InputError(
            "no list of the images", where=folder,
            expected=f"{' or '.join((*IMAGES_FILES, *_METADATA))}, or captions beside the pictures",
            fix="write images.csv with a line `prompt,file`, then a line an image",
        )  # fmt: skip
    seen: dict[str, SourceImage] = {}
    for number, row in rows:
        where = f"{listing}:{number}"
        image = _own_image(folder, row, where, f"{listing.name}:{number}")
        if first := seen.get(image.image_id):
            same = first.path == image.path
            raise InputError(
                "an image is listed twice" if same else "two images have one id", where=where,
                got=f"{image.image_id}, first at {first.where}",
                fix="delete one of the lines" if same else "rename a file: suffix and folder do not count",
            )  # fmt: skip
        seen[image.image_id] = image
        yield image


def image_of_row(folder: Path, row: GeneratedImage, where: str) -> SourceImage:
    """A row of an artifact's images.jsonl."""
    path, seed = folder / row["file"], row["seed"]
    return SourceImage(row["image_id"], row["prompt_id"], row["prompt"], path, row["file"], where, True, seed)


def read_ratings(path: Path, collection: Collection) -> Iterator[tuple[str, Rating]]:
    """The rows of a ratings.csv with where they stand; those that cannot be used are set aside.

    A table without `dimension` has one column per dimension, or `choice` for overall; without `rater` it is the work
    of one, named by the file. `image_a` and `image_b`, or numbers 0 and 1 or 1 and 2, may stand for left and right, and
    `a`, `b` or those numbers for the choice. An empty cell is no answer.

    Images are named by their id or, in a listing of one's own, by their file. Raises InputError where a column is
    missing.
    """
    known = _known(collection)
    for number, row in _rating_rows(path):
        where = f"{path.name}:{number}"
        given = {key: row.get(key, "") for key in ("prompt_id", *RATING_COLUMNS)}
        left, right = known.get(_plain(given["left"])), known.get(_plain(given["right"]))
        if left is None or right is None:
            unknown = given["left"] if left is None else given["right"]
            collection.quarantine.add("rating", where, "unknown image", image_id=unknown)
        elif reason := _fault(given, left, right):
            collection.quarantine.add("rating", where, reason, row=given)
        else:
            ids = {"prompt_id": left.prompt_id, "left": left.image_id, "right": right.image_id}
            yield where, Rating(**{**given, **ids})  # type: ignore[typeddict-item]


def _known(collection: Collection) -> dict[str, SourceImage]:
    """Every image by its path, its file as listed and its id."""
    images = collection.images.values()
    by_file = {_plain(name): image for image in images for name in (str(image.path), image.listed_as)}
    # Ids on the right, so they win where one image is listed under another image's id.
    return by_file | collection.images


def _plain(name: str) -> str:
    """A file's name as it is compared: without `./`, with slashes, accents as one sign (macOS writes them as two)."""
    uploaded = _UPLOADED.fullmatch(name)
    file = with_slashes(unquote(uploaded[1]) if uploaded else name)
    return unicodedata.normalize("NFC", file.removeprefix("./"))


def _rating_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A row for each dimension rated, under our names; columns not used and lines without an answer are told."""
    table = list(read_table(path, (), _RATING_TOO))
    columns = list(table[0][1]) if table else []
    sides = next((names for names in SIDES if set(names) <= {*columns}), SIDES[0])
    ours = dict(zip(sides, SIDES[0], strict=True))
    rows = [(number, {ours.get(name, name): cell.strip() for name, cell in cells.items()}) for number, cells in table]
    rated = _rated([ours.get(name, name) for name in columns], path) if rows else {}
    said = {_choice(row.get(column, "")) for _, row in rows for column in rated.values()}
    words = _CHOICES | _numbered(sides, said)
    num_blank = 0
    for number, row in rows:
        answered = {name: cell for name, column in rated.items() if (cell := row.get(column))}
        num_blank += not answered
        for name, cell in answered.items():
            by_file = {row.get(side): side for side in SIDES[0]}
            choice = _chosen(_choice(cell), words) or by_file.get(cell, cell)
            dimension = row.get("dimension", name).lower()
            yield number, {"rater": path.stem, **row, "dimension": dimension, "choice": choice}
    if num_blank:
        _log.warning("%s: %d line%s no answer", path, num_blank, " has" if num_blank == 1 else "s have")


def answered(row: Mapping[str, Any]) -> tuple[tuple[str, str], str, str] | None:
    """A row's columns of two images and of a word, and what that says of them: left, right or tie; None for none."""
    sides = next((names for names in SIDES if all(row.get(name) for name in names)), None)
    if sides is None:
        return None
    # MJ-Bench's label is the number of the better one of image0 and image1; nobody knows what others' say.
    columns = ("choice", *_RATING_TOO["choice"], *(["label"] if sides == ("image0", "image1") else []))
    column = next((name for name in columns if row.get(name) not in (None, "")), "")
    choice = _chosen(_choice(str(row.get(column))), _CHOICES | _numbered(sides, set()))
    return (sides, column, choice) if choice in ("left", "right", "tie") else None


def _choice(cell: str) -> str:
    """A choice as it is looked up, `Image 2` as 2; a number that stands beside empty cells became 1.0 in pandas."""
    return _LABEL.sub("", cell.lower().replace(" ", "_")).removesuffix(".0")


def _chosen(said: str, words: Mapping[str, str]) -> str | None:
    """What a choice means, also of one that is written as an order, a>b."""
    order = _ORDER.fullmatch(said)
    if order and {words.get(order[1]), words.get(order[3])} == {"left", "right"}:
        return {">": words[order[1]], "<": words[order[3]]}.get(order[2], "tie")
    return words.get(said)


def _rated(columns: Sequence[str], path: Path) -> dict[str, str]:
    """The column of each dimension's choice; where a line names its dimension that is `choice`."""
    rated: dict[str, str] = {} if "dimension" in columns else {name: name for name in DIMENSIONS if name in columns}
    if "choice" in columns and "overall" not in rated:
        rated["overall"] = "choice"
    if missing := [*(name for name in SIDES[0] if name not in columns), *([] if rated else ["choice"])]:
        raise InputError(
            f"no column {', '.join(missing)}", where=f"{path}:1",
            got=", ".join(columns), expected=", ".join(RATING_COLUMNS), fix="name the columns on the first line",
        )  # fmt: skip
    tell_unused(path, {*columns} - {"prompt_id", *RATING_COLUMNS[:4], *rated.values()})
    return rated


def _numbered(sides: tuple[str, str], said: set[str]) -> dict[str, str]:
    """What `1` stands for beside 0 or 2, as the names of the columns or other choices tell; else it stays unknown."""
    by_name = sides[0].removeprefix("image").removeprefix("_")
    if by_name == "1" or (by_name != "0" and said & {"0", "2"} == {"2"}):
        return {"1": "left", "2": "right"}
    return {"0": "left", "1": "right"} if by_name == "0" or said & {"0", "2"} == {"0"} else {}


def tell_unused(path: Path, columns: set[str]) -> None:
    """Name the columns of a table that nothing reads, in the log."""
    if columns := columns - {""}:
        _log.warning("%s: columns that are not used: %s", path, ", ".join(sorted(columns)))


def read_scores(path: Path, collection: Collection, tie_margin: float) -> Iterator[tuple[str, Rating]]:
    """Ratings from a table of scores: two images of a prompt that a rater scored on a dimension are compared there.

    Columns `image` (an id or a file), perhaps `rater`, and a column of numbers for each dimension scored; the higher
    is the better, scores that differ by `tie_margin` or less are a tie. Cells may be empty. Lines that cannot be used
    are set aside. Raises InputError where a column is missing.
    """
    known = _known(collection)
    unused = set[str]()
    scored: dict[tuple[str, str], dict[str, tuple[str, dict[Dimension, float]]]] = defaultdict(dict)
    for number, row in read_table(path, ("image",), _SCORE_TOO):
        if not row.keys() & {*DIMENSIONS}:
            raise InputError(
                "no column of scores", where=f"{path}:1", got=", ".join(row), expected=", ".join(DIMENSIONS),
                fix="name a column of numbers by its dimension, such as overall",
            )  # fmt: skip
        # A table without raters is the work of one: named by its file, two tables are two raters.
        where, rater = f"{path.name}:{number}", (row.get("rater") or "").strip() or path.stem
        unused |= {name for name, cell in row.items() if cell.strip()} - {"image", "rater", *DIMENSIONS}
        image, scores = known.get(_plain((row.get("image") or "").strip())), _scores(row)
        if image is None:
            collection.quarantine.add("rating", where, "unknown image", image_id=row.get("image"))
        elif not scores:
            collection.quarantine.add("rating", where, "no score, or one that is no number", row=row)
        elif image.image_id in scored[image.prompt_id, rater]:
            collection.quarantine.add("rating", where, "scored twice by one rater", image_id=image.image_id)
        else:
            scored[image.prompt_id, rater][image.image_id] = (where, scores)
    tell_unused(path, unused)
    for (prompt_id, rater), images in scored.items():
        for (left, (where, ours)), (right, (_, theirs)) in combinations(images.items(), 2):
            for dimension in (name for name in ours if name in theirs):
                choice = choice_of(ours[dimension] - theirs[dimension], tie_margin)
                given = {"prompt_id": prompt_id, "left": left, "right": right, "rater": rater}
                yield where, Rating(**given, dimension=dimension, choice=choice)  # type: ignore[typeddict-item]


def _scores(row: dict[str, str]) -> dict[Dimension, float] | None:
    """The scores of a line by dimension; None where a cell holds no finite number."""
    given = {name: row[name].strip() for name in sorted(DIMENSIONS) if (row.get(name) or "").strip()}
    try:
        found = {name: float(text) for name, text in given.items()}
    except ValueError:
        return None
    if any("_" in text for text in given.values()):  # to Python 1_0 is 10
        return None
    # float() also reads nan and inf: nan is neither above nor below any score, and inf - inf is nan.
    return found if all(map(isfinite, found.values())) else None


def _fault(given: dict[str, str], left: SourceImage, right: SourceImage) -> str | None:
    """Why a rating of two known images cannot be used."""
    if left.prompt_id != right.prompt_id or given["prompt_id"] not in ("", left.prompt_id):
        return "images of two prompts"
    if left.image_id == right.image_id:
        return "an image against itself"
    if given["choice"] not in _CHOICES.values():
        return "unknown choice (left, right, tie or skip)"
    if given["dimension"] not in get_args(Dimension):
        return f"unknown dimension ({', '.join(DIMENSIONS)})"
    return None if given["rater"] else "no rater"


def read_artifact(folder: Path, name: str, collection: Collection) -> None:
    """Add what an image_ratings artifact holds."""
    for row in read_jsonl(folder / "images.jsonl"):
        collection.add_image(image_of_row(folder, row, f"{name}/images.jsonl"))
    collection.ratings += read_ratings(folder / "ratings.csv", collection)


def _captions(folder: Path) -> Iterator[Line]:
    """A row for each picture below `folder` that has its caption beside it; raises InputError where some have none."""
    pictures = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in _PICTURES)
    texts = read_captions(folder, pictures)
    if texts and (bare := [path for path in pictures if path.with_suffix("") not in texts]):
        raise InputError(
            "a picture without a caption", where=bare[0], got=f"{len(bare)} of {len(pictures)} pictures",
            expected="a .txt or .caption beside it", fix="write it, or move the picture out of the folder",
        )  # fmt: skip
    for number, path in enumerate(pictures if texts else (), 1):
        yield number, {"prompt": texts[path.with_suffix("")], "file": str(path.relative_to(folder))}


def _own_image(folder: Path, row: dict[str, str], where: str, short: str) -> SourceImage:
    # Spaces are made even first: the id is a hash of the text, and a stray one would make a second prompt.
    prompt, file = one_spelling(row["prompt"]), with_slashes(row["file"].strip())
    if not prompt or not file:
        raise InputError(f"an image without a {'file' if prompt else 'prompt'}", where=where, fix="complete the line")
    prompt_id = str(row.get("prompt_id") or "") or prompt_id_of(prompt)
    image_id = str(row.get("image_id") or "") or f"{prompt_id}/{safe_name(Path(file).stem)}"
    safe = all(is_safe(part) for part in (prompt_id, *image_id.split("/"))) and image_id.startswith(f"{prompt_id}/")
    path = on_disk(folder, file)
    if not safe or image_id.count("/") != 1:
        raise InputError(
            "an id cannot be a file name", where=where, got=f"{prompt_id}, {image_id}",
            expected="letters, digits, - _ . in prompt_id, and image_id = prompt_id/name", fix="rename it",
        )  # fmt: skip
    # Resolved, so that neither `..` nor a symbolic link leads to a file elsewhere.
    if not path.resolve().is_relative_to(folder.resolve()):
        leads = f"{file}, a link to {path.resolve()}" if path.is_symlink() else file
        raise InputError(
            "an image outside its folder", where=where, got=leads,
            fix="put it below the folder; of one with links, as in the hub's cache, give a copy made by `cp -rL`",
        )  # fmt: skip
    return SourceImage(image_id, prompt_id, prompt, path, file, short)
