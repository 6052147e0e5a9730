"""What is known beforehand: which preference a tuned model shows, and which draws have the least variance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mdlm_artifacts import demo, make_toy, metrics_of, run_stage
from training_artifacts import publish_as

from prefmill.causal.chat import encode
from prefmill.mdlm.exact import allocation_variances
from prefmill.mdlm.toy import HARSH, KIND
from prefmill.records import write_jsonl


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
        models = {"after": after} if shuffled else {"before": before, "after": after}
        run_stage("mdlm_evaluate", folder / "evaluation", keys, **models, datasets=datasets)
        found = metrics_of(folder / "evaluation")["models"]
        shares |= {shuffled if name == "after" else name: found[name]["wanted_share"] for name in models}
    print(f"kind answers, seed {seed}: {shares}")
    assert shares["before"] == pytest.approx(0.5, abs=0.05)
    assert shares[False] >= 0.9
    assert shares[True] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_a_trained_model_has_vrpos_order_of_variances(tmp_path: Path) -> None:
    """VRPO's table 2 (arXiv 2505.19223): answers of one word four times over, so that mask counts matter.

    Exact: every masking of every answer under policy and reference, after two steps of preference training.
    """
    from prefmill.mdlm.likelihood import all_masked_sums
    from prefmill.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of

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
