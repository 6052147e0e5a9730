"""What the code of commit ce72c62 made, before rooms and keys were renamed, is still read, resumed and up to date."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prefmill.checklist.scored import scored_papers
from prefmill.core.config import identity, validate
from prefmill.pipeline.attempts import EXECUTED
from prefmill.pipeline.plan import Plan, make_plan, read_pipeline
from prefmill.pipeline.state import inspect
from prefmill.pipeline.worker import execute
from prefmill.store.artifacts import read
from prefmill.store.jsonl import read_jsonl
from prefmill.store.stamps import verify
from prefmill.training.data import read_pairs
from stages.ingest_reviews import IngestReviewsConfig
from tests.conftest import REPOSITORY

ALONE = ("name=old", "dpo.num_train_epochs=2")  # the finished training, its inputs given as folders
STAGES = ("ingest_reviews", "score_reviews", "build_datasets")
MADE = REPOSITORY / "tests" / "fixtures" / "made_by_ce72c62"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(MADE, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


def plan(run: str, *overrides: str) -> Plan:
    path = Path("configs/pipelines") / f"{run}.yaml"
    return make_plan(read_pipeline(path, [f"workspace={Path.cwd()}", *overrides]), path)


def freshness(plan: Plan) -> dict[str, str]:
    return {key: state.freshness for key, state in inspect(plan).items()}


def test_what_is_unchanged_is_up_to_date_and_read(workspace: Path) -> None:
    made = plan("old")
    assert freshness(made)["toy_preferences:all"] == "complete"
    assert freshness(plan("cut", *ALONE)) == {"dpo:clean": "complete"}
    assert {freshness(made)[f"{stage}:all"] for stage in STAGES} == {"complete"}
    for task in made.tasks:
        verify(read(task.output, task.stage.writes))
    corpus, scores, datasets = (read(workspace / "data" / "old" / stage / "all") for stage in STAGES)
    papers = list(scored_papers(corpus, [scores]))
    assert (len(papers), sum(len(paper.reviews) for paper in papers)) == (24, corpus.manifest.metrics["reviews"])
    pairs = list(read_pairs(datasets.file("dpo_clean_train/data.jsonl")))
    assert len(pairs) == len(list(read_jsonl(datasets.file("dpo_clean_train/data.jsonl")))) > 0


def test_the_same_configuration_makes_the_same_rows(workspace: Path) -> None:
    (task,) = (task for task in plan("old").tasks if task.stage.name == "ingest_reviews")
    names = ("papers.jsonl", "reviews.jsonl")
    before = [(task.output / name).read_bytes() for name in names]
    execute(task, force=True)
    assert [(task.output / name).read_bytes() for name in names] == before


def test_a_corpus_whose_ratings_would_be_written_otherwise_is_told(workspace: Path) -> None:
    narrow = ("ingest_reviews.sources=[{format: generated, num_papers: 24, rating_max: 11}]",)
    assert "sources[0].rating_max was 10, is 11" in inspect(plan("old", *narrow))["ingest_reviews:all"].reasons[0]
    config = validate(IngestReviewsConfig, {"sources": [{"format": "generated", "num_papers": 3, "rating_max": 11}]})
    (source,) = identity(config)["sources"]
    assert source["scale"] == "kept"
    assert {"rating_words", "confidence_words", "decision_words", "decimal_comma"}.isdisjoint(source)


def test_a_default_that_makes_other_numbers_is_told(workspace: Path) -> None:
    state = inspect(plan("cut", *ALONE, "dpo.layout=auto"))["dpo:clean"]
    assert (state.freshness, state.reasons) == ("stale", ("layout was 'pairwise', is 'auto'",))


@pytest.mark.slow
def test_a_finished_training_loads_and_an_interrupted_one_goes_on(workspace: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(workspace / "checkpoints" / "old" / "dpo" / "clean")
    prompt = AutoTokenizer.from_pretrained(folder)("a review", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(folder)(**prompt).logits.isfinite().all()
    (task,) = plan("cut").tasks
    before = executed(task.logs)
    execute(task)
    assert executed(task.logs)[len(before) :] == list(range(4, 49))  # from checkpoint-3: checkpoint-6 is torn
    assert freshness(plan("cut")) == {"dpo:clean": "complete"}


def executed(logs: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(logs / EXECUTED)]
