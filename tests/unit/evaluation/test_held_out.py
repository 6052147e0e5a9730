"""Which papers are evaluated on, how reviews are scored, and that no paper trained on is among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.engine import Engine, Outcome
from prefmill.checklist.items import load_checklist
from prefmill.checklist.judge_gate import JudgeGate
from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.errors import InputError, PipelineError
from prefmill.core.records import Paper, Review, ReviewEvaluation
from prefmill.evaluation.held_out import AcceptRule, human_generations, read_held_out, score_generations
from prefmill.evaluation.lineage import Lineage, check_training, training_papers
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl

TEST_IDS = [f"p{index:02}" for index in range(0, 20, 2)]


def make(folder: Path, kind: str, **inputs: Artifact) -> Artifact:
    digests = {name: [item.manifest.content_digest] for name, item in inputs.items()}
    return publish(folder, kind, Provenance(folder.parent.name, folder.name, "f", {}, {}, "0", digests), {})


def make_corpus(workspace: Path, formats: Sequence[str] = ("generated",), other_split: str = "train") -> Artifact:
    folder = workspace / "data" / "run" / "ingest_reviews" / "all"
    papers = [
        {"paper_id": f"p{index:02}", "decision": "accepted", "split": ("test", other_split)[index % 2]}
        for index in range(20)
    ]
    reviews = [
        {"review_id": f"{paper['paper_id']}-{number}", "paper_id": paper["paper_id"], "text": "Fine.", "rating": 5.0}
        for paper in papers
        for number in range(int(paper["paper_id"] != "p04") * 2)
    ]
    write_jsonl(folder / "papers.jsonl", papers)
    write_jsonl(folder / "reviews.jsonl", reviews)
    (folder / "summary.json").write_text(json.dumps({"sources": [{"format": name} for name in formats]}))
    return make(folder, "review_corpus")


def make_checkpoint(workspace: Path, stage: str, **inputs: Artifact) -> Artifact:
    folder = workspace / "checkpoints" / "run" / stage / "clean"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(stage))
    return make(folder, "checkpoint", **inputs)


def make_datasets(workspace: Path, corpus: Artifact, sft: Sequence[str], dpo: Sequence[str]) -> Artifact:
    folder = workspace / "data" / "run" / "build_datasets" / "all"
    write_jsonl(folder / "sft_clean_train" / "data.jsonl", [{"paper_id": key} for key in sft])
    write_jsonl(folder / "dpo_clean_val" / "data.jsonl", [{"group": key} for key in dpo])
    return make(folder, "preference_datasets", corpus=corpus)


def test_only_test_papers_are_evaluated_on(tmp_path: Path) -> None:
    held_out = read_held_out(make_corpus(tmp_path), None, 0)
    assert list(held_out.papers) == TEST_IDS
    assert sorted(held_out.reviews) == [key for key in TEST_IDS if key != "p04"]
    assert held_out.facts(AcceptRule(6))["p04"].ratings == ()
    assert held_out.facts(AcceptRule(6))["p00"].ratings == (5.0, 5.0)


def test_a_draw_of_papers_follows_from_the_seed(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    drawn = {seed: list(read_held_out(corpus, 4, seed).papers) for seed in range(4)}
    assert all(len(keys) == 4 and keys == sorted(keys) and set(keys) <= set(TEST_IDS) for keys in drawn.values())
    assert drawn[0] == list(read_held_out(corpus, 4, 0).papers)
    assert len({tuple(keys) for keys in drawn.values()}) > 1
    assert set(drawn[0]) <= set(read_held_out(corpus, 6, 0).papers)  # asking for more papers keeps the ones there were


def test_too_few_test_papers_are_an_error(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    with pytest.raises(InputError, match=r"too few test papers(.|\n)*papers.jsonl(.|\n)*got:\s+10(.|\n)*expected: 11"):
        read_held_out(corpus, 11, 0)


@pytest.mark.parametrize(
    ("formats", "known"), [(["generated"], True), (["jsonl"], False), (["generated", "csv"], False)]
)
def test_quality_factors_are_known_on_a_generated_corpus_only(tmp_path: Path, formats: list[str], known: bool) -> None:
    assert read_held_out(make_corpus(tmp_path, formats), None, 0).is_generated is known


def test_human_reviews_become_generations(tmp_path: Path) -> None:
    rows = human_generations(read_held_out(make_corpus(tmp_path), None, 0))
    assert [(row["paper_id"], row["sample"]) for row in rows[:4]] == [("p00", 0), ("p00", 1), ("p02", 0), ("p02", 1)]
    assert "p04" not in {row["paper_id"] for row in rows}


class YesToEverything(Engine):
    """An engine that counts what it is shown, and says yes even to nothing, with this mass on its answer."""

    name = "yes"

    def __init__(self, mass: float = 0.9) -> None:
        super().__init__(load_checklist())
        self.shown: list[str] = []
        self.mass = mass

    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        raise AssertionError("evaluate is asked")

    def evaluate(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[ReviewEvaluation]:
        for _, reviews in papers:
            for review in reviews:
                self.shown.append(review["review_id"])
                yield {
                    "review_id": review["review_id"],
                    "paper_id": review["paper_id"],
                    "answers": {"q": {"yes": True, "p_yes": 1.0, "mass": self.mass}},
                    "checkmark_score": 1.0,
                    "mean_p_yes": 1.0,
                    "engine": "yes",
                }


def test_an_empty_review_fulfils_nothing_and_a_resumed_scoring_shows_nothing_twice(tmp_path: Path) -> None:
    texts: Any = {"a": ["good", " "], "b": ["", "\n"], "c": ["fine"]}
    rows: Any = [
        {"paper_id": key, "sample": sample, "text": text, "rating": None}
        for key, items in texts.items()
        for sample, text in enumerate(items)
    ]
    engine = YesToEverything()
    found = score_generations(rows, {key: {} for key in texts}, engine, ["q"], tmp_path)  # type: ignore[misc]
    assert [row["review_id"] for row in found] == ["a#0", "a#1", "b#0", "b#1", "c#0"]
    assert [row["checkmark_score"] for row in found] == [1, 0, 0, 0, 1]
    assert engine.shown == ["a#0", "c#0"]
    again = YesToEverything()
    assert score_generations(rows, {}, again, ["q"], tmp_path) == found
    assert again.shown == []


def test_papers_behind_a_checkpoint_are_found_through_the_one_before_it(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    base = make_checkpoint(tmp_path, "tiny_model", corpus=corpus)
    sft = make_checkpoint(tmp_path, "sft", model=base, datasets=make_datasets(tmp_path, corpus, ["p01"], ["p03"]))
    trained = training_papers(sft, Lineage([sft]))
    assert trained.paper_ids == {f"p{index:02}" for index in range(1, 20, 2)}
    assert (trained.num_datasets, trained.num_missing) == (2, 0)
    assert check_training(sft, TEST_IDS, tmp_path / "data/run/evaluate/sft") == {
        "num_papers": 10,
        "num_datasets": 2,
        "num_missing": 0,
    }


@pytest.mark.parametrize(("sft_rows", "dpo_rows"), [(["p01", "p06"], ["p03"]), (["p01"], ["p03", "p06"])])
def test_a_paper_trained_on_is_refused(tmp_path: Path, sft_rows: list[str], dpo_rows: list[str]) -> None:
    corpus = make_corpus(tmp_path)
    sft = make_checkpoint(tmp_path, "sft", datasets=make_datasets(tmp_path, corpus, sft_rows, dpo_rows))
    dpo = make_checkpoint(tmp_path, "dpo", policy=sft)
    with pytest.raises(PipelineError, match=r"1 of the papers to evaluate on were trained on(.|\n)*dpo(.|\n)*p06"):
        check_training(dpo, TEST_IDS, tmp_path / "data/run/evaluate/dpo")


def test_a_corpus_that_a_model_was_trained_on_elsewhere_is_followed(tmp_path: Path) -> None:
    """The base model comes from another workspace, in which a test paper of ours was a training paper."""
    elsewhere = make_corpus(tmp_path / "other", other_split="train")
    base = make_checkpoint(tmp_path / "other", "tiny_model", corpus=elsewhere)
    with pytest.raises(PipelineError, match="p01"):
        check_training(base, ["p01"], tmp_path / "here/data/run/evaluate/base")


def test_inputs_without_a_manifest_are_counted(tmp_path: Path) -> None:
    gone = make_corpus(tmp_path / "gone")
    base = make_checkpoint(tmp_path / "here", "tiny_model", corpus=gone)
    found = check_training(base, TEST_IDS, tmp_path / "here/data/run/evaluate/base")
    assert found == {"num_papers": 0, "num_datasets": 0, "num_missing": 1}
    assert check_training(None, TEST_IDS, tmp_path) is None


def test_another_runs_damaged_manifest_does_not_matter(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    base = make_checkpoint(tmp_path, "tiny_model", corpus=corpus)
    damaged = tmp_path / "data" / "other" / "ingest_reviews" / "all"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    assert training_papers(base, Lineage([base])).num_missing == 0


def test_a_judge_that_answers_nothing_is_stopped_and_what_it_said_is_kept(tmp_path: Path) -> None:
    rows: Any = [{"paper_id": f"p{n:03}", "sample": 0, "text": "good", "rating": None} for n in range(100)]
    papers: Any = {row["paper_id"]: {} for row in rows}
    engine, gate = YesToEverything(mass=0.02), JudgeGate(max_same_answer=1)
    with pytest.raises(InputError, match="this judge says yes to 100% and puts 2% of its mass on an answer"):
        score_generations(rows, papers, engine, ["q"], tmp_path, gate=gate)
    assert len(engine.shown) == 64  # of 50 reviews on it is judged, before the next block of 32 papers
    with pytest.raises(InputError, match="2% of its mass"):  # a rerun does not get round it
        score_generations(rows[:64], papers, engine, ["q"], tmp_path, gate=gate)
    any_judge = JudgeGate(min_answer_mass=0, max_same_answer=1)
    assert len(score_generations(rows, papers, engine, ["q"], tmp_path, gate=any_judge)) == 100
    assert len(engine.shown) == 100


def test_a_constant_judge_is_stopped_on_reviews_by_people_alone(tmp_path: Path) -> None:
    rows: Any = [{"paper_id": f"p{n:03}", "sample": 0, "text": "good", "rating": None} for n in range(30)]
    papers: Any = {row["paper_id"]: {} for row in rows}
    with pytest.raises(InputError, match="at most 98% of one answer"):
        score_generations(rows, papers, YesToEverything(), ["q"], tmp_path, gate=JudgeGate())
    # A model may well write reviews that are alike in every item.
    assert score_generations(rows, papers, YesToEverything(), ["q"], tmp_path / "b", gate=JudgeGate().mass_alone)
