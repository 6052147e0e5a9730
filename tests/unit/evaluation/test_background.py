"""Curves, margins, examples and lineage as the page shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact, Provenance
from prefmill.evaluation.lineage import everything_behind
from prefmill.report.background import lineage_section, training_section
from prefmill.report.examples import choose_papers, read_examples
from prefmill.report.training_logs import cost_lines, read_curves, read_margins
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl


def make(workspace: Path, stage: str, task: str = "all", config: Any = None, **inputs: Artifact) -> Artifact:
    root = "checkpoints" if stage in ("sft", "dpo") else "data"
    folder = workspace / root / "run" / stage / task
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps([stage, task]))
    digests = {name: [item.manifest.content_digest] for name, item in inputs.items()}
    return publish(folder, "checkpoint", Provenance(stage, task, "f", {"config": config or {}}, {}, "0", digests), {})


def test_of_a_step_taken_twice_the_later_row_counts(tmp_path: Path) -> None:
    dpo = make(tmp_path, "dpo", "clean")
    logs = tmp_path / "logs" / "run" / "dpo" / "clean"
    write_jsonl(logs / "steps.jsonl", [{"step": s, "loss": v} for s, v in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))])
    assert read_curves(dpo).points == {"loss": [(1, 3), (2, 2), (3, 1)]}
    rows = [
        {"step": step, "epoch": epoch, "pair_id": pair, "margin": margin}
        for step, epoch, pair, margin in ((1, 0, "a", 9.0), (2, 1, "a", 5.0), (2, 1, "a", 1.5), (2, 1, "b", -0.5))
    ]
    write_jsonl(logs / "margins" / "margins_log.jsonl", rows)
    write_jsonl(logs / "margins" / "margins_log.rank1.jsonl", [{**rows[1], "pair_id": "c", "margin": 7.0}])
    assert read_margins(dpo) == [1.5, -0.5, 7.0]
    (section,) = training_section([dpo])
    assert [entry["title"] for entry in section["charts"]] == ["Training loss", "Margins in the last epoch"]
    assert section["charts"][1]["note"] == "67% of 3 above zero"


def test_ln_2_is_drawn_for_the_sigmoid_loss_only(tmp_path: Path) -> None:
    for stage, task, config, expected in (
        ("dpo", "a", {"loss_type": ["sigmoid"]}, True),
        ("dpo", "b", {"loss_type": ["ipo"]}, False),
        ("sft", "c", {}, False),
    ):
        write_jsonl(tmp_path / "logs/run" / stage / task / "steps.jsonl", [{"step": s, "loss": 1.0} for s in (1, 2)])
        (section,) = training_section([make(tmp_path, stage, task, config)])
        assert ("ln 2" in section["charts"][0]["note"]) is expected


def test_a_control_says_so(tmp_path: Path) -> None:
    (section,) = training_section([make(tmp_path, "dpo", config={"shuffle_labels": True})])
    assert section["is_control"]
    assert "no curve of dpo:all" in section["missing"]


def test_costs_are_taken_from_run_records(tmp_path: Path) -> None:
    sft, dpo = make(tmp_path, "sft"), make(tmp_path, "dpo")
    (sft.path / "run.json").write_text(json.dumps({"seconds": 60.0, "peak_memory_gb": 2.0}))
    assert [line.split() for line in cost_lines([sft, dpo])] == [["sft:all", "60.0", "s", "2.00", "GB"]]


def test_lineage_runs_from_raw_input_down(tmp_path: Path) -> None:
    corpus = make(tmp_path, "ingest")
    shards = [make(tmp_path, "score", f"shard{index}", corpus=corpus) for index in range(2)]
    built = make(tmp_path, "build", corpus=corpus, scores=shards[0], more=shards[1])
    sft = make(tmp_path, "sft", data=built)
    dpo = make(tmp_path, "dpo", policy=sft, data=built)
    artifacts, missing = everything_behind([dpo])
    section = lineage_section(artifacts, missing)
    assert [item["name"] for item in section["artifacts"]] == [
        "ingest:all", "score:shard0", "score:shard1", "build:all", "sft:all", "dpo:all",
    ]  # fmt: skip
    assert [[box["stage"] for box in level] for level in section["levels"]] == [
        ["ingest"], ["score"], ["build"], ["sft"], ["dpo"],
    ]  # fmt: skip
    assert section["levels"][1][0]["tasks"] == 2
    assert section["edges"] == [
        ("build", "dpo"), ("build", "sft"), ("ingest", "build"), ("ingest", "score"), ("score", "build"),
        ("sft", "dpo"),
    ]  # fmt: skip
    assert section["missing"] == []


def test_an_input_without_a_manifest_is_named(tmp_path: Path) -> None:
    gone = make(tmp_path / "gone", "ingest")
    _, missing = everything_behind([make(tmp_path / "here", "sft", data=gone)])
    assert missing == [gone.manifest.content_digest]


def test_examples_show_the_best_the_worst_and_the_middle() -> None:
    before = {f"p{index}": 5.0 for index in range(9)}
    after = {f"p{index}": 5.0 + gain for index, gain in enumerate((0, 3, -4, 1, 7, 2, -1, 5, 6))}
    chosen = choose_papers(before, after, 5, seed=0)
    assert list(chosen)[:3] == ["p4", "p2", "p5"]
    assert list(chosen.values())[3:] == ["drawn at random", "drawn at random"]
    assert choose_papers(before, after, 5, seed=0) == chosen
    assert choose_papers(before, after, 2, seed=0) == {"p4": chosen["p4"], "p2": chosen["p2"]}
    assert choose_papers({"a": 1.0}, {"b": 1.0}, 3, 0) == {}
    assert list(choose_papers({"a": 1.0}, {"a": 2.0}, 3, 0)) == ["a"]


def test_examples_are_the_first_review_of_each_model(tmp_path: Path) -> None:
    artifact = make(tmp_path, "evaluate")
    for sample, text in enumerate(("first", "second")):
        row = {"paper_id": "p", "sample": sample, "text": text, "rating": None}
        answers = {"q": {"yes": True, "p_yes": 0.75, "evidence": text}}
        with (artifact.path / "generations.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        with (artifact.path / "evaluations.jsonl").open("a") as stream:
            stream.write(json.dumps({"answers": answers, "checkmark_score": 1.0}) + "\n")
    artifact = publish(artifact.path, "evaluation", Provenance("evaluate", "all", "f", {}, {}, "0", {}), {})
    metrics = {
        "model": "dpo",
        "items": [{"id": "q", "question": "Is it?"}],
        "papers": [{"paper_id": "p", "decision": "accepted", "human_rating": 6.0}],
    }
    (example,) = read_examples([(metrics, artifact)], {"p": "middle"}, None)
    (review,) = example.reviews
    assert (example.title, example.reason, review.text, review.num_yes) == ("p", "middle", "first", 1)
    assert review.answers[0].question == "Is it?"
    assert review.answers[0].evidence == "first"
