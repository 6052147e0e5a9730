"""Reviews as venues write them: each stated outcome, from rows to preference pairs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from review_artifacts import contents, make_artifact, make_scores, make_task, read_rows

from prefmill.core.artifact import Artifact
from prefmill.core.config import load
from prefmill.core.errors import ConfigError, InputError
from prefmill.store.jsonl import write_jsonl
from stages.build_datasets import BuildDatasetsConfig
from stages.build_datasets import run as build_stage
from stages.ingest_reviews import STAGE as INGEST

CASES = Path(__file__).parents[3] / "shared" / "cases" / "reviews"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not beside this checkout")
SCALES = {"scale_0_10": (0, 10), "scale_1_5": (1, 5), "scale_minus3_3": (-3, 3)}
WORDS = {
    "strong reject": 1, "reject": 3, "weak reject": 4, "borderline": 5, "weak accept": 6, "accept": 8,
    "strong accept": 10,
}  # fmt: skip


def ingest(folder: Path, case: str, config: dict[str, Any] | None = None, **source: Any) -> Artifact:
    task = make_task(folder / "ingest", "ingest_reviews", {})
    splits = {"train": 1, "val": 0, "dev": 0, "test": 0}
    notes = case.startswith("openreview")
    where = {
        "format": "openreview_v2" if notes else "jsonl",
        "path": str(CASES / f"{case}.{'json' if notes else 'jsonl'}"),
    }
    INGEST.run(load(INGEST.config, {"sources": [{**where, **source}], "splits": splits, **(config or {})}), task)
    return make_artifact(task.output, "review_corpus")


def pairs(folder: Path, corpus: Artifact, **config: Any) -> list[dict[str, Any]]:
    """The preference pairs where the checklist agrees with the ratings."""
    reviews = read_rows(corpus.file("reviews.jsonl"))
    order = {value: place for place, value in enumerate(sorted({row["rating"] for row in reviews}))}
    evaluations = [
        {
            "review_id": row["review_id"], "paper_id": row["paper_id"], "answers": {}, "engine": "test",
            "checkmark_score": 3.0 * order[row["rating"]], "mean_p_yes": 0.5,
        }
        for row in reviews
    ]  # fmt: skip
    task = make_task(folder / "build", "build_datasets", {
        "corpus": (corpus,), "scores": make_scores(folder / "scores", corpus, evaluations),
    })  # fmt: skip
    build_stage(load(BuildDatasetsConfig, {"modalities": ["clean"], "splits": ["train"], **config}), task)
    (name,) = (name for name in contents(task) if name.startswith("dpo_") and name.endswith("data.jsonl"))
    return read_rows(task.output / name)


@pytest.mark.parametrize("case", SCALES)
def test_a_scale_is_kept_and_named_in_the_prompt(tmp_path: Path, case: str) -> None:
    low, high = SCALES[case]
    corpus = ingest(tmp_path, case, rating_min=low, rating_max=high)
    rows = read_rows(corpus.file("reviews.jsonl"))
    assert {tuple(row["scale"]) for row in rows} == {(low, high)}
    assert min(row["rating"] for row in rows) == low
    assert {f"N from {low} to {high}." in row["conversations"][0]["value"] for row in pairs(tmp_path, corpus)} == {True}


@pytest.mark.parametrize("case", SCALES)
def test_an_affine_map_of_a_corpus_gives_the_same_pairs(tmp_path: Path, case: str) -> None:
    low, high = SCALES[case]
    rows = read_rows(CASES / f"{case}.jsonl")
    mapped = [{**row, "rating": 100 * (row["rating"] - low) / (high - low)} for row in rows]
    write_jsonl(tmp_path / "mapped.jsonl", mapped)
    own = pairs(tmp_path / "own", ingest(tmp_path / "own", case, rating_min=low, rating_max=high))
    other = ingest(tmp_path / "other", case, path=str(tmp_path / "mapped.jsonl"), rating_min=0, rating_max=100)
    assert [row["id"] for row in own] == [row["id"] for row in pairs(tmp_path / "other", other)]
    assert len(own) > 3


def test_words_need_a_map_and_are_read_with_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rating_words: \{'Strong reject': 1\}"):
        ingest(tmp_path / "without", "scale_words")
    rows = read_rows(ingest(tmp_path, "scale_words", rating_words=WORDS).file("reviews.jsonl"))
    assert rows[0]["rating"] == 1
    assert len(rows) == 12


def test_a_decimal_comma_is_refused_or_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"decimal comma\n.*decimal_comma\.jsonl:1"):
        ingest(tmp_path / "refused", "decimal_comma")
    rows = read_rows(ingest(tmp_path, "decimal_comma", decimal_comma=True).file("reviews.jsonl"))
    assert {row["rating"] for row in rows} == {6.5}


def test_pairs_of_papers_without_decisions(tmp_path: Path) -> None:
    corpus = ingest(tmp_path, "no_decisions")
    with pytest.raises(InputError, match=r"decisions: \[unknown\]"):
        pairs(tmp_path / "refused", corpus)
    assert pairs(tmp_path, corpus, decisions=["unknown"])
    kept = pairs(tmp_path / "far", corpus, decisions=["unknown"], rating_unit="quantiles", min_rating_diff=0.6)
    assert 0 < len(kept) < len(pairs(tmp_path / "all", corpus, decisions=["unknown"], min_rating_diff=0.1))
    with pytest.raises(ConfigError, match="min_rating_diff is below 1"):
        load(BuildDatasetsConfig, {"rating_unit": "quantiles"})


def test_reviews_listed_twice_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read_rows(ingest(tmp_path, "doubled").file("reviews.jsonl"))) == 6
    assert "6 reviews were listed again" in caplog.text


def test_title_only_papers_are_told_and_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ingest(tmp_path, "title_only")
    assert "2 papers have neither text nor abstract" in caplog.text
    with pytest.raises(InputError, match="no review is left"):
        ingest(tmp_path / "without", "title_only", {"title_only": "drop"})
    write_jsonl(tmp_path / "both.jsonl", read_rows(CASES / "title_only.jsonl") + [
        {**row, "paper_id": f"o{row['paper_id']}", "title": "Other" + row["title"], "review_id": f"o{row['review_id']}"}
        for row in read_rows(CASES / "scale_0_10.jsonl")
    ])  # fmt: skip
    path = str(tmp_path / "both.jsonl")
    corpus = ingest(tmp_path / "some", "title_only", {"title_only": "drop"}, path=path, rating_min=0)
    assert {row["abstract"] for row in read_rows(corpus.file("papers.jsonl"))} == {"We study trees."}
    assert json.loads(corpus.file("summary.json").read_text())["title_only_papers_left_out"] == 2


def test_confidence_in_words_costs_no_review(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = read_rows(ingest(tmp_path, "confidence_words").file("reviews.jsonl"))
    assert [row["confidence"] for row in rows] == [None] * 6
    assert "6 values are unknown and were left out: confidence 'very confident' (6)" in caplog.text
    told = ingest(tmp_path / "told", "confidence_words", confidence_words={"Very confident": 5})
    assert {row["confidence"] for row in read_rows(told.file("reviews.jsonl"))} == {5.0}


@pytest.mark.parametrize("case", ["reverted_withdrawal", "venueid_only", "meta_review"])
def test_accepted_as_openreview_has_it_now(tmp_path: Path, case: str) -> None:
    (paper,) = read_rows(ingest(tmp_path, f"openreview_{case}").file("papers.jsonl"))
    assert paper["decision"] == "accepted"


def test_every_section_that_says_something_is_kept(tmp_path: Path) -> None:
    corpus = ingest(tmp_path, "openreview_odd_sections")
    texts = {row["review_id"]: row["text"] for row in read_rows(corpus.file("reviews.jsonl"))}
    assert "## Questions\n1: Why is there no comparison with oak trees?" in texts["r4a"]
    assert "## Limitations\nNo oaks.\nNo birches." in texts["r4b"]
    assert "applicable" not in texts["r4c"]
    assert "## Weaknesses\nNo baseline." in texts["r4c"]
    summary = json.loads(corpus.file("summary.json").read_text())
    assert summary["sources"][0]["skipped: section without content (N/A, yes, no)"] == 1


def test_the_advice_of_a_refusal_is_taken_until_it_builds(tmp_path: Path) -> None:
    """Each remedy's `key: value` is set as it stands, and the next try gets further: no dead end."""
    corpus = ingest(tmp_path, "no_decisions")
    settings: dict[str, Any] = {"splits": ["train", "val"], "min_rating_diff": 9.5}
    taken: list[str] = []
    for attempt in range(4):
        try:
            assert pairs(tmp_path / str(attempt), corpus, **settings)
            break
        except InputError as refusal:
            remedy = str(refusal)
            advised = dict(re.findall(r"(splits|decisions): (\[[^\]]*\])", remedy.split("fix:")[1]))
            taken += advised or ["lower"]
            settings |= {key: yaml.safe_load(value) for key, value in advised.items()} or {"min_rating_diff": 2.0}
            assert advised or "lower min_rating_diff" in remedy
    assert taken == ["decisions", "splits", "lower"]


def test_a_corpus_without_train_is_not_advised_to_do_without_it(tmp_path: Path) -> None:
    only_val = {"splits": {"train": 0.01, "val": 0.97, "dev": 0.01, "test": 0.01}}
    with pytest.raises(InputError, match="no scored reviews in split 'train'") as refusal:
        pairs(tmp_path / "val", ingest(tmp_path, "no_decisions", only_val))
    assert "splits: [" not in str(refusal.value)  # the cut is taken there
