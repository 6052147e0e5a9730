"""The Makefile's shortcuts run the stages they are named after."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import REPOSITORY

RUN = ".venv/bin/prefmill run configs/pipelines/"
IMAGES = f"OMP_NUM_THREADS=1 {RUN}images.yaml --jobs 2 "  # the number of cores changes no result


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("all", IMAGES),
        ("generate", f"{IMAGES} --only generate_images"),
        ("annotate", f"{IMAGES} --only rate_images"),
        ("build-pairs", f"{IMAGES} --only build_image_pairs"),
        ("train-reward", f"{IMAGES} --only train_reward"),
        ("train-dspo", f"{IMAGES} --only sdxl_dpo"),
        ("sweep", f"{RUN}sweep.yaml "),
    ],
)
def test_a_shortcut_runs_its_stage(target: str, command: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert command in done.stdout.splitlines()


def test_another_pipeline_and_keys_can_be_given() -> None:
    given = ["IMAGES=configs/pipelines/sdxl.yaml", "ARGS=run=mine"]
    done = subprocess.run(
        ["make", "-n", "train-dspo", *given], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert f"{RUN}sdxl.yaml run=mine --only sdxl_dpo" in done.stdout.splitlines()
