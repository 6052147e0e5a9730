"""Reads papers and reviews from their sources into one corpus, checked, split by paper and in order."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.stage import Metrics, Stage, Task
from prefmill.reviews.ingest import collect, link, write_corpus
from prefmill.reviews.papers import DocumentReader, PaperConfig, check_folders
from prefmill.reviews.rejects import BadRowConfig, Rejects
from prefmill.reviews.sources import Source
from prefmill.reviews.splits import SplitConfig
from prefmill.reviews.store import CorpusStore


class IngestReviewsConfig(BadRowConfig, PaperConfig):
    """Where the reviews are, how papers are split, and what becomes of bad rows."""

    unread_with = {"pdfs=none": ("workers", "pdf"), "on_bad_row=fail": ("max_quarantined_share",)}
    sources: list[Source] = Field(min_length=1, description="list of sources, each with its `format`")
    splits: SplitConfig = Field(
        default_factory=SplitConfig, description="shares of papers for train, val, dev and test"
    )


def run(config: IngestReviewsConfig, task: Task) -> Metrics:
    """Sources -> papers.jsonl and reviews.jsonl, with the papers' images; interrupted, it reads them again."""
    check_folders(config)
    reader = DocumentReader(config, task.output, task.work)
    with CorpusStore(task.work / "corpus.sqlite") as store:
        rejects = Rejects(config, store)
        tally = collect(config.sources, store, rejects, task.progress)
        link(store, rejects, tally)
        summary = write_corpus(store, reader, config.splits, rejects, tally, task.progress)
    shown = ("papers", "reviews", "quarantined_rows", "merged_titles", "splits", "warnings")
    return {key: summary[key] for key in shown}


STAGE = Stage(
    name="ingest_reviews",
    config=IngestReviewsConfig,
    run=run,
    root="data",
    writes="review_corpus",
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
