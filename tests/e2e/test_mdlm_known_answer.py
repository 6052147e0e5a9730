"""A preference whose right answer is known: tuned models show it on held-out prompts, shuffled labels teach nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from mdlm_artifacts import demo, make_toy, metrics_of, run_stage
from training_artifacts import publish_as


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kind_answers_rise_from_half_to_nine_in_ten_and_only_by_right_labels(tmp_path: Path, seed: int) -> None:
    datasets = make_toy(tmp_path / "toy", seed=seed, num_sft=1600, num_pairs=800, num_prompts_held_out=20)
    run_stage("mdlm_sft", tmp_path / "sft", demo("mdlm_sft", seed=seed), datasets=datasets)
    before = publish_as(tmp_path / "sft" / "out", "checkpoint")
    shares = {}
    for shuffled in (False, True):
        folder = tmp_path / f"shuffled_{shuffled}"
        keys = demo("mdlm_dpo", seed=seed, shuffle_labels=shuffled)
        run_stage("mdlm_dpo", folder, keys, policy=before, datasets=datasets)
        after = publish_as(folder / "out", "checkpoint")
        keys = demo("mdlm_evaluate", seed=seed, samples_per_prompt=75, diffusion_steps=8)
        run_stage("mdlm_evaluate", folder / "evaluation", keys, before=before, after=after, datasets=datasets)
        models = metrics_of(folder / "evaluation")["models"]
        shares[shuffled] = models["after"]["wanted_share"]
        shares["before"] = models["before"]["wanted_share"]
    print(seed, shares)
    assert shares["before"] == pytest.approx(0.5, abs=0.07)
    assert shares[False] >= 0.9
    assert shares[True] == pytest.approx(0.5, abs=0.05)
