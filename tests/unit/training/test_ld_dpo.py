"""LD-DPO: sums against a loop over tokens in float64, and a training that begins at ln 2 in either layout."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.stage import Task
from prefmill.families.causal.ld_dpo import DesensitizedFamily, pair_sums
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.scorer import encode_sequences, patch_forward, score_batch
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.objectives import Settings, mix
from prefmill.training.preference_config import PreferenceConfig
from tests.threads import same_bits
from tests.tiny import pair_rows, sentence

KEYS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 4, "logging_steps": 1, "save_steps": 4, "max_length": 64, "report_to": [],
}  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_sums_are_those_of_a_loop(alpha: float) -> None:
    """Four responses, the second of one token; one is in three pairs, with rivals longer and shorter than itself."""
    lengths, pairs = [5, 1, 9, 3], [(0, 1), (2, 0), (0, 3), (1, 2)]
    tokens = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of = [part.tolist() for part in torch.split(tokens, lengths)]
    sides = [torch.tensor(side) for side in zip(*pairs, strict=True)]
    found = pair_sums(tokens, torch.tensor(lengths), sides[0], sides[1], alpha)
    for number, (good, bad) in enumerate(pairs):
        shared = min(lengths[good], lengths[bad])
        for sums, place in zip(found, (good, bad), strict=True):
            expected = math.fsum(of[place][:shared]) + alpha * math.fsum(of[place][shared:])
            assert sums[number].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_the_anchor_of_a_mix_is_trls_beside_ld_dpo(tiny_qwen2: Path, tmp_path: Path) -> None:
    """`sft` counted what the chosen side says beyond its rival by alpha too: with 0 its end was not learnt."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = load_model(str(tiny_qwen2), precision="fp32"), load_tokenizer(str(tiny_qwen2))
    texts = {"prompt": sentence(1, 9), "chosen": sentence(2, 8), "rejected": sentence(3, 3)}
    keys: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.3}
    trl = DPOTrainer(
        model=copy.deepcopy(model), ref_model=copy.deepcopy(model), processing_class=tokenizer,
        args=DPOConfig(str(tmp_path), ld_alpha=0.2, use_cpu=True, bf16=False, report_to="none", **keys),
        train_dataset=Dataset.from_list([texts]),
    )  # fmt: skip
    expected = trl.compute_loss(trl.model, trl.data_collator([trl.train_dataset[0]])).item()
    row = trl.train_dataset[0]
    patch_forward(model)
    parts = DesensitizedFamily(lambda *_: None, score_batch, 0.2)
    batch = encode_sequences([(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")], pad=0)
    batch = replace(batch, chosen=torch.tensor([0]), rejected=torch.tensor([1]))
    given = parts.pair_scores(model, batch)
    given = replace(given, ref_chosen=given.chosen.detach(), ref_rejected=given.rejected.detach())
    settings = Settings(beta=0.3)
    assert mix(["sigmoid", "sft"], [1.0, 0.7], settings).loss(given, settings).item() == pytest.approx(
        expected, abs=1e-5
    )


def test_gradients_are_the_same_bits_every_time_on_several_threads() -> None:
    """A response that stands in many pairs takes a gradient from each; threads added them in any order."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    lengths, sides = torch.tensor([600, 400]), torch.zeros(60, dtype=torch.long)

    def gradient() -> torch.Tensor:
        tokens = values.clone().requires_grad_()
        good, bad = pair_sums(tokens, lengths, sides, sides + 1, 0.3)
        scale = torch.linspace(0.1, 1.7, len(good))
        (found,) = torch.autograd.grad(((good - bad) * scale).sum(), tokens)
        return found

    assert same_bits(gradient)


def train(folder: Path, model: Path, rows: Path, **keys: Any) -> list[dict[str, Any]]:
    from prefmill.families.causal.dpo import train_dpo

    (folder / "out").mkdir(parents=True)
    task = Task("r", "dpo", "clean", {}, {}, {}, folder / "out", folder / "logs")
    train_dpo(PreferenceConfig(**{**KEYS, **keys}), task, str(model), rows, rows)
    return list(read_jsonl(folder / "logs" / "margins" / "margins_log.jsonl"))


@pytest.mark.slow
def test_it_begins_at_ln_2_and_layouts_agree(tmp_path: Path, tiny_qwen2: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", pair_rows(6, 3))
    rows = tmp_path / "data.jsonl"
    group = train(tmp_path / "group", tiny_qwen2, rows, layout="group", ld_alpha=0.4)
    pairwise = train(tmp_path / "pairwise", tiny_qwen2, rows, layout="pairwise", ld_alpha=0.4)
    losses = [row["loss"] for row in read_curve(tmp_path / "group" / "logs" / STEPS) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.95 * losses[0]
    first = [{row["pair_id"]: row for row in run if row["step"] <= 2} for run in (group, pairwise)]
    for name, row in first[0].items():
        assert row["ref_chosen_logps"] == pytest.approx(first[1][name]["ref_chosen_logps"], abs=1e-4)
        assert row["margin"] == pytest.approx(first[1][name]["margin"], abs=1e-3)


@pytest.mark.slow
def test_alpha_one_is_dpo_and_less_is_not(tmp_path: Path, tiny_qwen2: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", pair_rows(6, 3))
    plain, one, none = (
        train(tmp_path / str(alpha), tiny_qwen2, tmp_path / "data.jsonl", layout="group", ld_alpha=alpha)
        for alpha in (None, 1.0, 0.0)
    )
    for key in ("margin", "ref_rejected_logps"):
        assert [row[key] for row in one] == pytest.approx([row[key] for row in plain], abs=1e-4)
    assert [row["margin"] for row in none] != pytest.approx([row["margin"] for row in plain], abs=1e-2)
    unequal = [row for row in none if row["chosen_length"] > row["rejected_length"]]
    plain_of = {(row["step"], row["pair_id"]): row["ref_chosen_logps"] for row in plain}
    assert unequal
    assert all(row["ref_chosen_logps"] > plain_of[row["step"], row["pair_id"]] + 0.1 for row in unequal)
