"""Published rankings of images: ImageReward's, ImageRewardDB's rows, HPDv2's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from prefmill.core.errors import InputError
from prefmill.core.image_rows import Rating
from prefmill.images.collection import Collection, SourceImage
from prefmill.images.files import no_file
from prefmill.images.pair_files import content_name, data_files, picture_bytes, picture_path, rows_of, stored
from prefmill.images.prompts import is_safe, one_spelling, prompt_id_of, safe_name, with_slashes
from prefmill.images.rating import choice_of
from prefmill.store.pictures import on_disk
from prefmill.store.row_files import file_rows

_RANK = re.compile(r"\s*(\d+)(?:st|nd|rd|th)?\s*", re.IGNORECASE)
_RANKING = "ranking"  # the rater of a published ranking


def read_rankings(path: Path, images: Path, work: Path, collection: Collection) -> None:
    """Every two images of a ranking as a rating on the dimension `overall`; equal ranks are ties.

    Images that a file holds are written below `work`.
    """
    given = _of_list(path, images) if path.suffix.lower() == ".json" else _of_rows(path, images, work)
    for where, base, row in given:
        if reason := _fault(row):
            collection.quarantine.add("ranking", where, reason, row=row)
            continue
        prompt_id, prompt = str(row["id"]), one_spelling(row["prompt"])
        ranked = []
        for file, rank in zip(row["generations"], map(_rank, row["ranking"]), strict=True):
            image_id = f"{prompt_id}/{safe_name(Path(file).stem)}"
            collection.add_image(SourceImage(image_id, prompt_id, prompt, on_disk(base, file), file, where))
            ranked.append((image_id, rank))
        # Every pair of a ranking: k (k - 1) / 2 comparisons of k images, as InstructGPT (2022) takes them.
        for (left, left_rank), (right, right_rank) in itertools.combinations(ranked, 2):
            choice = choice_of(right_rank - left_rank)
            rater = str(row.get("user_hash") or _RANKING)
            collection.ratings.append((where, overall(prompt_id, left, right, rater, choice)))


def _of_list(path: Path, images: Path) -> Iterator[tuple[str, Path, Any]]:
    for row in file_rows(path):
        named = _of_hpdv2(row.values)
        if isinstance(named, dict) and isinstance(files := named.get("generations"), list):
            named = {**named, "generations": [with_slashes(file) if isinstance(file, str) else file for file in files]}
        yield f"{path.name}[{row.number}]", images, named


def _of_rows(path: Path, images: Path, work: Path) -> Iterator[tuple[str, Path, Any]]:
    """ImageRewardDB's rows, one an image with its rank among those of its `prompt_id`, as rankings."""
    found: dict[str, tuple[str, Path, dict[str, Any]]] = {}
    for file in data_files(path):
        for where, row in rows_of(file):
            if not isinstance(row, dict) or not {"image", "prompt_id", "prompt", "rank"} <= row.keys():
                raise InputError(
                    "not a row of ImageRewardDB", where=file.parent / where, got=", ".join(row),
                    expected="image, prompt_id, prompt, rank", fix="give its rows, or ImageReward's .json of rankings",
                )  # fmt: skip
            name, data = picture_path(row["image"]), picture_bytes(row["image"])
            if data is not None:
                name = stored(row["image"], images, work / content_name(data)).name
            told = {"id": row["prompt_id"], "prompt": row["prompt"], "generations": [], "ranking": []}
            _, _, ranking = found.setdefault(str(row["prompt_id"]), (where, images if data is None else work, told))
            ranking["generations"].append(name)
            ranking["ranking"].append(row["rank"])
    yield from found.values()


def _of_hpdv2(row: Any) -> Any:
    """A row of HPDv2 under ImageReward's names; any other as it is."""
    files = (row.get("image_path") or row.get("file_path")) if isinstance(row, dict) else None
    if files is None or not isinstance(row.get("prompt"), str):
        return row
    chosen = row.get("human_preference")
    # The better image has 1 there, and the lower of two ranks.
    turned = [-value if _is_number(value) else value for value in chosen] if isinstance(chosen, list) else None
    named = {"id": prompt_id_of(one_spelling(row["prompt"])), "generations": files}
    return {**row, **named, "ranking": row.get("rank", turned)}


def _fault(row: Any) -> str | None:
    """Why a row of a ranking cannot be used."""
    if not isinstance(row, dict) or any(key not in row for key in ("id", "prompt", "generations", "ranking")):
        return "not a ranking"
    files = row["generations"]
    if not isinstance(files, list) or not isinstance(row["ranking"], list):
        return "not a ranking"
    if len(files) != len(row["ranking"]):
        return "as many ranks as images are needed"
    if None in map(_rank, row["ranking"]):
        return "a rank that is no number"
    if not is_name(row["id"]) or not isinstance(row["prompt"], str) or not row["prompt"].strip():
        return "no usable id and prompt"
    if not all(isinstance(file, str) for file in files):
        return "images' names cannot be used"
    if reason := next(filter(None, map(no_file, files)), None):
        return reason
    # The file comes from elsewhere: its names become ours, and must not lead out of the folder.
    stems = {Path(file).stem for file in files}
    if len(stems) < len(files) or any(".." in Path(file).parts or Path(file).is_absolute() for file in files):
        return "images' names cannot be used"
    return None


def _rank(value: Any) -> Any:
    """The number of a rank, that of `2nd` too; None for what is none."""
    found = _RANK.fullmatch(value) if isinstance(value, str) else None
    return int(found[1]) if found else value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def is_name(value: Any) -> bool:
    """Whether an id from elsewhere, text or a whole number, can name a file; null is none."""
    return type(value) in (str, int) and is_safe(str(value))


def overall(
    prompt_id: str, left: str, right: str, rater: str, choice: Literal["left", "right", "tie", "skip"]
) -> Rating:
    """A rating on the dimension `overall`."""
    return Rating(prompt_id=prompt_id, left=left, right=right, rater=rater, dimension="overall", choice=choice)
