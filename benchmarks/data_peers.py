"""The work of ingest_reviews and build_datasets as a script with polars or orjson does it, to be measured beside ours.

    python -m benchmarks.data_peers FOLDER ingest_polars|ingest_orjson|build_orjson

Ingest: read a table of reviews, check every field of a row, clean its texts, one row a paper that its rows agree on,
one paper a title, a split by the hash of the title, both files in order, synced and hashed: the same bytes as ours.
Build: join the scores, the best fifth by score for SFT, pairs of a paper whose rating and score agree.
None names a faulty line or sets one aside, reads numbers in words, resumes or publishes; FOLDER holds `reviews.jsonl`.
polars is not among the requirements: `pip install polars` first.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import unicodedata
from collections import Counter
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
_NOT_IN_ID = r"[\s/\\\x00-\x1f\x7f-\x9f]|^\.|^.{201}|^$"
_NOT_IN_KEY = r"[\W_]+"
_PAPER = ("paper_id", "title", "abstract", "text", "decision", "venue")
_FIELDS = {*_PAPER, "review_id", "review_text", "rating", "confidence", "sub_scores"}
_DECISIONS = {"accepted", "rejected", "withdrawn", "desk_rejected"}
_SHARES = (("test", 0.1), ("dev", 0.05), ("val", 0.085))
_RATING, _CHECKMARK, _FRACTION = 2.0, 2.0, 0.2


def _split(key: str) -> str:
    position = int.from_bytes(hashlib.sha256(f"0/{key}".encode()).digest()[:8]) / 2**64
    for name, share in _SHARES:
        if position < share:
            return name
        position -= share
    return "train"


def ingest_polars(folder: Path) -> None:
    """Two sorted files by expressions over columns."""
    import polars as pl

    rows = pl.read_ndjson(folder / "reviews.jsonl")
    assert set(rows.columns) <= _FIELDS
    assert rows["rating"].is_between(1, 10).all()
    assert not rows.select(pl.any_horizontal(pl.col("paper_id", "review_id").str.contains(_NOT_IN_ID).any())).item()
    texts = pl.col("review_text", "title", "abstract", "text", "decision", "venue")
    rows = rows.with_columns(texts.str.replace_all(r"\r\n?", "\n").str.replace_all(_CONTROL, "").str.strip_chars())
    assert not rows.select(pl.any_horizontal((pl.col("review_text", "title") == "").any())).item()
    assert rows["decision"].drop_nulls().is_in(_DECISIONS).all()
    assert rows["review_id"].is_unique().all()
    papers = rows.select(*_PAPER).unique()
    assert papers["paper_id"].is_unique().all()
    key = pl.col("title").str.normalize("NFKC").str.to_lowercase().str.replace_all(_NOT_IN_KEY, " ").str.strip_chars()
    papers = papers.sort("paper_id").with_columns(key.alias("key"))
    kept = papers.select("paper_id", pl.col("paper_id").first().over("key").alias("kept"))
    papers = papers.unique("key", keep="first", maintain_order=True)
    papers = papers.with_columns(
        pl.Series("split", [_split(key) for key in papers["key"]]),
        *(pl.lit([], pl.List(pl.String)).alias(name) for name in ("pages", "figures")),
    ).drop("key")
    papers.write_ndjson(folder / "polars_papers.jsonl")
    confidence = pl.col("confidence").cast(pl.Float64)
    numbers = pl.Struct(dict.fromkeys(rows["sub_scores"].struct.fields, pl.Float64))
    reviews = rows.join(kept, "paper_id").select(
        "review_id", pl.col("kept").alias("paper_id"), pl.col("review_text").alias("text"),
        pl.col("rating").cast(pl.Float64), pl.when(confidence.is_between(1, 5)).then(confidence).alias("confidence"),
        "venue", pl.col("sub_scores").cast(numbers),
    ).sort("paper_id", "review_id")  # fmt: skip
    reviews.write_ndjson(folder / "polars_reviews.jsonl")
    counts = (reviews["rating"].value_counts(), papers["split"].value_counts(), papers["decision"].value_counts())
    print(*counts, *map(_published, (folder / "polars_papers.jsonl", folder / "polars_reviews.jsonl")))


def ingest_orjson(folder: Path) -> None:
    """The same, row by row, all rows in memory."""
    import orjson

    papers: dict[str, Any] = {}
    reviews: list[Any] = []
    with (folder / "reviews.jsonl").open("rb") as stream:
        for line in stream:
            row = orjson.loads(line)
            assert row.keys() <= _FIELDS
            assert 1 <= row["rating"] <= 10
            assert row["decision"] is None or row["decision"] in _DECISIONS
            assert not any(re.search(_NOT_IN_ID, row[name]) for name in ("paper_id", "review_id"))
            paper = {name: _clean(row.get(name)) for name in _PAPER}
            text, sure = _clean(row["review_text"]), row.get("confidence")
            assert text
            assert paper["title"]
            assert papers.setdefault(row["paper_id"], paper) == paper
            reviews.append({
                "review_id": row["review_id"], "paper_id": row["paper_id"], "text": text,
                "rating": float(row["rating"]), "confidence": float(sure) if 1 <= (sure or 0) <= 5 else None,
                "venue": paper["venue"],
                "sub_scores": {name: float(score) for name, score in row["sub_scores"].items()},
            })  # fmt: skip
    assert len({row["review_id"] for row in reviews}) == len(reviews)
    first: dict[str, str] = {}
    kept: dict[str, str] = {}
    for paper_id in sorted(papers):
        key = re.sub(_NOT_IN_KEY, " ", unicodedata.normalize("NFKC", papers[paper_id]["title"]).casefold()).strip()
        kept[paper_id] = first.setdefault(key, paper_id)
    written = [
        {**papers[paper_id], "split": _split(key), "pages": [], "figures": []} for key, paper_id in first.items()
    ]
    reviews = [{**row, "paper_id": kept[row["paper_id"]]} for row in reviews]
    reviews.sort(key=lambda row: (row["paper_id"], row["review_id"]))
    _write(folder / "orjson_papers.jsonl", written)
    _write(folder / "orjson_reviews.jsonl", reviews)
    counts = (Counter(row["rating"] for row in reviews), Counter(paper["split"] for paper in written))
    print(*counts, *map(_published, (folder / "orjson_papers.jsonl", folder / "orjson_reviews.jsonl")))


def _clean(text: str | None) -> str | None:
    return text and re.sub(_CONTROL, "", re.sub(r"\r\n?", "\n", text)).strip()


def _published(path: Path) -> str:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def build_orjson(folder: Path) -> None:
    """SFT and DPO rows from what ingest_orjson wrote and `evaluations.jsonl`."""
    papers = {row["paper_id"]: row for row in _read(folder / "orjson_papers.jsonl")}
    scores = {row["review_id"]: row["checkmark_score"] for row in _read(folder / "evaluations.jsonl")}
    reviews = _read(folder / "orjson_reviews.jsonl")
    ranked = sorted(
        (scores[row["review_id"]] for row in reviews if papers[row["paper_id"]]["split"] == "train"), reverse=True
    )
    cut = ranked[int(_FRACTION * len(ranked)) - 1]
    sft: dict[str, list[Any]] = {"train": [], "val": []}
    dpo: dict[str, list[Any]] = {"train": [], "val": []}
    reviews = [row for row in reviews if papers[row["paper_id"]]["split"] in sft]
    for paper_id, group in groupby(reviews, key=lambda row: row["paper_id"]):
        paper, some = papers[paper_id], list(group)
        prompt = (
            f"Review this paper.\n\nTitle: {paper['title']}\n\nAbstract: {paper['abstract']}\n\nPaper: {paper['text']}"
        )
        good = (row for row in some if scores[row["review_id"]] >= cut)
        sft[paper["split"]] += [_sft(prompt, row) for row in good]
        if paper["decision"] == "accepted":
            dpo[paper["split"]] += [_dpo(prompt, *pair) for pair in combinations(some, 2) if _differs(*pair, scores)]
    for split in ("train", "val"):
        _write(folder / f"orjson_sft_{split}.jsonl", sft[split])
        _write(folder / f"orjson_dpo_{split}.jsonl", dpo[split])


def _differs(one: Any, two: Any, scores: dict[str, float]) -> bool:
    rating, score = one["rating"] - two["rating"], scores[one["review_id"]] - scores[two["review_id"]]
    return abs(rating) >= _RATING and abs(score) >= _CHECKMARK and rating * score > 0


def _sft(prompt: str, row: Any) -> Any:
    answer = {"role": "assistant", "content": f"{row['text']}\nRating: {row['rating']:g}"}
    return {
        "id": row["review_id"],
        "paper_id": row["paper_id"],
        "messages": [{"role": "user", "content": prompt}, answer],
    }


def _dpo(prompt: str, one: Any, two: Any) -> Any:
    chosen, rejected = (one, two) if one["rating"] > two["rating"] else (two, one)
    sides = {name: {"from": "gpt", "value": f"{row['text']}\nRating: {row['rating']:g}"}
             for name, row in (("chosen", chosen), ("rejected", rejected))}  # fmt: skip
    return {"id": f"{chosen['review_id']}:{rejected['review_id']}", "group": one["paper_id"],
            "conversations": [{"from": "human", "value": prompt}], **sides}  # fmt: skip


def _read(path: Path) -> list[Any]:
    import orjson

    with path.open("rb") as stream:
        return [orjson.loads(line) for line in stream]


def _write(path: Path, rows: list[Any]) -> None:
    import orjson

    with path.open("wb") as stream:
        stream.writelines(orjson.dumps(row) + b"\n" for row in rows)


def main() -> None:
    """Do one script's work on the reviews of a folder."""
    works = {work.__name__: work for work in (ingest_polars, ingest_orjson, build_orjson)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with reviews.jsonl; files are written there")
    parser.add_argument("work", choices=works)
    arguments = parser.parse_args()
    works[arguments.work](arguments.folder)


if __name__ == "__main__":
    main()
