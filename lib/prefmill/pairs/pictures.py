"""Pictures of rows from elsewhere: where they lie, or their bytes, which are written once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.errors import InputError
from prefmill.core.files import replacing, unique_suffix
from prefmill.store.pictures import check_image, on_disk, open_image


def image_path(image: Any, row_id: str, base: Path, folder: Path) -> str:
    """Where an image is, relative to `folder` or absolute; bytes are written there first.

    Paths are relative to `base`. Raises InputError for a picture that is not there or cannot be used.
    """
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(data, bytes):
        # Named by content: rows that share a picture share a file, and a resumed attempt writes none twice.
        path = folder / "images" / hashlib.sha256(data).hexdigest()
        if not path.is_file():
            check_image(data, f"row {row_id}")
            write_by_rename(path, data)
        return path.relative_to(folder).as_posix()
    named = image.get("path") if isinstance(image, Mapping) else image
    found = on_disk(base, str(named).removeprefix("file://")).absolute()
    if not isinstance(named, str) or "://" in named.removeprefix("file://") or not found.is_file():
        raise InputError(
            "no such image", got=str(named)[:200], expected=f"a file below {base}, or the image's bytes",
            fix="set image_folder to the folder that image paths are relative to; download what is only a URL",
        )  # fmt: skip
    open_image(found)  # to its end: a cut file or a bomb would end the training, hours from here
    return found.as_posix()


def image_key(image: Any) -> str:
    """What tells a picture from others: the digest of its bytes, or its path."""
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    return str(image.get("path") if isinstance(image, Mapping) else image)


def write_by_rename(path: Path, data: bytes) -> None:
    """Write by rename under a name of this rank's own: all ranks write the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, unique_suffix()) as stream:
        stream.write(data)
