"""The streaming join: right matches, and an error for every way in which the inputs can disagree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.scored import check_inputs, scored_papers
from prefmill.core.artifact import Artifact
from prefmill.core.errors import ArtifactError, InputError


def ids(*names: str) -> list[dict[str, Any]]:
    """Rows by review id, `a1` being a review of paper `a`."""
    return [{"paper_id": name[0], "review_id": name} for name in names]


def scores(*names: str) -> list[dict[str, Any]]:
    """What a scored review comes to, beside whatever else an evaluation holds."""
    return [{**row, "answers": {}, "checkmark_score": 1.0, "mean_p_yes": 0.5, "engine": "test"} for row in ids(*names)]


def papers(*names: str) -> list[dict[str, Any]]:
    return [{"paper_id": name} for name in names]


@pytest.fixture
def corpus(artifact: Any) -> Artifact:
    return artifact("corpus", "review_corpus", papers=papers("a", "b", "c"), reviews=ids("a1", "a2", "c1"))


def join(corpus: Artifact, *shards: Artifact) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    return [
        (paper["paper_id"], [(r["review_id"], e["review_id"]) for r, e in reviews], unscored)
        for paper, reviews, unscored in scored_papers(corpus, shards)
    ]


def test_join_over_shards(artifact: Any, corpus: Artifact) -> None:
    first = artifact("s0", "review_scores", review_evaluations=scores("c1"))
    second = artifact("s1", "review_scores", review_evaluations=scores("a1", "a2"))
    expected = [("a", [("a1", "a1"), ("a2", "a2")], []), ("b", [], []), ("c", [("c1", "c1")], [])]
    assert join(corpus, first, second) == expected


def test_reviews_without_evaluation_are_named(artifact: Any, corpus: Artifact) -> None:
    shard = artifact("s", "review_scores", review_evaluations=scores("a2"))
    assert join(corpus, shard) == [("a", [("a2", "a2")], ["a1"]), ("b", [], []), ("c", [], ["c1"])]


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        (scores("a1", "a3"), "not in the corpus: a3"),
        (scores("a1", "b1"), "not in the corpus: b1"),
        (scores("a1", "d1"), "not in the corpus, or the rows are out of order"),
        (scores("c1", "a1"), "not in the corpus, or the rows are out of order"),
        (scores("a1", "a1"), "evaluated twice"),
    ],
)
def test_evaluations_that_do_not_fit(artifact: Any, corpus: Artifact, evaluations: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        join(corpus, artifact("s", "review_scores", review_evaluations=evaluations))


def test_an_evaluation_without_its_scores_is_named_by_its_line(artifact: Any, corpus: Artifact) -> None:
    shard = artifact("s", "review_scores", review_evaluations=[*scores("a1"), *ids("a2")])
    with pytest.raises(InputError, match=r"(?s)review_evaluations\.jsonl:2.*missing required field `checkmark_score`"):
        join(corpus, shard)


def test_inputs_must_belong_together(artifact: Any, corpus: Artifact) -> None:
    mine = {"corpus": [corpus.manifest.content_digest]}
    good = artifact("s0", "review_scores", mine, review_evaluations=[])
    check_inputs(corpus, [good])
    stranger = artifact("s1", "review_scores", {"corpus": ["0" * 64]}, review_evaluations=[])
    with pytest.raises(ArtifactError, match="another corpus"):
        check_inputs(corpus, [good, stranger])


CHAT = {"engine": "chat", "model_name_or_path": "a", "num_retries": 8}


def test_shards_must_share_a_judge(artifact: Any, corpus: Artifact) -> None:
    """build_datasets ranked the scores of two models as one; judge_quality refused what only asks the server anew."""

    def shard(name: str, engine: dict[str, Any], **inputs: list[str]) -> Artifact:
        found: Artifact = artifact(name, "review_scores", inputs, review_evaluations=[])
        return replace(found, manifest=found.manifest.model_copy(update={"config": {"engine": engine}}))

    first = shard("s0", CHAT)
    check_inputs(corpus, [first, shard("s1", {**CHAT, "num_retries": 20, "timeout_seconds": 9.0})])
    with pytest.raises(InputError, match="different settings: engine"):
        check_inputs(corpus, [first, shard("s2", {**CHAT, "model_name_or_path": "b"})])
    with pytest.raises(InputError, match="different settings: temperature"):
        check_inputs(corpus, [first, shard("s3", CHAT, calibration=["0" * 64])])


def test_shards_that_other_models_answered_are_told(
    artifact: Any, corpus: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server's alias may name another model from a day to the next; only within a shard it was told."""

    def shard(engine: str | None) -> Artifact:
        name = f"s{len(list(tmp_path.glob('s*')))}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"engine": engine}))
        found: Artifact = artifact(name, "review_scores", review_evaluations=[])
        return found

    august, november, none = shard("chat (gpt-4o-2024-08-06)"), shard("chat (gpt-4o-2024-11-20)"), shard(None)
    assert check_inputs(corpus, [august, none, shard("chat (gpt-4o-2024-08-06)")]) == []
    assert not caplog.records
    told = (
        "more than one model has answered: chat (gpt-4o-2024-08-06) and chat (gpt-4o-2024-11-20); "
        "score again with --force, by one of them"
    )
    assert check_inputs(corpus, [november, august, none]) == [told]
    assert caplog.messages == [told]
    both = shard("chat (gpt-4o-2024-08-06) and chat (gpt-4o-2024-11-20)")
    assert check_inputs(corpus, [both]) == check_inputs(corpus, [both, november]) == [told]


def test_shards_must_share_a_checklist(artifact: Any, corpus: Artifact, tmp_path: Any) -> None:
    shards = []
    for name in ("s0", "s1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checklist.json").write_text(name)
        shards.append(artifact(name, "review_scores", review_evaluations=[]))
    with pytest.raises(ArtifactError, match="different checklists"):
        check_inputs(corpus, shards)
