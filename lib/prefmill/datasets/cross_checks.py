"""Checks that need more than one row: order, duplicates, contradictions, leaks, distributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from prefmill.core.records import Split
from prefmill.datasets.examples import CheckedRow
from prefmill.datasets.findings import Findings
from prefmill.datasets.occurrences import FileLine, Files, Occurrences, fingerprint
from prefmill.reviews.prompt import title_and_abstract
from prefmill.reviews.scale import moments

_MIN_ROWS_FOR_RATINGS = 20
_RATING_SHIFT_SD = 0.5  # a shift of means under half a standard deviation is taken for chance
_REVIEW, _SHORT_REVIEW = "review", "short review"
_ABSTRACT = "abstract"  # as of a paper that was given another title: no fault of the splits, which go by titles
_LEAKS = {
    "paper": "paper", "title": "title", _ABSTRACT: "abstract", _REVIEW: "review text",
    _SHORT_REVIEW: "short review text",
}  # fmt: skip


def order_problems(previous: CheckedRow | None, example: CheckedRow) -> Iterator[str]:
    """A row that breaks the order by paper, or asks otherwise than the row before it does for the same paper."""
    if previous is None or previous.paper_id < example.paper_id:
        return
    if previous.paper_id > example.paper_id:
        yield f"paper {example.paper_id} after {previous.paper_id}: the rows of a paper must be together and sorted"
    elif (previous.prompt, previous.images) != (example.prompt, example.images):
        yield f"another prompt for paper {example.paper_id} than in line {previous.line}"


def rating_problems_of(train: Mapping[float, int], val: Mapping[float, int]) -> Iterator[str]:
    """Ratings (value to count) that are all alike, or on average not the same in train and val."""
    for split, counts in (("train", train), ("val", val)):
        if len(counts) == 1 and sum(counts.values()) >= _MIN_ROWS_FOR_RATINGS:
            yield f"every completion of {split} has the rating {next(iter(counts)):g}"
    if min(sum(train.values()), sum(val.values())) < _MIN_ROWS_FOR_RATINGS:
        return
    (mean, deviation, count), (mean_val, _, count_val) = moments(train), moments(val)
    shift = abs(mean - mean_val)
    # The second bound is three standard errors: with few rows in val a large shift may be chance.
    if shift > _RATING_SHIFT_SD * deviation and shift > 3 * deviation * math.sqrt(1 / count + 1 / count_val):
        yield f"the mean rating is {mean:.2f} in train and {mean_val:.2f} in val"


class Repeats:
    """Duplicate and contradictory rows of one kind and modality."""

    def __init__(self, files: Files) -> None:
        self._ids, self._texts, self._reversed = Occurrences(files), Occurrences(files), Occurrences(files)

    def add(self, example: CheckedRow, texts: tuple[int, ...]) -> None:
        """Take in a row; `texts` are the fingerprints of its reviews."""
        place = (example.key.file_name(), example.line)
        self._ids.add(fingerprint(example.row_id), *place)
        self._texts.add(_combine(texts), *place)
        if len(texts) == 2:
            self._reversed.add(_combine(texts[::-1]), *place)

    def report(self, findings: Findings) -> None:
        """Name every row that is there twice or the other way round."""
        same_id = set()
        for first, again in self._ids.repeated():
            same_id.add(again)
            findings.error("duplicates", str(again), f"same id as {first}")
        for first, again in self._texts.repeated():
            # A row that is there twice under one id is an error already.
            if again not in same_id:
                findings.warning("duplicates", str(again), f"same text as {first}, under another id")
        for first, other in self._texts.shared_with(self._reversed):
            # Each contradiction is found from both of its rows, and is told at the later one.
            if first < other:
                findings.error("contradictions", str(other), f"the reverse of the preference in {first}")


class Leaks:
    """What occurs in more than one split, over all datasets, and where given over the corpus's held-out papers.

    Reviews shorter than `min_shared_characters` may repeat by chance ("See my comments above."): those are warnings,
    and so are abstracts, and longer texts that are nearly the same.
    """

    def __init__(self, files: Files, min_shared_characters: int) -> None:
        from prefmill.datasets.near_copies import NearCopies  # here, as it needs numpy, which `--help` does not load

        self._files, self._min_shared_characters = files, min_shared_characters
        self._found: dict[str, dict[str, Occurrences]] = {what: {} for what in _LEAKS}
        self._near = {what: NearCopies(files) for what in (_ABSTRACT, _REVIEW)}

    def add_paper(self, split: Split, paper_id: str, said: tuple[str | None, str | None], file: str, line: int) -> None:
        """Note a paper of `split`, with its title and abstract; short abstracts ("Withdrawn.") may be alike."""
        self._add("paper", split, fingerprint(paper_id), file, line)
        for what, text, least in zip(("title", _ABSTRACT), said, (0, self._min_shared_characters), strict=True):
            if text and len(text) >= least:
                self._add(what, split, fingerprint(text), file, line, text)

    def add_review(self, split: Split, text: str, text_key: int, file: str, line: int) -> None:
        """Note a review of `split`; `text_key` is its fingerprint."""
        what = _REVIEW if len(text) >= self._min_shared_characters else _SHORT_REVIEW
        self._add(what, split, text_key, file, line, text)

    def add_example(self, example: CheckedRow, texts: tuple[int, ...], is_first_of_paper: bool) -> None:
        """Note what a row of a dataset holds."""
        place = (example.key.file_name(), example.line)
        if is_first_of_paper:
            self.add_paper(example.key.split, example.paper_id, title_and_abstract(example.prompt), *place)
        for answer, text in zip(example.answers, texts, strict=True):
            self.add_review(example.key.split, answer.text, text, *place)

    def report(self, findings: Findings) -> None:
        """Name everything of train that is in another split, and everything of val that is in dev or test."""
        for what, splits in self._found.items():
            note = findings.warning if what in (_SHORT_REVIEW, _ABSTRACT) else findings.error
            for split, others in (("train", ("val", "dev", "test")), ("val", ("dev", "test"))):
                for other in others:
                    exact = dict.fromkeys(self._shared(splits, split, other))
                    for place, twin in exact:
                        note("leakage", str(place), f"{_LEAKS[what]} of {split} is also in {other}: {twin}")
                    near = self._near[what].shared(split, other) if what in self._near else ()
                    for place, twin in near:
                        if (place, twin) not in exact:
                            told = f"{_LEAKS[what]} of {split} is nearly the same in {other}: {twin}"
                            findings.warning("leakage", str(place), told)

    def _add(self, what: str, split: str, key: int, file: str, line: int, text: str = "") -> None:
        self._found[what].setdefault(split, Occurrences(self._files)).add(key, file, line)
        if what in self._near:
            self._near[what].add(split, text, key, file, line)

    @staticmethod
    def _shared(splits: Mapping[str, Occurrences], split: str, other: str) -> Iterator[tuple[FileLine, FileLine]]:
        if split in splits and other in splits:
            yield from splits[split].shared_with(splits[other])


class Distribution:
    """What a dataset's rows look like: ratings, differences, lengths, as value to count."""

    def __init__(self) -> None:
        self.num_rows = self.num_papers = 0
        self.columns: dict[str, Counter[float]] = {}

    def add(self, example: CheckedRow, is_first_of_paper: bool) -> None:
        """Take in a row."""
        self.num_rows += 1
        self.num_papers += is_first_of_paper
        names = ("chosen", "rejected") if example.key.kind == "dpo" else ("review",)
        for name, answer in zip(names, example.answers, strict=True):
            self.count(f"{name}_characters", len(answer.text))
            if answer.rating is not None:
                self.count(f"{name}_rating", answer.rating)
        if example.rating_diff is not None and example.checkmark_diff is not None:
            self.count("rating_diff", example.rating_diff)
            self.count("checkmark_diff", example.checkmark_diff)

    def count(self, column: str, value: float) -> None:
        """Note one value of `column`."""
        self.columns.setdefault(column, Counter())[value] += 1

    def ratings(self) -> Mapping[float, int]:
        """The ratings of the reviews to imitate or prefer."""
        return self.columns.get("review_rating") or self.columns.get("chosen_rating") or {}


def _combine(texts: tuple[int, ...]) -> int:
    """One 64-bit key of several, in their order; a tuple of integers hashes alike in every process."""
    return hash(texts) & (1 << 64) - 1
