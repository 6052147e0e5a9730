"""Keys that nothing reads beside another key's value are told in the task's log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.stage import load_stage
from prefmill.pipeline.worker import import_and_run
from tests.e2e.training_artifacts import make_task

MODEL, CHAT = {"engine": "transformers", "model_name_or_path": "m"}, {"engine": "chat", "model_name_or_path": "m"}
GATE = {"min_answer_mass": 0.5}
SOURCES = [{"format": "generated", "num_papers": 1}]


@pytest.mark.parametrize(
    ("stage", "beside", "unread"),
    [
        ("ingest_reviews", {"sources": SOURCES}, {"workers": 4, "pdf": {"max_pages": 3}, "max_quarantined_share": 0.5}),
        ("ingest_reviews", {"sources": SOURCES}, {"splits": {"require_test_papers": False}}),
        ("score_reviews", {}, {"judge": GATE}),
        ("score_reviews", {"engine": MODEL, "debug": True}, {"judge": GATE}),
        ("score_reviews", {}, {"engine": {**MODEL, "evidence_max_tokens": 9}}),
        ("score_reviews", {}, {"engine": {**CHAT, "votes": 9}}),
        ("validate_datasets", {}, {"max_length": 100, "max_too_long_fraction": 0.1}),
        ("validate_datasets", {"stage": "sft"}, {"max_length_accuracy": 0.9}),
        ("optimize_checklist", {}, {"propose": {"num_proposals": 3, "num_examples": 1, "max_new_tokens": 99}}),
        ("optimize_checklist", {}, {"score": {"max_paraphrases": 3, "judge": GATE}}),
        ("optimize_checklist", {}, {"select": {"accept_rating": 3.0}}),
        ("optimize_checklist", {}, {"select": {"shrink": False, "l1_ratio": 0.5}}),
        ("judge_quality", {}, {"min_labels": 20, "folds": 3}),
        ("judge_quality", {"num_probed": 0}, {"probe_other": False, "max_paraphrases": 3, "judge": GATE}),
        ("evaluate", {"model": "base", "temperature": 0.0}, {"top_p": 0.5}),
        ("evaluate", {"model": "base", "generation": {"engine": "vllm"}}, {"attn_implementation": "eager"}),
        ("sft", {"dataset": "mine/chats"}, {"modality": "vision"}),
        ("dpo", {"dataset": "pairs.jsonl"}, {"modality": "vision"}),
        ("dpo", {"mixture": [{"file": "a.jsonl", "weight": 1.0}]}, {"modality": "clean_images"}),
        ("mdlm_dpo", {"dataset": "mine/pairs"}, {"modality": "vision"}),
        ("mdlm_sft", {"sft_data_path": "chats.jsonl"}, {"modality": "vision"}),
        ("mdlm_evaluate", {"pairs_path": "pairs.jsonl"}, {"modality": "vision"}),
    ],
)
def test_keys_that_nothing_reads_beside_another_are_told(
    stage: str, beside: dict[str, Any], unread: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = replace(load_stage(stage), run=lambda _config, _task: {}, preload=())
    task = make_task(stage, tmp_path)
    import_and_run(found, validate(found.config, beside), task)
    assert "no effect" not in caplog.text
    import_and_run(found, validate(found.config, {**beside, **unread}), task)
    told = {key for line in caplog.messages if ": no effect" in line for key in line.split(":")[0].split(", ")}
    beside_it = {"engine.engine", "engine.model_name_or_path", "select.shrink"}
    assert (
        told
        == {
            f"{key}.{part}" if part else key
            for key, value in unread.items()
            for part in (value if key in ("engine", "propose", "score", "select", "splits") else [""])
        }
        - beside_it
    ), json.dumps(caplog.messages)
