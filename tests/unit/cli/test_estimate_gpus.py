"""`prefmill estimate` refuses what would take days on CPUs, in the shipped pipelines."""

from __future__ import annotations

import pytest

from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.slurm.cluster import Resources
from prefmill.slurm.estimate import _without_gpu
from prefmill.slurm.policy import by_stage
from tests.conftest import REPOSITORY

JUDGE = "it judges with Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("checklist", [f"optimize_checklist: {JUDGE}", f"score_reviews: {JUDGE}"]),
        ("sdxl", ["train_reward: it trains", "sdxl_dpo: it trains"]),
    ],
)
def test_a_training_or_a_judge_without_a_gpu_is_refused(name: str, said: list[str]) -> None:
    source = REPOSITORY / f"configs/pipelines/{name}.yaml"
    stages = by_stage(make_plan(read_pipeline(source), source))
    told = [f"{stage}: {text}" for stage, tasks in stages.items() for text in _without_gpu(tasks[0], Resources(), None)]
    assert [text.split(" and gets no GPU")[0] for text in told] == said
    assert not [text for tasks in stages.values() for text in _without_gpu(tasks[0], Resources(gpus=1), None)]
