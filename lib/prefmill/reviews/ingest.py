"""Sources to corpus: collect the rows, make papers of them, split, and write them in order of their ids."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefmill.core.errors import InputError
from prefmill.core.files import write_json
from prefmill.core.records import Paper
from prefmill.reviews.files import PlainRow
from prefmill.reviews.markup import holds_html
from prefmill.reviews.papers import Document, DocumentReader, read_documents
from prefmill.reviews.rejects import Rejects
from prefmill.reviews.rows import (
    DecisionRow,
    DeletedRow,
    Item,
    PaperRow,
    RawRow,
    ReviewRow,
    RowError,
    RowProblem,
    Skipped,
    half_a_pair,
)
from prefmill.reviews.scale import COMMON_SCALE, prompt_scale
from prefmill.reviews.source import SourceConfig, problem_with, read_source
from prefmill.reviews.splits import SplitConfig, read_test_set, split_of
from prefmill.reviews.store import CorpusStore, StoredReview
from prefmill.reviews.tally import IngestTally
from prefmill.store.jsonl import JsonlWriter, encode_checked
from prefmill.store.missing import Progress

_SHOWN_UNKNOWN = 100
_SHEETS_CELL = 32_767  # characters, by which sheets and what writes them cut a cell without a word
_ROWS_A_LOOK = 64  # at the clock, for the progress
_STORED = (PaperRow, ReviewRow, DecisionRow, DeletedRow)
_log = logging.getLogger(__name__)


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
            _take(row, store, rejects, counts, tally)
        counts["rows"] = tally.rows - before
        if not counts["rows"]:
            raise InputError(
                "a source without rows", where=getattr(source, "path", "sources"), got="0 rows",
                fix="check that this is the file you meant, or remove the source",
            )  # fmt: skip
        tally.in_words.append(source.ratings_by_words)
        tally.sources.append({"format": getattr(source, "format", ""), **dict(sorted(counts.items()))})
    return tally


def link(store: CorpusStore, rejects: Rejects, tally: IngestTally) -> None:
    """Make whole papers of what was collected: decisions, no orphans, one paper a title."""
    store.drop_deleted()
    tally.orphans = store.drop_orphans(all_of_them=rejects.config.unknown_papers == "drop")
    for problem in store.link():
        rejects.add(problem)
    # Before titles are merged: a merged paper has the smallest id, which must not be that of a dropped paper.
    tally.unreviewed = store.drop_unreviewed()
    tally.merged = store.merge_titles()
    tally.apart, tally.older, tally.deleted = store.num_apart, store.num_older, store.num_deleted


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
    test_titles = read_test_set(splits, store.find_title)
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
            row = _paper(paper, document, "test" if key in test_titles else split_of(key, splits))
            written = reviews_of[paper.paper_id]
            scale = prompt_scale([review.scale for review in written])
            # No key on 1 to 10: a corpus that was made before rows kept their scale has the same bytes.
            papers.write_line(encode_checked(row if scale == COMMON_SCALE else {**row, "scale": list(scale)}))
            if written:
                lines = b"\n".join([review.json for review in written])
                # Of reviews in a table of their own; inside a text these quotes would be escaped.
                lines = lines.replace(b'"venue":""', b'"venue":' + encode_checked(paper.venue))
                reviews.write_line(lines, len(written))
            told = row["venue"], row["decision"]
            tally.ratings.update([(review.source, *told, review.scale, review.rating) for review in written])
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
    tally.repeated = store.num_repeated
    for warning in tally.warnings():
        _log.warning("%s", warning)
    summary = _summary(tally, papers.num_rows, reviews.num_rows, store.count("problems"))
    write_json(reader.output / "summary.json", summary)
    return summary


class _InOrder:
    """Groups that come in order of their keys, looked up by rising keys; those that nobody asks for are passed over."""

    def __init__(self, groups: Iterator[tuple[str, list[StoredReview]]]) -> None:
        self._groups = groups

    def __getitem__(self, key: str) -> list[StoredReview]:
        return next((rows for name, rows in self._groups if name == key), [])


def _take(
    row: tuple[RawRow | PlainRow, list[Item]] | RowProblem,
    store: CorpusStore,
    rejects: Rejects,
    counts: Counter[str],
    tally: IngestTally,
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
                if isinstance(item, ReviewRow) and holds_html(item.text):
                    tally.html += 1
                tally.cut += isinstance(item, (PaperRow, ReviewRow)) and len(item.text) == _SHEETS_CELL
            elif isinstance(item, Skipped):
                counts[f"skipped: {item.kind}"] += 1
            else:
                tally.unknown[str(item)] += 1
    except RowError as error:
        rejects.add(problem_with(read, error))
    except UnicodeEncodeError:  # texts were looked at; what remains is the name of a score, which nobody cleans
        rejects.add(problem_with(read, half_a_pair("a field's name")))


def _paper(paper: PaperRow, document: Document, split: Any) -> Paper:
    return {
        "paper_id": paper.paper_id, "title": paper.title, "abstract": paper.abstract, "text": document.text,
        "decision": paper.decision, "venue": paper.venue, "split": split, "pages": document.pages,
        "figures": document.figures,
    }  # fmt: skip


def _count(tally: IngestTally, paper: Paper, document: Document, num_reviews: int) -> None:
    tally.splits[paper["split"]] += 1
    tally.split_reviews[paper["split"]] += num_reviews
    tally.decisions[paper["decision"] or "unknown"] += 1
    tally.text_from[document.text_from] += 1
    tally.pages += len(paper["pages"])
    tally.figures += len(paper["figures"])


def _write_quarantine(store: CorpusStore, path: Path) -> None:
    """One row a problem; files by name only, so that the content does not depend on where they lie."""
    with JsonlWriter(path) as writer:
        for problem in store.problems():
            place = problem.place
            writer.write({
                "source": place.source, "file": Path(place.file).name, "line": place.line, "item": place.item,
                "reason": problem.reason, "fix": problem.fix, "row": problem.excerpt,
            })  # fmt: skip


def _summary(tally: IngestTally, num_papers: int, num_reviews: int, num_quarantined: int) -> dict[str, Any]:
    return {
        "papers": num_papers, "reviews": num_reviews, "rows": tally.rows, "quarantined_rows": num_quarantined,
        "repeated_reviews": tally.repeated, "older_versions": tally.older, "deleted": tally.deleted,
        "reviews_without_paper": dict(itertools.islice(tally.orphans.items(), _SHOWN_UNKNOWN)),
        "papers_without_reviews": tally.unreviewed,
        "merged_titles": len(tally.merged),
        "merged_ids": dict(tally.merged[:20]),
        "splits": {
            name: {"papers": tally.splits[name], "reviews": tally.split_reviews[name]}
            for name in ("train", "val", "dev", "test")
        },
        "decisions": dict(sorted(tally.decisions.items())),
        "ratings": {f"{rating:g}": count for rating, count in sorted(tally.common_ratings().items())},
        "text_from": dict(sorted(tally.text_from.items())),
        "pages": tally.pages, "figures": tally.figures, "title_only_papers_left_out": tally.left_out,
        "unknown": dict(tally.unknown.most_common(_SHOWN_UNKNOWN)),
        "warnings": tally.warnings(), "sources": tally.sources,
    }  # fmt: skip
