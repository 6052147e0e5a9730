"""Which split a paper belongs to: decided by its title alone, so that adding papers never moves one."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from typing import Self

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.core.errors import InputError
from prefmill.core.records import Split
from prefmill.reviews.files import read_lines
from prefmill.reviews.rows import RowError, excerpt

# Test is first: its papers depend on its own share alone, not on those of dev, val and train.
_ORDER: tuple[Split, ...] = ("test", "dev", "val", "train")
_NOT_WORD = re.compile(r"[\W_]+")


class SplitConfig(StrictConfig):
    """Shares of the papers, summing to 1: training, its validation, the checklist's own (`dev`), and the test.

    `test_set` is a text file with a paper's id or title a line; those papers are the test, and `test` is then 0.
    `require_test_papers: false` accepts lines that match no paper.
    """

    unread_with = {"test_set=none": ("require_test_papers",)}
    train: float = Field(0.765, gt=0, le=1)
    val: float = Field(0.085, ge=0, lt=1)
    dev: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    seed: int = 0
    test_set: ExternalPath | None = None
    require_test_papers: bool = True

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        total = self.train + self.val + self.dev + self.test
        if abs(total - 1) > 1e-6:  # 0.7 + 0.1 + 0.1 + 0.1 is 0.9999999999999999
            raise ValueError(f"train + val + dev + test is {total:g}; make it 1")
        if self.test_set is not None and self.test > 0:
            raise ValueError("test_set names the test papers: set test to 0 and share it out among the others")
        return self


def title_key(title: str) -> str:
    """What two spellings of a title have in common: its words, without case, accents' encoding and punctuation.

    Raises RowError when the title has no letter or digit.
    """
    # NFKC, as titles copied from PDFs may hold ligatures, or accents apart from their letters.
    key = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", title).casefold()).strip()
    if not key:
        raise RowError(f"title without letters or digits: {excerpt(title)!r}", "correct the title")
    return key


def split_of(key: str, config: SplitConfig) -> Split:
    """The split of the paper with this title key, from a hash of seed and key."""
    # Not hash(), which gives another number for the same text in every process.
    digest = hashlib.sha256(f"{config.seed}/{key}".encode()).digest()
    position = int.from_bytes(digest[:8]) / 2**64
    bound = 0.0
    for name in _ORDER[:-1]:
        bound += getattr(config, name)
        if position < bound:
            return name
    return "train"


def read_test_set(config: SplitConfig, find_title: Callable[[str, str], str | None]) -> frozenset[str]:
    """The title keys of the papers in `test_set`; `find_title` looks one up by a line's text and its title key.

    Raises InputError naming the first line that matches none.
    """
    if config.test_set is None:
        return frozenset()
    found, unmatched = set(), []
    for number, line in read_lines(config.test_set):
        entry = _decode(line, config.test_set, number)
        if not entry:
            continue
        key = find_title(entry, _key_or_nothing(entry))
        if key is None:
            unmatched.append((number, entry))
        else:
            found.add(key)
    # A list of which nothing matches is the wrong file, even where unmatched lines are allowed.
    if not found or (unmatched and config.require_test_papers):
        raise _unmatched(config.test_set, unmatched)
    return frozenset(found)


def _decode(line: bytes, path: ExternalPath, number: int) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError:
        raise InputError("invalid UTF-8", where=f"{path}:{number}", fix="save the file as UTF-8") from None


def _key_or_nothing(entry: str) -> str:
    try:
        return title_key(entry)
    except RowError:
        return ""


def _unmatched(path: ExternalPath, unmatched: list[tuple[int, str]]) -> InputError:
    number, entry = unmatched[0] if unmatched else (1, "nothing")
    return InputError(
        f"{len(unmatched)} entries of the test set match no ingested paper", where=f"{path}:{number}", got=entry,
        expected="the id or title of a paper in the sources, one a line",
        fix="correct these lines, or set splits.require_test_papers: false to accept those that match none",
    )  # fmt: skip
