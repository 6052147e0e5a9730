"""Images and ratings from every source in one form, and a list of what could not be used."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefmill.core.errors import InputError
from prefmill.core.image_rows import GeneratedImage, Rating
from prefmill.distributed.limits import ProcessLimits
from prefmill.images.files import inspect_image, no_file
from prefmill.store.pictures import ImageError


@dataclass(frozen=True)
class SourceImage:
    """An image of a source, not looked at yet; `listed_as` is its file as the source names it.

    Files of finished artifacts are ours.
    """

    image_id: str
    prompt_id: str
    prompt: str
    path: Path
    listed_as: str
    where: str
    is_ours: bool = False
    seed: int = 0


@dataclass(frozen=True)
class GoodImage:
    """An image that can be decoded; `file` is where it belongs below an artifact."""

    source: SourceImage
    width: int
    height: int
    sha256: str
    pixels_sha256: str
    suffix: str

    @property
    def file(self) -> str:
        """`images/<prompt_id>/<name>` with the suffix of its format."""
        return f"images/{self.source.image_id}{self.suffix}"

    @property
    def row(self) -> GeneratedImage:
        """The image as a row of images.jsonl."""
        source = self.source
        return GeneratedImage(
            image_id=source.image_id, prompt_id=source.prompt_id, prompt=source.prompt, seed=source.seed,
            file=self.file, width=self.width, height=self.height, sha256=self.sha256,
        )  # fmt: skip


@dataclass
class Quarantine:
    """Rows that were set aside, in the order they were met: what, where, why."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, where: str, reason: str, **details: Any) -> None:
        """Set one aside; `reason` is a few words that can be counted."""
        self.rows.append({"what": what, "where": where, "reason": reason, **details})

    def counts(self) -> dict[str, int]:
        """How many for every reason."""
        return dict(sorted(Counter(f"{row['what']}: {row['reason']}" for row in self.rows).items()))

    def reasons(self) -> str:
        """The counts in a line."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.counts().items())

    def warnings(self) -> list[str]:
        """The line that says so, where rows were set aside."""
        return [f"set aside, see quarantine.jsonl: {self.reasons()}"] if self.rows else []


@dataclass
class Collection:
    """What the sources hold: images by id, and ratings with where they stand."""

    images: dict[str, SourceImage] = field(default_factory=dict)
    ratings: list[tuple[str, Rating]] = field(default_factory=list)
    quarantine: Quarantine = field(default_factory=Quarantine)
    _prompts: dict[str, SourceImage] = field(default_factory=dict)

    def add_image(self, image: SourceImage) -> None:
        """Add an image; raises InputError where an id means two prompts, or an image id two files.

        The same file again, as when two people rated the same images, is no matter.
        """
        # The first meeting of an id decides: a split and a pair depend on the id, so it must mean one prompt.
        first = self._prompts.setdefault(image.prompt_id, image)
        if first.prompt != image.prompt:
            raise _two_meanings("prompt_id", image.prompt_id, first, image, (first.prompt, image.prompt))
        known = self.images.setdefault(image.image_id, image)
        if known is not image and not same_file(known.path, image.path):
            raise _two_meanings("image id", image.image_id, known, image, (str(known.path), str(image.path)))


def check_images(images: list[SourceImage], quarantine: Quarantine) -> dict[str, GoodImage]:
    """Those of `images` that can be decoded, by id; the others are set aside. As many threads as cores decode."""
    from tqdm import tqdm

    good = {}
    # Threads do: Pillow lets go of the GIL while it decodes. map keeps the order, so reruns list the same faults.
    with ThreadPoolExecutor(ProcessLimits().cpus()) as pool:
        looked_at = tqdm(pool.map(_look, images), total=len(images), desc="check", unit="image")
        for image, found in zip(images, looked_at, strict=True):
            if isinstance(found, GoodImage):
                good[image.image_id] = found
            else:
                got = str(found.details["got"] or "")
                reason = no_file(image.listed_as) or found.what
                quarantine.add("image", image.where, reason, image_id=image.image_id, file=image.listed_as, got=got)
    return good


def _look(image: SourceImage) -> GoodImage | ImageError:
    try:
        facts = inspect_image(image.path, image.where)
    except ImageError as error:
        return error
    return GoodImage(image, **asdict(facts))


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths hold the same picture, byte by byte."""
    if not (first.is_file() and second.is_file()):
        return first == second
    # samefile first, as it reads nothing; copies of one image are still the same image.
    return first.samefile(second) or first.read_bytes() == second.read_bytes()


def _two_meanings(what: str, name: str, first: SourceImage, second: SourceImage, got: tuple[str, str]) -> InputError:
    return InputError(
        f"one {what} means two things", where=f"{first.where} and {second.where}",
        got=f"{name}: {got[0]!r}, {got[1]!r}", fix=f"give each its own {what}",
    )  # fmt: skip
