"""The six trainings of configs/pipelines/train.yaml, text and vision, with tiny models: on Slurm as on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.slurm.cluster import ClusterFile
from prefmill.slurm.rehearsal_plan import rehearsal_of
from tests.conftest import REPOSITORY
from tests.e2e.pipeline_runs import run
from tests.slurm.conftest import Site
from tests.slurm.test_submit import digests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SHIPPED = REPOSITORY / "configs/pipelines/train.yaml"
# One process each, which needs no ZeRO, and few steps.
FEW = [
    "ingest_reviews.sources=[{format: generated, num_papers: 30, images: true}]",
    "stages.score_reviews.array={shard: 1}",
    *(f"{stage}.{key}" for stage in ("sft", "dpo") for key in ("deepspeed=null", "num_train_epochs=1")),
]  # fmt: skip


def test_six_trainings_give_what_a_local_run_gives(site: Site, tmp_path: Path) -> None:
    pipeline = read_pipeline(SHIPPED, [f"workspace={tmp_path}", "run=six", *FEW])
    small, _ = rehearsal_of(pipeline, make_plan(pipeline, SHIPPED), SHIPPED, ClusterFile())
    path = tmp_path / "six.yaml"
    path.write_text(yaml.safe_dump(small.model_dump(mode="json")))
    keys = [f"{stage}.num_train_epochs=1" for stage in ("sft", "dpo")]
    run(tmp_path / "near", "run=six", *keys, pipeline=path)
    (cluster := tmp_path / "cluster.yaml").write_text(
        "advance: false\nexport: [OMP_NUM_THREADS, HF_HUB_OFFLINE]\nresources: {cpus: 4}\n"
    )
    far = Site(site.cluster, REPOSITORY, tmp_path / "far")
    done = far.prefmill("submit", str(path), f"workspace={far.workspace}", "run=six", *keys, "--cluster", str(cluster))
    assert done.returncode == 0, done.stderr
    far.wait(seconds=900)
    made = digests(far.workspace, "six")
    assert made == digests(tmp_path / "near", "six"), far.logs()
    assert sum(key.startswith(("sft:", "dpo:")) for key in made) == 6
