"""Where preferences come from: ratings.csv, scores, pairs of any tool, Pick-a-Pic's rows, published rankings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from prefmill.core.artifact import Artifact
from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.core.errors import InputError
from prefmill.core.image_rows import DIMENSIONS, Dimension, Rating
from prefmill.images.collection import Collection, SourceImage, same_file
from prefmill.images.custom_images import (
    SIDES,
    answered,
    read_artifact,
    read_own_images,
    read_ratings,
    read_scores,
    tell_unused,
)
from prefmill.images.files import no_file
from prefmill.images.pair_files import content_name, data_files, picture_bytes, picture_path, rows_of, stored
from prefmill.images.prompts import PROMPT_TOO, one_spelling, prompt_id_of, safe_name
from prefmill.images.rankings import is_name, overall, read_rankings
from prefmill.images.rating import choice_of, draw
from prefmill.store.row_files import RATERS

# The better image first: our own names, and those of other preference files.
_SIDES = (
    ("preferred", "rejected"), ("chosen", "rejected"), ("winner", "loser"), ("win", "lose"), ("image_w", "image_l"),
    ("preferred_image", "rejected_image"), ("chosen_image", "rejected_image"),
)  # fmt: skip
_HPDV3_SIDES, _HPDV3_KEYS = ("path1", "path2"), {"confidence", "choice_dist"}
_PAIR_KEYS = {
    "prompt", "prompt_id", "pair_id", "labels", "choice_dist", "confidence", "weight", "split", "rater",
    *PROMPT_TOO["prompt"], *RATERS, *DIMENSIONS, *_HPDV3_SIDES, *(name for names in _SIDES for name in names),
}  # fmt: skip
# Two images, and the columns that say how often, or how much, each was chosen: Rapidata's. GenAI-Arena's is a word.
_VOTED = (
    ("image1", "image2", "votes_image1", "votes_image2"),
    ("image1", "image2", "weighted_results_image1_preference", "weighted_results_image2_preference"),
    ("left_image", "right_image", "leftvote", "rightvote"),
)
_VOTES = {"vote_type", *(name for columns in _VOTED for name in columns[2:])}
_WORDS = {"leftvote": (1, 0), "rightvote": (0, 1), "tievote": (1, 1), "bothbad_vote": (1, 1)}
_PICKAPIC_KEYS = ("caption", "jpg_0", "jpg_1", "label_0")


class RatingsSource(StrictConfig):
    """A ratings.csv about the images that `images`/images.csv (or .jsonl) lists."""

    format: Literal["ratings"]
    ratings: ExternalPath
    images: ExternalPath


class ScoresSource(StrictConfig):
    """A table of scores, a line an image, about the images that `images`/images.csv (or .jsonl) lists."""

    format: Literal["scores"]
    scores: ExternalPath
    images: ExternalPath
    tie_margin: float = Field(0.0, ge=0, description="scores that differ by no more are a tie")


class PairsSource(StrictConfig):
    """Pairs of other tools, older scripts or by hand: a row a pair, with its prompt and both images.

    A .jsonl, .csv, .tsv, .json, .parquet or .arrow file, or a folder as datasets writes it. Images are bytes, or files
    relative to `images` or to the file's folder.
    """

    format: Literal["pairs"]
    pairs: ExternalPath
    images: ExternalPath | None = None


class PickAPicSource(StrictConfig):
    """Pick-a-Pic's rows: a .parquet or .jsonl file, or a folder of them; in .jsonl `jpg_0` is the path of a file."""

    format: Literal["pickapic"]
    path: ExternalPath


class ImageRewardSource(StrictConfig):
    """ImageReward's .json of prompts with `generations` and their `ranking` (1 is best); files are below `images`.

    ImageRewardDB's rows with an image each (.parquet, a folder of them, as `save_to_disk` writes), HPDv2's train.json
    (`human_preference`, 1 for the better image) and test.json (`rank`) are read as well.
    """

    format: Literal["imagereward", "hpdv2"]
    rankings: ExternalPath
    images: ExternalPath | None = None


PairSource = Annotated[
    RatingsSource | ScoresSource | PairsSource | PickAPicSource | ImageRewardSource, Field(discriminator="format")
]


def collect(sources: Sequence[PairSource], artifacts: Sequence[Artifact], work: Path) -> Collection:
    """Everything that sources and image_ratings artifacts hold; images that come as bytes are written below `work`."""
    collection = Collection()
    for artifact in artifacts:
        read_artifact(artifact.path, artifact.manifest.task, collection)
    for source in sources:
        if isinstance(source, (RatingsSource, ScoresSource)):
            for image in read_own_images(source.images):
                collection.add_image(image)
            if isinstance(source, RatingsSource):
                collection.ratings += read_ratings(source.ratings, collection)
            else:
                collection.ratings += read_scores(source.scores, collection, source.tie_margin)
        elif isinstance(source, PairsSource):
            _read_pairs(source, work / "images", collection)
        elif isinstance(source, PickAPicSource):
            _read_pickapic(source.path, work / "images", collection)
        else:
            read_rankings(source.rankings, source.images or source.rankings.parent, work / "images", collection)
    return collection


def _read_pairs(source: PairsSource, work: Path, collection: Collection) -> None:
    """Every row as a vote for its better image, overall and on each dimension that the row has a label for."""
    rows = ((file.parent, where, row) for file in data_files(source.pairs) for where, row in rows_of(file))
    unused = set[str]()
    for base, where, given_row in rows:
        row = _voted(given_row)
        if reason := _pair_fault(row):
            collection.quarantine.add("row", where, reason, row=_without_bytes(row))
            continue
        unused |= row.keys() - _PAIR_KEYS
        prompt, folder = one_spelling(_prompt(row)), source.images or base
        prompt_id = safe_name(str(row.get("prompt_id") or prompt_id_of(prompt)))
        ids = []
        for content in _pictures(row):
            data = picture_bytes(content)
            file = str(picture_path(content)) if data is None else content_name(data)
            path = stored(content, folder, work / file)
            ids.append(_free_id(prompt_id, file, path, collection))
            collection.add_image(SourceImage(ids[-1], prompt_id, prompt, path, file, where))
        rater = next((str(row[name]) for name in ("rater", *RATERS) if row.get(name)), "pairs")
        # A pair has no sides: with the better image always on one, its rater would be told to answer by the side.
        turned = draw(0, *sorted(ids)) % 2 == (ids[0] < ids[1])
        left, right = ids[::-1] if turned else ids
        given = {"prompt_id": prompt_id, "left": left, "right": right, "rater": rater}
        shares = row.get("choice_dist")  # HPDv3's numbers of votes
        tied = isinstance(shares, list) and len(shares) == 2 and shares[0] == shares[1]
        for dimension, label in {"overall": 0.5 if tied else 1.0, **(_labels(row) or {})}.items():
            choice = choice_of(0.5 - label if turned else label - 0.5)
            collection.ratings.append((where, Rating(**given, dimension=dimension, choice=choice)))  # type: ignore[typeddict-item]
    tell_unused(source.pairs, unused)


def _pair_fault(row: Any) -> str | None:
    """Why a line of pairs cannot be used."""
    if not isinstance(row, dict):
        return "not an object"
    if not _prompt(row).strip():
        return "no prompt"
    if not _pictures(row):
        sides = (*SIDES, _HPDV3_SIDES)
        unchosen = any(all(row.get(name) for name in names) for names in sides)
        return "two images and no choice between them" if unchosen else "no two images"
    if _labels(row) is None:
        return "a label outside 0 to 1"
    files = [picture_path(content) or "" for content in _pictures(row)]
    if reason := next(filter(None, map(no_file, files)), None):
        return reason
    return "images' names cannot be used" if any(".." in Path(file).parts for file in files) else None


def _voted(row: Any) -> Any:
    """A row of two images and their votes with the better one first, by our names; any other as it is."""
    for *sides, ours, theirs in _VOTED if isinstance(row, dict) and row.keys() & _VOTES else ():
        words = _WORDS.get(str(row.get("vote_type")), (None, None))
        margin = _lead(row.get(ours, words[0]), row.get(theirs, words[1]))
        if margin is not None and all(row.get(side) for side in sides):
            return _sorted(row, sides, margin)
    if isinstance(row, dict) and not _pictures(row) and (found := answered(row)):
        (*sides,), column, choice = found
        return _sorted(row, sides, {"left": 1.0, "tie": 0.0, "right": -1.0}[choice], column)
    return row


def _sorted(row: dict[str, Any], sides: Sequence[str], margin: float, column: str = "") -> dict[str, Any]:
    better, worse = sides if margin >= 0 else sides[::-1]
    rest = {key: value for key, value in row.items() if key not in (*sides, column, *_VOTES)}
    return {**rest, "preferred": row[better], "rejected": row[worse], "choice_dist": [abs(margin), 0.0]}


def _lead(ours: Any, theirs: Any) -> float | None:
    """By how much of all votes an image leads; None where there are none, or they are no numbers."""
    try:
        first, second = float(ours), float(theirs)
        return _margin(first / (first + second), second / (first + second))
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _prompt(row: dict[str, Any]) -> str:
    """What the images are of, by any of its names."""
    found = next((row[name] for name in ("prompt", *PROMPT_TOO["prompt"]) if row.get(name)), None)
    return found if isinstance(found, str) else ""


def _pictures(row: dict[str, Any]) -> list[Any]:
    """The better and the worse image, each a file or bytes; empty where a line does not have both."""
    # HPDv3's first path is the preferred one, as its authors' README says; of another tool's nobody knows.
    sides = (*_SIDES, *([_HPDV3_SIDES] if row.keys() & _HPDV3_KEYS else []))
    found = ([row.get(name) for name in names] for names in sides)
    return next((both for both in found if all(picture_bytes(one) or picture_path(one) for one in both)), [])


def _without_bytes(row: Any) -> Any:
    """A row as a list of faults can hold it, with the names of all columns."""
    named = row.items() if isinstance(row, dict) else ()
    return {key: "a picture" if picture_bytes(value) else value for key, value in named} or row


def _free_id(prompt_id: str, file: str, path: Path, collection: Collection) -> str:
    """An image's id by the name of its file; by its folders too where another picture of the prompt has that name."""
    image_id = f"{prompt_id}/{safe_name(Path(file).stem)}"
    known = collection.images.get(image_id)
    return image_id if known is None or same_file(known.path, path) else f"{prompt_id}/{prompt_id_of(file)}"


def _labels(row: dict[str, Any]) -> dict[Dimension, float] | None:
    """The probabilities, by dimension, that the better image is the better one there: in `labels` or in columns."""
    said = {**row, **(row["labels"] if isinstance(row.get("labels"), dict) else {})}
    try:  # in a table by hand a number is text
        found = {name: float(said[name]) for name in DIMENSIONS if said.get(name) not in (None, "")}
    except (TypeError, ValueError):
        return None
    return found if all(0 <= value <= 1 for value in found.values()) else None


def _read_pickapic(path: Path, folder: Path, collection: Collection) -> None:
    """Every row as a user's rating on the dimension `overall`; 0.5 : 0.5 is a tie, a row without a label a skip."""
    for where, base, row in _pickapic_rows(path):
        pictures = [row["jpg_0"], row["jpg_1"]]
        there = all(picture_bytes(one) or picture_path(one) for one in pictures)
        faults = ["" if there else "no two images", *(no_file(picture_path(one)) for one in pictures)]
        if reason := next(filter(None, faults), None):
            collection.quarantine.add("row", where, reason)
            continue
        given = [row.get(f"image_{side}_uid", _uid(one)) for side, one in enumerate(pictures)]
        if not isinstance(row["caption"], str) or not row["caption"].strip() or not all(map(is_name, given)):
            collection.quarantine.add("row", where, "no usable caption and uids")
            continue
        labelled = str(row.get("has_label", True)).lower() in ("true", "1", "1.0")
        margin = _margin(row["label_0"], row.get("label_1"))
        if labelled and margin is None:
            collection.quarantine.add("row", where, "labels that are no shares of 1")
            continue
        prompt, uids = one_spelling(row["caption"]), list(map(str, given))
        prompt_id = prompt_id_of(prompt)
        for side, uid in enumerate(uids):
            image_id = f"{prompt_id}/{uid}"
            # The same image is in many rows of Pick-a-Pic: its bytes are written once.
            if image_id not in collection.images:
                file = stored(row[f"jpg_{side}"], base, folder / image_id)
                collection.add_image(SourceImage(image_id, prompt_id, prompt, file, file.name, where))
        left, right = (f"{prompt_id}/{uid}" for uid in uids)
        choice = "skip" if not labelled or margin is None else choice_of(margin)
        rater = str(row.get("user_id") or "pickapic")
        collection.ratings.append((where, overall(prompt_id, left, right, rater, choice)))


def _uid(picture: Any) -> str:
    data = picture_bytes(picture)
    return safe_name(Path(str(picture_path(picture))).stem) if data is None else content_name(data)


def _pickapic_rows(path: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Rows with where they stand and the folder that their paths are relative to."""
    for file in data_files(path):
        for where, row in rows_of(file):
            missing = [key for key in _PICKAPIC_KEYS if not isinstance(row, dict) or key not in row]
            if missing:
                raise InputError(
                    "not a row of Pick-a-Pic", where=file.parent / where, got=f"no {', '.join(missing)}",
                    expected=", ".join(_PICKAPIC_KEYS),
                    fix="give the files as published, of the set with pictures in it",
                )  # fmt: skip
            yield where, file.parent, row


def _margin(first: Any, second: Any) -> float | None:
    """How much more the first image was chosen, of shares that sum to 1; None for anything else."""
    try:
        ours = float(first)
        theirs = 1 - ours if second is None else float(second)
    except (TypeError, ValueError):
        return None
    # NaN fails both; -1 and -1, or 0 and 0, would be a tie that nobody called.
    return ours - theirs if min(ours, theirs) >= 0 and abs(ours + theirs - 1) < 1e-6 else None
