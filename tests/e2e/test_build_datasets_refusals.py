"""build_datasets: what it refuses, and in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dataset_builds import TEXT, Inputs, build, make_inputs, summary_of
from review_artifacts import evaluate, make_corpus, make_rows, make_scores, make_task

from prefmill.core.config import load
from prefmill.core.errors import ArtifactError, ConfigError, InputError, PrefmillError
from prefmill.store.jsonl import write_jsonl
from stages.build_datasets import BuildDatasetsConfig, run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), *make_rows(200))


def test_no_pair_left_says_what_dropped_them(tmp_path: Path, inputs: Inputs) -> None:
    with pytest.raises(InputError) as caught:
        build(tmp_path, inputs, min_checkmark_diff=30)
    message = str(caught.value)
    assert "no pair is left for dpo_clean_train" in message
    assert "checkmark_diff_too_small" in message
    assert "rating_diff_too_small" in message
    # More fall to the rating's difference, but lowering that leaves none either.
    assert "fix:      lower min_checkmark_diff" in message
    assert not list(tmp_path.rglob("data.jsonl")), "half-written datasets must not stay"
    with pytest.raises(InputError, match=r"fix: .*lower min_rating_diff"):
        build(tmp_path, inputs, min_rating_diff=9.5)


def make_alike(folder: Path, **values: str) -> Inputs:
    """Inputs whose papers all have these values."""
    papers, reviews = make_rows(30)
    return make_inputs(folder, [{**paper, **values} for paper in papers], reviews)


def test_no_accepted_papers(tmp_path: Path) -> None:
    inputs = make_alike(tmp_path, decision="rejected")
    with pytest.raises(InputError, match=r"no accepted papers in split 'train'.*\n.*'rejected': 30"):
        build(tmp_path, inputs)
    build(tmp_path, inputs, decisions=["rejected"], splits=["train"])


def test_no_reviews(tmp_path: Path) -> None:
    papers, _ = make_rows(30)
    with pytest.raises(InputError, match="no scored reviews in split 'train'"):
        build(tmp_path, make_inputs(tmp_path, papers, []))


def test_no_val_papers_unless_left_out(tmp_path: Path) -> None:
    inputs = make_alike(tmp_path, split="train")
    with pytest.raises(InputError, match=r"split 'val'(.|\n)*splits: \[train\]"):
        build(tmp_path, inputs)
    task = build(tmp_path, inputs, splits=["train"])
    assert sorted(json.loads((task.output / "dataset_info.json").read_text())) == [
        "dpo_clean_train",
        "sft_clean_train",
    ]


@pytest.mark.parametrize(("modality", "fix"), [("clean_images", "figures"), ("vision", "page images")])
def test_modality_without_images(tmp_path: Path, inputs: Inputs, modality: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"no paper has {fix}(.|\n)*modalities: \[clean\]"):
        build(tmp_path, inputs, modalities=["clean", modality])


def test_all_modalities_without_images_are_left_out_at_once(tmp_path: Path, inputs: Inputs) -> None:
    """The default's other one stood in the fix, which was refused in its turn."""
    with pytest.raises(ConfigError, match=r"or leave it out: modalities: \[clean\]"):
        build(tmp_path, inputs, modalities=["clean", "clean_images", "vision"])
    with pytest.raises(ConfigError) as error:
        build(tmp_path, inputs, modalities=["vision"])
    assert "leave it out" not in str(error.value)


def test_unscored_reviews_are_refused_or_counted(tmp_path: Path) -> None:
    papers, reviews = make_rows(200)
    corpus = make_corpus(tmp_path / "corpus", papers, reviews)
    some = [evaluate(review) for review in reviews[:600]]
    inputs = {"corpus": (corpus,), "scores": make_scores(tmp_path / "scores", corpus, some, config={"limit": 600})}
    with pytest.raises(
        ArtifactError, match=rf"{len(reviews) - 600} reviews have no evaluation(.|\n)*limit(.|\n)*allow_"
    ):
        build(tmp_path, inputs)
    task = build(tmp_path, inputs, allow_unscored=True)
    assert summary_of(task)["unscored_reviews"] == len(reviews) - 600
    assert sum(summary_of(task)["reviews"].values()) == 600


def test_reviews_the_engine_failed_on_are_named_as_such(tmp_path: Path) -> None:
    papers, reviews = make_rows(200)
    corpus = make_corpus(tmp_path / "corpus", papers, reviews)
    failed = [{key: reviews[3][key] for key in ("review_id", "paper_id")}]
    write_jsonl(tmp_path / "scores" / "shard0" / "failures.jsonl", failed)
    some = [evaluate(review) for review in reviews if review is not reviews[3]]
    inputs = {"corpus": (corpus,), "scores": make_scores(tmp_path / "scores", corpus, some, num_shards=1)}
    with pytest.raises(ArtifactError, match=r"1 reviews have no evaluation(.|\n)*engine failed(.|\n)*allow_unscored"):
        build(tmp_path, inputs)
    build(tmp_path, inputs, allow_unscored=True)


def test_a_missing_shard_is_noticed(tmp_path: Path, inputs: Inputs) -> None:
    with pytest.raises(ArtifactError, match=r"have no evaluation(.|\n)*every shard"):
        build(tmp_path, {"corpus": inputs["corpus"], "scores": inputs["scores"][:1]})


def test_scores_of_another_corpus_are_refused(tmp_path: Path, inputs: Inputs) -> None:
    other = make_corpus(tmp_path / "corpus", *make_rows(30))
    with pytest.raises(ArtifactError, match="made from another corpus"):
        build(tmp_path, {"corpus": (other,), "scores": inputs["scores"]})


def test_shards_that_other_models_answered_are_told(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "in", *make_rows(200), engines=["chat (gpt-08)", "chat (gpt-11)"])
    task = make_task(tmp_path / "out", "build_datasets", inputs)
    metrics = run(load(BuildDatasetsConfig, TEXT), task)
    (told,) = metrics["warnings"]
    assert told.startswith("more than one model has answered: chat (gpt-08) and chat (gpt-11)")
    assert summary_of(task)["warnings"] == [told]


BAD_CONFIGS = [{"splits": ["val"]}, {"splits": ["train", "test"]}, {"modality": ["clean"]}, {"min_rating_diff": 0}]


@pytest.mark.parametrize("values", BAD_CONFIGS)
def test_config_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(PrefmillError, match="invalid configuration"):
        load(BuildDatasetsConfig, values)


def test_a_paper_that_most_rows_are_of_is_told(tmp_path: Path) -> None:
    """Its pairs grow with the square of its reviews: 3,000 gave 1.3 million, without a word."""
    papers, reviews = make_rows(200)
    paper = next(row for row in papers if row["split"] == "train" and row["decision"] == "accepted")
    low, high = (pick(reviews, key=lambda row: evaluate(row)["checkmark_score"]) for pick in (min, max))
    # Each of the first makes a pair with each of the second: 110 * 110. The second are the best reviews.
    many = [
        {**row, **rating, "paper_id": paper["paper_id"], "review_id": f"x{number:03}-{rating['rating']}"}
        for number in range(110)
        for row, rating in ((low, {"rating": 1.0}), (high, {"rating": 9.0}))
    ]
    rest = [row for row in reviews if row["paper_id"] != paper["paper_id"]]
    inputs = make_inputs(tmp_path, papers, sorted([*rest, *many], key=lambda row: (row["paper_id"], row["review_id"])))
    told, of_sft = summary_of(build(tmp_path / "all", inputs))["warnings"]
    assert told.startswith("12,100 of ")
    assert told.endswith(f"pairs are of paper {paper['paper_id']}: max_pairs_per_paper keeps the clearest")
    assert re.fullmatch(rf"1\d\d of 1\d\d SFT reviews are of paper {paper['paper_id']}: ingest fewer of them", of_sft)
    assert summary_of(build(tmp_path / "few", inputs, max_pairs_per_paper=10))["warnings"] == [of_sft]
    assert "warnings" not in summary_of(build(tmp_path / "best", inputs, max_pairs_per_paper=10, sft_top_fraction=0.05))
