"""Keys that nothing would read are refused: a setting without effect is a fault that nobody sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.core.stage import load_stage
from prefmill.families.mdlm.family import DiffusionFamily
from prefmill.store.jsonl import write_jsonl
from prefmill.training.objective_names import NEEDS, READ_BY
from prefmill.training.objectives import OBJECTIVES, PairScores, Settings
from tests.e2e.training_artifacts import make_task
from tests.tiny import pair_rows

OF_A_FILE = {"name": "b", "kind": "exact_match", "file": __file__, "subset": "main", "split": "train"}


@pytest.mark.parametrize(
    ("stage", "keys", "why"),
    [
        ("dpo", {"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing: no effect with loss_type ipo"),
        ("dpo", {"simpo_gamma": 1.0}, "simpo_gamma: no effect with loss_type sigmoid"),
        ("dpo", {"beta": 0.5, "loss_type": "sft"}, "beta: no effect with loss_type sft"),
        ("dpo", {"layout": "pairwise", "max_tokens_per_microbatch": 60}, "leave max_tokens_per_microbatch out"),
        ("mdlm_dpo", {"upper_power": 2.0, "clip": 0.1}, "upper_power, clip: no effect with loss_type sigmoid"),
        ("mdlm_dpo", {"max_diffusion_steps": 8}, "max_diffusion_steps is of diffusion_steps: auto"),
        ("mdlm_sft", {"variance_tolerance": 0.5}, "variance_tolerance is of mdlm_dpo"),
        ("dpo", {"max_rows": 9, "tags": {"role": "r"}}, "max_rows, tags: of `dataset`, which is not given"),
        ("sft", {"val_fraction": 0.1}, "val_fraction: of `dataset`, which is not given"),
        ("dpo", {"dataset": "x.parquet", "encoding": "latin-1"}, "encoding is of text files"),
        ("evaluate", {"model": "base", "temperature": 0.0, "samples_per_paper": 2}, "samples_per_paper are the same"),
        ("mdlm_evaluate", {"samples_per_prompt": 2}, "samples_per_prompt are the same"),
        ("mdlm_evaluate", {"benchmarks": [OF_A_FILE]}, "subset, split: of a dataset on the hub"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(stage: str, keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate(load_stage(stage).config, keys)


@pytest.mark.parametrize(("key", "names"), READ_BY.items())
def test_the_objectives_that_read_a_key_are_those_it_changes(key: str, names: set[str]) -> None:
    """By the losses themselves; `upper_power` is of the bounds that spg is given."""
    if key == "upper_power":
        return
    sides = ("chosen", "rejected", "ref_chosen", "ref_rejected", "rejected_upper", "ref_rejected_upper")
    draws = torch.Generator().manual_seed(0)
    scores = PairScores(
        **{name: torch.rand(9, generator=draws, dtype=torch.float64) * 9 - 9 for name in sides},
        chosen_length=torch.full((9,), 3.0), rejected_length=torch.full((9,), 5.0),
    )  # fmt: skip
    settings = Settings(beta=0.1, label_smoothing=0.1)
    changed = replace(settings, **{key: 0.3})
    usable = [name for name, needs in NEEDS.items() if needs <= DiffusionFamily.supplies]
    losses = [[OBJECTIVES[name].loss(scores, given) for name in usable] for given in (settings, changed)]
    read = {name for name, one, other in zip(usable, *losses, strict=True) if not torch.equal(one, other)}
    assert read == names & set(usable)


def test_keys_that_the_model_or_its_rows_do_not_read_are_told(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(2))
    keys = {"dataset": str(tmp_path / "pairs.jsonl"), "model_name_or_path": str(tiny_qwen2), "precision": "fp32",
            "per_device_train_batch_size": 4, "effective_batch_size": 4, "report_to": []}  # fmt: skip
    unread = {"modality": "vision", "freeze_vision_tower": True, "freeze_projector": False, "max_pixels": 50_000,
              "image_folder": str(tmp_path), "fsdp": True}  # fmt: skip
    stage = load_stage("dpo")
    stage.run(validate(stage.config, keys), make_task("dpo", tmp_path / "plain"))
    assert "no effect" not in caplog.text
    stage.run(validate(stage.config, {**keys, **unread}), make_task("dpo", tmp_path / "told"))
    told = {key for line in caplog.messages if ": no effect, " in line for key in line.split(":")[0].split(", ")}
    assert told == unread.keys()


def test_epochs_beside_steps_are_told(caplog: pytest.LogCaptureFixture) -> None:
    for keys in ({"max_steps": 5}, {"num_train_epochs": 3}, {"max_steps": 5, "num_train_epochs": 3}):
        assert caplog.messages == []
        validate(load_stage("sdxl_dpo").config, keys).tell_unread_with()
    assert caplog.messages == ["num_train_epochs: no effect, with max_steps"]
