"""A checkpoint that lacks weights is refused, tied weights are no lack, and a hub's names come back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from prefmill.core.errors import PipelineError
from prefmill.families.causal.loading import load_model
from prefmill.training.checkpoints import resume_strictly


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from prefmill.demo.tiny_models import build

    return load_model(str(build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))), precision="fp32")


def test_missing_weights_are_refused_but_tied_ones(model: Any) -> None:
    passed: list[Any] = []
    trainer = SimpleNamespace(model=model, _issue_warnings_after_load=passed.append)
    resume_strictly(trainer)
    tied = SimpleNamespace(missing_keys=["lm_head.weight"], unexpected_keys=[])
    trainer._issue_warnings_after_load(tied)
    assert passed == [tied]
    with pytest.raises(PipelineError, match="lacks weights"):
        trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=["model.a"], unexpected_keys=["a"]))


def test_checkpoints_keep_the_models_names_and_finished_folders_the_hubs(model: Any, tmp_path: Path) -> None:
    resume_strictly(SimpleNamespace(model=model, _issue_warnings_after_load=None))
    own = {name for name, _ in model.named_parameters()}
    names = {}
    for folder in ("checkpoint-3", "finished"):
        model.save_pretrained(tmp_path / folder)
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as stored:
            names[folder] = set(stored.keys())
    assert names["checkpoint-3"] == own
    assert names["finished"] != own
