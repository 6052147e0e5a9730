"""Where keys occur, in 16 bytes an occurrence, so that a million rows can be searched for duplicates and leaks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from typing import NamedTuple

_LINE_BITS = 40  # the rest of a place's 64 bits number the file


class FileLine(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Files:
    """Numbers for file names, shared by the occurrences that are compared."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}

    def code(self, file: str, line: int) -> int:
        """A line of a file as one number."""
        if file not in self._numbers:
            self._numbers[file] = len(self._names)
            self._names.append(file)
        return self._numbers[file] << _LINE_BITS | line

    def place(self, code: int) -> FileLine:
        """The line of a file that `code` stands for."""
        return FileLine(self._names[code >> _LINE_BITS], code & ((1 << _LINE_BITS) - 1))


class Occurrences:
    """Every place where each of many keys occurs."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._keys, self._places = array("Q"), array("Q")

    def add(self, key: int, file: str, line: int) -> None:
        """Note that `key` (64 bits, see `fingerprint`) occurs there."""
        self._keys.append(key)
        self._places.append(self._files.code(file, line))

    def repeated(self) -> Iterator[tuple[FileLine, FileLine]]:
        """For every occurrence but a key's first: that first place, and its own."""
        import numpy as np

        if not self._keys:
            return
        keys, places = np.asarray(self._keys), np.asarray(self._places)
        # lexsort takes its last argument first: equal keys come together, the first place first.
        order = np.lexsort((places, keys))
        keys, places = keys[order], places[order]
        repeats = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        firsts = np.searchsorted(keys, keys[repeats])
        for first, again in sorted(zip(places[firsts].tolist(), places[repeats].tolist(), strict=True)):
            yield self._files.place(first), self._files.place(again)

    def shared_with(self, other: Occurrences) -> Iterator[tuple[FileLine, FileLine]]:
        """For every key that occurs in both: its first place here and its first place there."""
        import numpy as np

        if not self._keys or not other._keys:
            return
        mine, my_first = np.unique(np.asarray(self._keys), return_index=True)
        theirs, their_first = np.unique(np.asarray(other._keys), return_index=True)
        _, here, there = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
        found = zip(my_first[here].tolist(), their_first[there].tolist(), strict=True)
        for first, second in sorted((self._places[a], other._places[b]) for a, b in found):
            yield self._files.place(first), self._files.place(second)


def fingerprint(*parts: str) -> int:
    """64 bits of a hash of texts, blind to case and to the amount of white space."""
    # split() takes \x1f for white space, so no part can hold the separator that stands between parts.
    normal = "\x1f".join(" ".join(part.casefold().split()) for part in parts)
    # 64 bits: that two of a million texts agree by chance has a probability of 3e-8.
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest())
