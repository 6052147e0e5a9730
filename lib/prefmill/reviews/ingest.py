"""Sources to corpus: collect the rows, make papers of them, split, and write them in order of their ids."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tqdm import tqdm

from prefmill.core.config import StrictConfig
from prefmill.core.errors import InputError
from prefmill.core.files import write_atomic
from prefmill.core.records import Paper
from prefmill.reviews.papers import Document, DocumentReader, read_documents
from prefmill.reviews.rows import (
    DecisionRow,
    Item,
    PaperRow,
    RawRow,
    ReviewRow,
    RowError,
    RowProblem,
    Skipped,
    half_a_pair,
)
from prefmill.reviews.scale import COMMON_SCALE, prompt_scale, rescaled
from prefmill.reviews.source import SourceConfig, problem_with, read_source
from prefmill.reviews.splits import SplitConfig, read_test_set, split_of
from prefmill.reviews.store import CorpusStore, StoredReview
from prefmill.store.jsonl import JsonlWriter
from prefmill.store.missing import Progress

_SHOWN_PROBLEMS, _SHOWN_UNKNOWN = 5, 100
_ROWS_A_LOOK = 64  # at the clock, for the progress
_STORED = (PaperRow, ReviewRow, DecisionRow)
_log = logging.getLogger(__name__)


class BadRowConfig(StrictConfig):
    """What becomes of rows that cannot be used: `fail` at the first, or set them aside up to a share of all rows."""

    on_bad_row: Literal["fail", "quarantine"] = Field(
        "fail", description="`fail` at the first unusable row, or `quarantine` it"
    )
    max_quarantined_share: float = Field(
        0.01, ge=0, le=1, description="an error when more than this share of the rows is in quarantine"
    )


@dataclass
class IngestTally:
    """What was read and written, for the summary."""

    rows: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    splits: Counter[str] = field(default_factory=Counter)
    split_reviews: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    ratings: Counter[float] = field(default_factory=Counter)
    text_from: Counter[str] = field(default_factory=Counter)
    pages: int = 0
    figures: int = 0
    unreviewed: int = 0
    repeated: int = 0
    merged: list[tuple[str, str]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    left_out: int = 0

    def warnings(self) -> list[str]:
        """What someone who reads the numbers must know, a sentence each."""
        titles, gone = self.text_from["nothing"], self.left_out
        said = {
            f"{titles} papers have neither text nor abstract: models see their titles only": titles,
            f"{gone} papers with neither text nor abstract were left out, with their reviews": gone,
            f"{self.repeated} reviews were listed again, word for word, and count once": self.repeated,
            f"{len(self.merged)} papers were merged into others with the same title": self.merged,
            f"{self.unknown.total()} values are unknown and were left out: {_named(self.unknown)}": self.unknown,
        }
        return [text for text, happened in said.items() if happened]


@dataclass(frozen=True)
class Rejects:
    """Where problems go."""

    config: BadRowConfig
    store: CorpusStore

    def add(self, problem: RowProblem) -> None:
        """Set the row aside, or raise InputError naming its file, line and fix."""
        if self.config.on_bad_row == "fail":
            raise InputError(
                problem.reason, where=problem.place, got=problem.excerpt or None,
                fix=f"{problem.fix}; or set on_bad_row: quarantine to set such rows aside",
            )  # fmt: skip
        self.store.add_problem(problem)

    def check_share(self, num_rows: int) -> None:
        """Raises InputError, showing the first problems, when more rows were set aside than allowed."""
        count = self.store.count("problems")
        if count <= self.config.max_quarantined_share * num_rows:
            return
        raise InputError(
            f"{count} of {num_rows} rows cannot be used", got=self.shown(),
            expected=f"at most {self.config.max_quarantined_share:.2%} (max_quarantined_share)",
            fix="correct the source, or raise max_quarantined_share",
        )  # fmt: skip

    def shown(self) -> str:
        """The first problems, a line each."""
        first = itertools.islice(self.store.problems(), _SHOWN_PROBLEMS)
        return "\n".join(["", *(f"    {problem.place}: {problem.reason}" for problem in first)])


def collect(sources: Sequence[SourceConfig], store: CorpusStore, rejects: Rejects, progress: Progress) -> IngestTally:
    """Read every source into `store`. Raises InputError for a source without rows."""
    tally = IngestTally()
    for number, source in enumerate(sources):
        counts, before = Counter[str](), tally.rows
        for row in tqdm(read_source(source, number), desc=f"source {number}", unit="row", unit_scale=True):
            if not tally.rows % _ROWS_A_LOOK:
                # No total: to count the rows, every source would have to be read twice.
                progress(tally.rows, None, "rows")
            tally.rows += 1
            _take(row, store, rejects, counts, tally.unknown)
        counts["rows"] = tally.rows - before
        if not counts["rows"]:
            raise InputError(
                "a source without rows", where=getattr(source, "path", "sources"), got="0 rows",
                fix="check that this is the file you meant, or remove the source",
            )  # fmt: skip
        tally.sources.append({"format": getattr(source, "format", ""), **dict(sorted(counts.items()))})
    return tally


def link(store: CorpusStore, rejects: Rejects, tally: IngestTally) -> None:
    """Make whole papers of what was collected: decisions, no orphans, one paper a title."""
    for problem in store.link():
        rejects.add(problem)
    # Before titles are merged: a merged paper has the smallest id, which must not be that of a dropped paper.
    tally.unreviewed = store.drop_unreviewed()
    tally.merged = store.merge_titles()
    tally.repeated = store.num_repeated


def write_corpus(
    store: CorpusStore,
    reader: DocumentReader,
    splits: SplitConfig,
    rejects: Rejects,
    tally: IngestTally,
    progress: Progress,
) -> dict[str, Any]:
    """Write `papers.jsonl`, `reviews.jsonl`, `quarantine.jsonl` and `summary.json`; returns the summary.

    Papers and reviews are in order of their ids. Raises InputError when too many rows were set aside or none is left;
    no file appears then.
    """
    test_ids = read_test_set(splits, store.find_paper)
    with contextlib.ExitStack() as stack:
        papers = stack.enter_context(JsonlWriter(reader.output / "papers.jsonl"))
        reviews = stack.enter_context(JsonlWriter(reader.output / "reviews.jsonl"))
        located = (((place, key), paper) for place, paper, key in store.papers())
        reviews_of = _InOrder(store.reviews_by_paper())
        num_papers = store.count("papers")
        bar = tqdm(read_documents(located, reader), desc="corpus", unit="paper", total=num_papers)
        for done, ((place, key), paper, document) in enumerate(bar, 1):
            progress(done, num_papers, "papers")
            if isinstance(document, RowError):
                reason = f"{document.reason}; its reviews go with it"
                rejects.add(RowProblem(place, reason, document.fix, paper.title))
                continue
            if document.text_from == "nothing" and reader.config.title_only == "drop":
                tally.left_out += 1
                continue
            row = _paper(paper, document, "test" if paper.paper_id in test_ids else split_of(key, splits))
            written = reviews_of[paper.paper_id]
            scale = prompt_scale([review.scale for review in written])
            # No key on 1 to 10: a corpus that was made before rows kept their scale has the same bytes.
            papers.write(row if scale == COMMON_SCALE else {**row, "scale": list(scale)})
            for review in written:
                reviews.write_line(review.json)
                tally.ratings[rescaled(review.rating, review.scale, COMMON_SCALE)] += 1
            _count(tally, row, document, len(written))
        # Still inside the writers' block: they rename their files only when it ends without an error.
        rejects.check_share(tally.rows)
        if not reviews.num_rows:
            # What is set aside is published with a corpus alone: here it would be in no file.
            skipped = [f"{count} {kind}" for counts in tally.sources for kind, count in counts.items() if ":" in kind]
            got = f"{tally.rows} rows; {tally.left_out} papers left out (title_only){rejects.shown()}"
            raise InputError(
                "no review is left", got="; ".join([got, *skipped]),
                fix="correct the sources; of OpenReview's notes, name those of reviews in review_invitations",
            )  # fmt: skip
    if rejects.config.on_bad_row == "quarantine":
        # Last, as documents that cannot be read are found while the papers are written.
        _write_quarantine(store, reader.output / "quarantine.jsonl")
    for warning in tally.warnings():
        _log.warning("%s", warning)
    summary = _summary(tally, papers.num_rows, reviews.num_rows, store.count("problems"))
    write_atomic(reader.output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


class _InOrder:
    """Groups that come in order of their keys, looked up by rising keys; those that nobody asks for are passed over."""

    def __init__(self, groups: Iterator[tuple[str, list[StoredReview]]]) -> None:
        self._groups = groups

    def __getitem__(self, key: str) -> list[StoredReview]:
        return next((rows for name, rows in self._groups if name == key), [])


def _take(
    row: tuple[RawRow, list[Item]] | RowProblem,
    store: CorpusStore,
    rejects: Rejects,
    counts: Counter[str],
    unknown: Counter[str],
) -> None:
    if isinstance(row, RowProblem):
        rejects.add(row)
        return
    read, items = row
    try:
        for item in items:
            if isinstance(item, _STORED):
                # A row's paper stays in the store where its review is at fault: other rows bring more reviews of it.
                store.add(read.place, item)
            elif isinstance(item, Skipped):
                counts[f"skipped: {item.kind}"] += 1
            else:
                unknown[str(item)] += 1
    except RowError as error:
        rejects.add(problem_with(read, error))
    except UnicodeEncodeError:  # texts were looked at; what remains is the name of a score, which nobody cleans
        rejects.add(problem_with(read, half_a_pair("a field's name")))


def _paper(paper: PaperRow, document: Document, split: Any) -> Paper:
    return {
        "paper_id": paper.paper_id,
        "title": paper.title,
        "abstract": paper.abstract,
        "text": document.text,
        "decision": paper.decision,
        "venue": paper.venue,
        "split": split,
        "pages": document.pages,
        "figures": document.figures,
    }


def _count(tally: IngestTally, paper: Paper, document: Document, num_reviews: int) -> None:
    tally.splits[paper["split"]] += 1
    tally.split_reviews[paper["split"]] += num_reviews
    tally.decisions[paper["decision"] or "unknown"] += 1
    tally.text_from[document.text_from] += 1
    tally.pages += len(paper["pages"])
    tally.figures += len(paper["figures"])


def _named(unknown: Counter[str]) -> str:
    shown = [f"{name} ({count})" for name, count in unknown.most_common(_SHOWN_PROBLEMS)]
    return ", ".join([*shown, *(["..."] if len(unknown) > len(shown) else [])])


def _write_quarantine(store: CorpusStore, path: Path) -> None:
    """One row a problem; files by name only, so that the content does not depend on where they lie."""
    with JsonlWriter(path) as writer:
        for problem in store.problems():
            place = problem.place
            writer.write(
                {
                    "source": place.source,
                    "file": Path(place.file).name,
                    "line": place.line,
                    "item": place.item,
                    "reason": problem.reason,
                    "fix": problem.fix,
                    "row": problem.excerpt,
                }
            )


def _summary(tally: IngestTally, num_papers: int, num_reviews: int, num_quarantined: int) -> dict[str, Any]:
    return {
        "papers": num_papers,
        "reviews": num_reviews,
        "rows": tally.rows,
        "quarantined_rows": num_quarantined,
        "repeated_reviews": tally.repeated,
        "papers_without_reviews": tally.unreviewed,
        "merged_titles": len(tally.merged),
        "merged_ids": dict(tally.merged[:20]),
        "splits": {
            name: {"papers": tally.splits[name], "reviews": tally.split_reviews[name]}
            for name in ("train", "val", "dev", "test")
        },
        "decisions": dict(sorted(tally.decisions.items())),
        "ratings": {f"{rating:g}": count for rating, count in sorted(tally.ratings.items())},
        "text_from": dict(sorted(tally.text_from.items())),
        "pages": tally.pages,
        "figures": tally.figures,
        "title_only_papers_left_out": tally.left_out,
        "unknown": dict(tally.unknown.most_common(_SHOWN_UNKNOWN)),
        "warnings": tally.warnings(),
        "sources": tally.sources,
    }
