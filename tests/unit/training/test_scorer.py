"""Log-likelihoods against one unpadded sequence at a time, and against TRL's DPOTrainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.families.causal import scorer
from prefmill.families.causal.chat import encode
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.scorer import encode_pairwise, encode_sequences, patch_forward, score_batch, token_logps
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group, group_by_prompt, read_pairs
from prefmill.training.objectives import OBJECTIVES, PairScores, Settings


@pytest.fixture(scope="module")
def groups(tiny_qwen2: Path, pairs_file: Path) -> list[Group]:
    tokenizer = load_tokenizer(str(tiny_qwen2))
    return group_by_prompt(read_pairs(pairs_file), partial(encode, tokenizer))


def one_at_a_time(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The sum of log p over a response, from full logits of one unpadded sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


def test_scores_and_gradients_equal_one_sequence_at_a_time(
    tiny_qwen2: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "LOGITS_AT_ONCE", 5)
    plain = load_model(str(tiny_qwen2), precision="fp32").double()
    sequences = [(group.prompt, response) for group in groups for response in group.responses]
    expected = torch.stack([one_at_a_time(plain, *sequence) for sequence in sequences])
    expected.square().sum().backward()
    scored = patch_forward(load_model(str(tiny_qwen2), precision="fp32").double())
    found = score_batch(scored, encode_sequences(sequences, pad=0))
    found.square().sum().backward()
    assert (found - expected).abs().max() < 1e-9
    for (name, left), right in zip(plain.named_parameters(), scored.parameters(), strict=True):
        assert left.grad is not None, name
        assert right.grad is not None, name
        assert (left.grad - right.grad).abs().max() <= 1e-9 * left.grad.abs().max(), name


def test_padding_changes_nothing(tiny_qwen2: Path, groups: list[Group]) -> None:
    model = patch_forward(load_model(str(tiny_qwen2), precision="fp32"))
    sequences = [(group.prompt, response) for group in groups for response in group.responses]
    together = score_batch(model, encode_sequences(sequences, pad=0))
    alone = torch.cat([score_batch(model, encode_sequences([sequence], pad=0)) for sequence in sequences])
    assert (together - alone).abs().max() < 1e-5


def test_chunks_of_logits_change_nothing(tiny_qwen2: Path) -> None:
    head = torch.nn.Linear(8, 50).double()
    hidden, target = torch.randn(600, 8, dtype=torch.float64), torch.randint(0, 50, (600,))
    expected = head(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(token_logps(hidden, target, head), expected, atol=1e-12)


@pytest.mark.slow
def test_loss_and_gradient_equal_trl(tiny_qwen2: Path, groups: list[Group], pairs_file: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(str(tiny_qwen2))
    policy = load_model(str(tiny_qwen2), precision="fp32")
    with torch.no_grad():  # away from the reference, so that the loss is not ln 2
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    moved = {name: value.clone() for name, value in policy.state_dict().items()}
    rows = [
        {
            "prompt": pair.messages,
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in read_pairs(pairs_file)
    ]
    trl = DPOTrainer(
        model=policy,
        ref_model=load_model(str(tiny_qwen2), precision="fp32"),
        args=DPOConfig(output_dir=str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to="none", max_length=None,
                       per_device_train_batch_size=len(rows)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = trl.data_collator([trl.train_dataset[index] for index in range(len(rows))])
    trl.model.eval()
    trl_loss = trl.compute_loss(trl.model, batch)
    trl_loss.backward()
    expected = {name: value.grad.clone() for name, value in policy.named_parameters()}

    ours = patch_forward(load_model(str(tiny_qwen2), precision="fp32"))
    parts = [GroupPart(index, tuple(range(len(group.pairs)))) for index, group in enumerate(groups)]
    encoded = encode_pairwise(groups, parts, pad=0)
    with torch.no_grad():
        reference = score_batch(ours, encoded)
    ours.load_state_dict(moved)
    scores = score_batch(ours, encoded)
    lengths = encoded.lengths.float()
    pair_scores = PairScores(
        scores[encoded.chosen], scores[encoded.rejected], lengths[encoded.chosen], lengths[encoded.rejected],
        reference[encoded.chosen], reference[encoded.rejected],
    )  # fmt: skip
    loss = OBJECTIVES["sigmoid"].loss(pair_scores, Settings(beta=0.3)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(trl_loss.item(), abs=1e-5)
    assert abs(loss.item() - 0.6931) > 0.01
    for name, value in ours.named_parameters():
        assert (value.grad - expected[name]).abs().max() < 1e-5, name
