"""Answers stop, whatever the microbatch was that a model was fine-tuned with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mdlm_artifacts import demo, make_toy, metrics_of, run_stage
from training_artifacts import publish_as

from prefmill.demo.toy_language import HARSH, KIND, PLAIN

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("at_once", [1, 16])
def test_greedy_answers_end_after_training_at_1_and_at_16_a_device(tmp_path: Path, at_once: int) -> None:
    datasets = make_toy(tmp_path / "toy", num_sft=400)
    keys: dict[str, Any] = {"per_device_train_batch_size": at_once, "effective_batch_size": 16, "num_train_epochs": 8}
    saved = run_stage("mdlm_sft", tmp_path / "sft", demo("mdlm_sft", **keys), datasets=datasets)
    assert saved["answer_block_tokens"] == 8
    model = publish_as(tmp_path / "sft" / "out", "checkpoint")
    words = "|".join((*KIND, *HARSH))
    keys = {
        "temperature": 0.0, "remasking": "low_confidence", "num_tokens": 32, "block_tokens": 8, "samples_per_prompt": 1,
        "diffusion_steps": 2, "wanted_pattern": f"^it is ({words}) and ({'|'.join(PLAIN)})$",
    }  # fmt: skip
    said = demo("mdlm_evaluate", **keys)
    run_stage("mdlm_evaluate", tmp_path / "evaluation", said, after=model, datasets=datasets)
    found = metrics_of(tmp_path / "evaluation")["models"]["after"]
    print(f"{at_once} a device: {found}")
    assert found["ended_share"] == found["wanted_share"] == 1.0
