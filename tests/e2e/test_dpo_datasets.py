"""dpo on datasets that build_datasets did not make: every form trains, and its loss is that of TRL's DPOTrainer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from training_artifacts import make_datasets, make_task, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.families.causal.chat import encode
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.pairs.sources import PairSource
from prefmill.pairs.writing import write_pairs
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.data import group_by_prompt, read_pairs
from stages.dpo import DpoConfig, run
from tests.unit.pairs.test_formats import SAME

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4,
    "per_device_train_batch_size": 4, "max_len": 2048, "logging_steps": 1, "save_steps": 50, "report_to": [],
}  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from prefmill.demo.tiny_models import build

    return publish_as(build("qwen2", tmp_path_factory.mktemp("policy")), "checkpoint")


def dpo(folder: Path, policy: Artifact, dataset: object, **keys: Any) -> dict[str, Any]:
    config = validate(DpoConfig, {**SETTINGS, "dataset": str(dataset), **keys})
    return run(config, make_task("dpo", folder, policy=policy))


def trl_form(row: dict[str, Any]) -> dict[str, Any]:
    """A ShareGPT row in TRL's form, by a conversion of the test's own."""
    chats = {"prompt": row["conversations"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}
    return {
        key: [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        for key, turns in chats.items()
    }


def short_rows(shared_data: Path, count: int) -> list[dict[str, Any]]:
    rows = json.loads((shared_data / "pairs" / "llamafactory_dpo_en_demo.json").read_text())
    return sorted(rows, key=lambda row: len(json.dumps(row)))[:count]


@pytest.mark.slow
def test_shared_pairs_have_the_token_ids_and_the_loss_of_trl(
    shared_data: Path, policy: Artifact, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    path = shared_data / "pairs" / "llamafactory_dpo_en_demo.json"
    tokenizer = load_tokenizer(str(policy.path))
    train, _ = write_pairs(validate(PairSource, {"dataset": str(path)}), tmp_path / "own", tmp_path / "bad.json")
    groups = group_by_prompt(read_pairs(train), partial(encode, tokenizer))
    ours = {
        pair.pair_id: (group.prompt, group.responses[pair.chosen], group.responses[pair.rejected])
        for group in groups
        for pair in group.pairs
    }
    trainer = DPOTrainer(
        model=load_model(str(policy.path), precision="fp32"),
        ref_model=load_model(str(policy.path), precision="fp32"),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", max_length=None,
                       save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-3, max_steps=2,
                       logging_steps=1, train_sampling_strategy="sequential", lr_scheduler_type="constant"),
        train_dataset=Dataset.from_list([trl_form(row) for row in json.loads(path.read_text())]),
        processing_class=tokenizer,
    )  # fmt: skip
    for number, row in enumerate(trainer.train_dataset):
        assert ours[f"row-{number}"] == (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["group", "pairwise"])
def test_the_curve_is_that_of_trl(layout: str, shared_data: Path, policy: Artifact, tmp_path: Path) -> None:
    """One pass over eight pairs at four a step, in the order of prefmill's plan."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = short_rows(shared_data, 8)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    keys = {"lr_scheduler_type": "constant", "layout": layout}
    dpo(tmp_path, policy, tmp_path / "rows.json", **keys)
    losses = [row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row]
    log = list(read_jsonl(tmp_path / "logs" / "margins" / "margins_log.jsonl"))
    order = [int(row["pair_id"].removeprefix("row-")) for row in log]
    assert sorted(order) == list(range(8))
    trainer = DPOTrainer(
        model=load_model(str(policy.path), precision="fp32"),
        ref_model=load_model(str(policy.path), precision="fp32"),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", max_length=None,
                       save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-3, num_train_epochs=1,
                       logging_steps=1, train_sampling_strategy="sequential", lr_scheduler_type="constant"),
        train_dataset=Dataset.from_list([trl_form(rows[place]) for place in order]),
        processing_class=load_tokenizer(str(policy.path)),
    )  # fmt: skip
    trainer.train()
    expected = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert losses == pytest.approx(expected, abs=2e-5)
    assert abs(losses[1] - losses[0]) > 1e-3


@pytest.mark.slow
def test_every_form_trains_to_the_same_weights(policy: Artifact, tmp_path: Path) -> None:
    digests = set()
    for form, row in SAME.items():
        write_jsonl(tmp_path / form / "rows.jsonl", [row])
        metrics = dpo(tmp_path / form, policy, tmp_path / form / "rows.jsonl", effective_batch_size=4)
        assert metrics["pairs"] == 1
        digests.add((tmp_path / form / "out" / "model.safetensors").read_bytes())
    assert len(digests) == 1


def test_what_it_refuses(policy: Artifact, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [SAME["trl_messages"]])
    config = validate(DpoConfig, {**SETTINGS, "dataset": str(tmp_path / "rows.jsonl")})
    with pytest.raises(PipelineError, match="two datasets to train on"):
        run(config, make_task("dpo", tmp_path, policy=policy, datasets=make_datasets(tmp_path / "data")))
    with pytest.raises(PipelineError, match="no dataset to train on"):
        run(validate(DpoConfig, SETTINGS), make_task("dpo", tmp_path, policy=policy))
    with pytest.raises(ConfigError, match="one key under two names"):
        validate(DpoConfig, {"max_len": 3, "max_length": 3})


def test_mount_dir_takes_outputs_and_logs(tmp_path: Path) -> None:
    from prefmill.pipeline.manual_submission import stage_plan

    write_jsonl(tmp_path / "rows.jsonl", [SAME["trl_messages"]])
    keys = [
        "run=r",
        "dataset=" + str(tmp_path / "rows.jsonl"),
        f"mount_dir={tmp_path / 'disk'}",
        "model_name_or_path=m",
    ]
    plan, _ = stage_plan("dpo", keys)
    (task,) = plan.tasks
    assert task.output == tmp_path / "disk" / "checkpoints" / "r" / "dpo" / "all"
    assert task.logs == tmp_path / "disk" / "logs" / "r" / "dpo" / "all"
