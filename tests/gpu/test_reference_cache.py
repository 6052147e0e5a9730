"""Point 5: reference scores are computed once, then only checked; those of another kind of device are not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.group_layout import pack
from prefmill.families.causal.scorer import patch_forward, score_batch
from prefmill.training.data import Group
from prefmill.training.reference import GroupScoring, kept_reference, reference_scores
from tests.gpu.training import task_in
from tests.training_steps import qwen2


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_scores_are_kept_by_device(device: torch.device, precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with device:
        model = qwen2("tiny" if device.type == "cpu" else "true").to(dtype).eval()
    use_group_attention(model)
    patch_forward(model)
    members = [Group([1, 2, 3 + number], [[5, 6], [7] * (1 + number)], []) for number in range(12)]
    asked: list[Any] = []

    def score(batch: Any) -> Tensor:
        asked.append(batch)
        with torch.no_grad():
            return score_batch(model, batch)

    scoring = GroupScoring(
        content=lambda group: [group.prompt, group.responses],
        batches=lambda group: [pack([(group.prompt, group.responses)]).to(device)],
        score=score,
        join=lambda group, scores: scores[0],
    )

    def scored_on(where: torch.device) -> list[Tensor]:
        asked.clear()
        task = task_in(tmp_path)
        return reference_scores(members, scoring, kept_reference(task, "weights", {}, where), task, precision)

    first = scored_on(device)
    assert len(asked) == len(members)
    for _ in range(2):
        again = scored_on(device)
        assert len(asked) == 1, "one in a hundred is checked, and none computed anew"
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    scored_on(torch.device("meta" if device.type == "cpu" else "cpu"))
    assert len(asked) == len(members), "scores of another kind of device are a miss"
