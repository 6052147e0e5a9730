"""`router_aux_loss_coef`: dpo and sft train a mixture of experts with its balancing loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_artifacts import make_checkpoint, make_datasets, make_task
from transformers import AutoModelForCausalLM

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.training.checkpoints import STEPS, read_curve
from stages import dpo, sft
from tests.models.tiny_configs import tiny_config
from tests.tiny import make_tokenizer

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-6, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4, "max_length": 64,
    "logging_steps": 1, "save_steps": 100, "report_to": [],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "keys"), [(dpo, {"layout": "group"}), (dpo, {"layout": "pairwise"}), (sft, {})])
def test_the_loss_has_the_balancing_loss_beside_it(tmp_path: Path, stage: Any, keys: dict[str, Any]) -> None:
    tokenizer, config = make_tokenizer(), tiny_config("mixtral")
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    datasets, first = make_datasets(tmp_path / "data"), []
    for name, coefficient in (("without", 0.0), ("with", 0.5)):
        given = {"model_name_or_path": str(tmp_path / "base"), "router_aux_loss_coef": coefficient, **keys}
        stage.run(
            validate(stage.STAGE.config, {**SETTINGS, **given}),
            make_task(stage.STAGE.name, tmp_path / name, datasets=datasets),
        )
        first.append(next(row["loss"] for row in read_curve(tmp_path / name / "logs" / STEPS) if "loss" in row))
    if stage is dpo:
        assert first[0] == pytest.approx(math.log(2), abs=1e-6)
    assert 0.9 < first[1] - first[0] < 2, "two of four experts, evenly: the loss is near 2, half of it counts"


@pytest.mark.parametrize("stage", [dpo, sft])
def test_a_model_without_experts_is_refused_by_name(tmp_path: Path, stage: Any) -> None:
    """In sft it was a traceback of TRL's."""
    config = validate(stage.STAGE.config, {**SETTINGS, "router_aux_loss_coef": 0.1})
    task = make_task(stage.STAGE.name, tmp_path, datasets=make_datasets(tmp_path / "data"),
                     **{"model" if stage is sft else "policy": make_checkpoint(tmp_path / "base")})  # fmt: skip
    with pytest.raises(ConfigError, match="does not report what its experts were given"):
        stage.run(config, task)
