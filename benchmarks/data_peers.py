"""The work of ingest_reviews and build_datasets as a script with polars or orjson does it, to be measured beside ours.

    python -m benchmarks.data_peers FOLDER ingest_polars|ingest_orjson|build_orjson

Ingest: read a table of reviews, check what a row must have, one row a paper, a split by the hash of its title, both
files in order. Build: join the scores, the best fifth by score for SFT, pairs of a paper whose rating and score agree.
None names a faulty line, merges titles, reports what was dropped, resumes or publishes; FOLDER holds `reviews.jsonl`.
polars is not among the requirements: `pip install polars` first.
"""

from __future__ import annotations

import hashlib
import re
import sys
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

_NOT_IN_KEY = re.compile(r"[\W_]+")
_PAPER = ("paper_id", "title", "abstract", "text", "decision", "venue")
_RATING, _CHECKMARK, _FRACTION, _TRAIN = 2.0, 2.0, 0.2, 0.85


def _position(title: str) -> float:
    key = _NOT_IN_KEY.sub(" ", title.casefold()).strip()
    return int.from_bytes(hashlib.sha256(f"0/{key}".encode()).digest()[:8]) / 2**64


def ingest_polars(folder: Path) -> None:
    """Two sorted files by expressions over columns."""
    import polars as pl

    rows = pl.read_ndjson(folder / "reviews.jsonl")
    assert rows["rating"].is_between(1, 10).all()
    assert (rows["review_text"].str.strip_chars().str.len_chars() > 0).all()
    assert rows["review_id"].is_unique().all()
    papers = rows.select(*_PAPER).unique("paper_id").sort("paper_id")
    split = [("train" if _position(title) > 1 - _TRAIN else "val") for title in papers["title"]]
    papers.with_columns(pl.Series("split", split)).write_ndjson(folder / "polars_papers.jsonl")
    kept = rows.select(
        "review_id", "paper_id", pl.col("review_text").str.strip_chars().alias("text"),
        pl.col("rating").cast(pl.Float64), "confidence", "venue", "sub_scores",
    )  # fmt: skip
    kept.sort("paper_id", "review_id").write_ndjson(folder / "polars_reviews.jsonl")


def ingest_orjson(folder: Path) -> None:
    """The same, row by row, all rows in memory."""
    import orjson

    papers: dict[str, Any] = {}
    reviews: list[Any] = []
    with (folder / "reviews.jsonl").open("rb") as stream:
        for line in stream:
            row = orjson.loads(line)
            assert 1 <= row["rating"] <= 10
            text = row["review_text"].strip()
            assert text
            if row["paper_id"] not in papers:
                split = "train" if _position(row["title"]) > 1 - _TRAIN else "val"
                papers[row["paper_id"]] = {**{key: row.get(key) for key in _PAPER}, "split": split}
            reviews.append({
                "review_id": row["review_id"], "paper_id": row["paper_id"], "text": text,
                "rating": float(row["rating"]), "confidence": row.get("confidence"),
                "venue": row.get("venue"), "sub_scores": row.get("sub_scores"),
            })  # fmt: skip
    assert len({row["review_id"] for row in reviews}) == len(reviews)
    reviews.sort(key=lambda row: (row["paper_id"], row["review_id"]))
    _write(folder / "orjson_papers.jsonl", [papers[key] for key in sorted(papers)])
    _write(folder / "orjson_reviews.jsonl", reviews)


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


if __name__ == "__main__":
    {"ingest_polars": ingest_polars, "ingest_orjson": ingest_orjson, "build_orjson": build_orjson}[sys.argv[2]](
        Path(sys.argv[1])
    )
