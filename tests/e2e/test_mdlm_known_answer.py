"""What is known beforehand: which preference a tuned model shows, and which draws have the least variance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mdlm_artifacts import demo, make_toy, metrics_of, run_stage
from training_artifacts import publish_as

from benchmarks.exact_joints import allocation_variances
from prefmill.core.artifact import Artifact
from prefmill.demo.toy_language import HARSH, KIND
from prefmill.families.causal.chat import encode
from prefmill.store.artifacts import read
from prefmill.store.jsonl import write_jsonl
from tests.documented_runs import DocumentedRun


def tuned(seed: int, folder: Path, documented: DocumentedRun) -> tuple[Artifact, Artifact, Artifact]:
    """The toy's datasets, the model fine-tuned on them and the one tuned by their preferences; seed 0 is the demo's."""
    if seed == 0:
        assert documented.returncode == 0, documented.printed
        made = documented.checkout
        names = ("data/mdlm/toy_preferences", "checkpoints/mdlm/mdlm_sft", "checkpoints/mdlm/mdlm_dpo")
        datasets, before, after = (read(next((made / name).iterdir())) for name in names)
        return datasets, before, after
    datasets = make_toy(folder / "toy", **demo("toy_preferences", seed=seed))
    run_stage("mdlm_sft", folder / "sft", demo("mdlm_sft", seed=seed), datasets=datasets)
    before = publish_as(folder / "sft" / "out", "checkpoint")
    run_stage("mdlm_dpo", folder / "dpo", demo("mdlm_dpo", seed=seed), policy=before, datasets=datasets)
    return datasets, before, publish_as(folder / "dpo" / "out", "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kind_answers_rise_from_half_to_nine_in_ten_and_only_by_right_labels(
    tmp_path: Path, seed: int, documented_mdlm: DocumentedRun
) -> None:
    datasets, before, after = tuned(seed, tmp_path, documented_mdlm)
    keys = demo("mdlm_dpo", seed=seed, shuffle_labels=True)
    run_stage("mdlm_dpo", tmp_path / "shuffled", keys, policy=before, datasets=datasets)
    control = publish_as(tmp_path / "shuffled" / "out", "checkpoint")
    keys = demo("mdlm_evaluate", seed=seed, samples_per_prompt=75, diffusion_steps=8)
    run_stage("mdlm_evaluate", tmp_path / "true", keys, before=before, after=after, datasets=datasets)
    run_stage("mdlm_evaluate", tmp_path / "control", keys, after=control, datasets=datasets)
    true, shuffled = (metrics_of(tmp_path / name)["models"] for name in ("true", "control"))
    shares = {name: found["wanted_share"] for name, found in {**true, "shuffled": shuffled["after"]}.items()}
    print(f"kind answers, seed {seed}: {shares}")
    assert min(found["ended_share"] for found in true.values()) >= 0.95, "answers stop"
    assert shares["before"] == pytest.approx(0.5, abs=0.05)
    assert shares["after"] >= 0.9
    assert shares["shuffled"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_a_trained_model_has_vrpos_order_of_variances(tmp_path: Path) -> None:
    """VRPO's table 2 (arXiv 2505.19223): answers of one word four times over, so that mask counts matter.

    Exact: every masking of every answer under policy and reference, after two steps of preference training.
    """
    from benchmarks.exact_joints import all_masked_sums
    from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of

    answers = [" ".join([word] * 4) for word in (*KIND, *HARSH)]
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "how is it", "completion": answers[n % 8]} for n in range(800)])
    rows = [{"prompt": "how is it", "chosen": answers[n % 4], "rejected": answers[4 + n // 4 % 4]} for n in range(64)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    run_stage("mdlm_sft", tmp_path / "sft", demo("mdlm_sft", sft_data_path=str(tmp_path / "sft.jsonl")))
    before = publish_as(tmp_path / "sft" / "out", "checkpoint")
    keys = demo("mdlm_dpo", preference_data_path=str(tmp_path / "pairs.jsonl"), learning_rate=3e-4, num_train_epochs=2)
    run_stage("mdlm_dpo", tmp_path / "dpo", keys, policy=before)
    tokenizer = load_diffusion_tokenizer(str(before.path))
    folders = (tmp_path / "dpo" / "out", before.path)
    policy, reference = (load_diffusion_model(str(folder), precision="fp32") for folder in folders)
    mask, tables = mask_token_of(reference, tokenizer), []
    for answer in answers:
        row = encode(tokenizer, [{"role": "user", "content": "how is it"}], answer)
        tables.append(allocation_variances(*(all_masked_sums(model, *row, mask) for model in (policy, reference))))
    found = [float(np.mean([table[name] for table in tables])) for name in tables[0]]
    assert found == sorted(found)
    assert found[-1] > 50 * found[1], "shared draws against draws of their own"
