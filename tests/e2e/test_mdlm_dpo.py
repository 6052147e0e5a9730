"""mdlm_dpo: step 0, the reference's draws, resuming, draws that follow the variance, adapters, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from mdlm_artifacts import SMALL, make_model, make_toy, run_stage
from safetensors.torch import load_file
from training_artifacts import content, executed_steps, kill_after, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.mdlm_dpo import STAGE, MdlmDpoConfig

KEYS: dict[str, Any] = {**SMALL, "learning_rate": 2e-3, "diffusion_steps": 4}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, datasets: Artifact) -> Artifact:
    return make_model(tmp_path_factory.mktemp("policy"), datasets)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, policy: Artifact, datasets: Artifact) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    run_stage("mdlm_dpo", folder, KEYS, policy=policy, datasets=datasets)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


def test_defaults_are_those_of_the_issue() -> None:
    config = MdlmDpoConfig()
    assert (config.learning_rate, config.num_train_epochs, config.beta, config.diffusion_steps) == (5e-6, 3, 0.1, 20)
    assert (config.per_device_train_batch_size, config.effective_batch_size) == (1, 16)
    assert (config.save_steps, config.logging_steps, config.seed) == (500, 50, 42)
    assert STAGE.reads["policy"].stage == "mdlm_sft"


def test_it_starts_at_ln_2_and_learns(undisturbed: Path) -> None:
    curve = rows_of(undisturbed)
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[-1]["loss"] < 0.69
    assert curve[0]["draw_variance"] == pytest.approx(0, abs=1e-6)
    assert curve[-1]["draw_variance"] > 0
    assert {row["draws"] for row in curve} == {4}


@pytest.mark.parametrize(("name", "start"), [("spg", math.log(2)), ("espo", 0.0)])
def test_bounds_of_the_likelihood_train_too(
    name: str, start: float, tmp_path: Path, policy: Artifact, datasets: Artifact
) -> None:
    keys = {**KEYS, "loss_type": [name], "num_train_epochs": 1}
    run_stage("mdlm_dpo", tmp_path, keys, policy=policy, datasets=datasets)
    curve = rows_of(tmp_path)
    assert curve[0]["loss"] == pytest.approx(start, abs=1e-6)
    assert curve[-1]["loss"] < start - 1e-3
    with pytest.raises(ConfigError, match="set diffusion_steps to a number"):
        validate(MdlmDpoConfig, {"loss_type": ["spg"], "diffusion_steps": "auto"})


def test_cached_references_are_those_computed_beside_the_policy(
    undisturbed: Path, policy: Artifact, datasets: Artifact
) -> None:
    """The reference's score of every pair of every step, anew from the checkpoint with the draws of that epoch."""
    from prefmill.families.causal.dpo import load_groups
    from prefmill.families.mdlm.family import Drawing, encode_responses
    from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of
    from prefmill.families.mdlm.scorer import patch_forward, score_batch

    tokenizer = load_diffusion_tokenizer(str(policy.path))
    model = load_diffusion_model(str(policy.path), precision="fp32")
    patch_forward(model, mask_token_id=mask_token_of(model, tokenizer))
    config = validate(MdlmDpoConfig, KEYS)
    groups = load_groups(
        datasets.file("dpo_clean_train/data.jsonl"), tokenizer, config, make_task("x", undisturbed / "anew")
    )
    logged = {
        (row["pair_id"], row["epoch"]): (row["ref_chosen_logps"], row["ref_rejected_logps"])
        for row in read_jsonl(undisturbed / "logs" / "margins" / "margins_log.jsonl")
    }
    assert len(logged) == 2 * sum(len(group.pairs) for group in groups)
    for epoch in (0, 1):
        for group in groups[::5]:
            values = score_batch(model, encode_responses(group, epoch, Drawing(4, "balanced", 42))).mean(1)
            for pair in group.pairs:
                found = logged[pair.pair_id, epoch]
                assert found == pytest.approx((values[pair.chosen].item(), values[pair.rejected].item()), abs=1e-4)
    assert any(logged[name, 0] != logged[name, 1] for name, _ in logged), "epochs have draws of their own"


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize("draws", [4, "auto"])
def test_killed_and_rerun_it_ends_with_the_same_bytes(
    draws: int | str, tmp_path: Path, undisturbed: Path, policy: Artifact, datasets: Artifact
) -> None:
    """With `auto` too: how many draws are in use is taken up where the checkpoint's log left it."""
    keys, whole = KEYS, undisturbed
    if draws == "auto":
        keys = {**KEYS, "diffusion_steps": "auto", "max_diffusion_steps": 16, "beta": 1.0}
        whole = tmp_path / "whole"
        run_stage("mdlm_dpo", whole, keys, policy=policy, datasets=datasets)
        assert len({row["draws"] for row in rows_of(whole)}) > 1
    folder = tmp_path / "killed"
    kill_after(7, folder, lambda: run_stage("mdlm_dpo", folder, keys, policy=policy, datasets=datasets))
    run_stage("mdlm_dpo", folder, keys, policy=policy, datasets=datasets)
    assert content(folder) == content(whole)
    assert [row["loss"] for row in rows_of(folder)] == [row["loss"] for row in rows_of(whole)]
    assert sorted(set(executed_steps(folder))) == list(range(1, 13))


@pytest.mark.timing
@pytest.mark.slow
def test_scores_of_another_model_are_computed_again(
    tmp_path: Path, undisturbed: Path, policy: Artifact, datasets: Artifact
) -> None:
    from prefmill.store.kept_tensors import KeptTensors

    kill_after(2, tmp_path, lambda: run_stage("mdlm_dpo", tmp_path, KEYS, policy=policy, datasets=datasets))
    for folder in (tmp_path / "out").rglob("cache/reference/*"):
        kept = KeptTensors(folder)
        values = kept.read()
        kept.forget()
        kept.keep({key: value - 0.5 for key, value in values.items()})
    run_stage("mdlm_dpo", tmp_path, KEYS, policy=policy, datasets=datasets)
    assert content(tmp_path) == content(undisturbed)


@pytest.mark.slow
def test_an_adapter_starts_at_ln_2_and_is_merged(tmp_path: Path, policy: Artifact, datasets: Artifact) -> None:
    keys = {**KEYS, "lora": {"r": 4, "alpha": 8.0}, "num_train_epochs": 1, "gradient_checkpointing": True}
    run_stage("mdlm_dpo", tmp_path, keys, policy=policy, datasets=datasets)
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    before, after = load_file(policy.path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    assert any((before[name] != after[name]).any() for name in before)


@pytest.mark.slow
def test_accumulation_does_not_change_the_loss(tmp_path: Path, policy: Artifact, datasets: Artifact) -> None:
    curves = []
    for at_once, steps in ((8, 1), (1, 8)):
        keys = {key: value for key, value in KEYS.items() if key not in ("effective_batch_size", "save_steps")}
        keys |= {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": steps, "num_train_epochs": 1}
        run_stage("mdlm_dpo", tmp_path / str(at_once), keys, policy=policy, datasets=datasets)
        curves.append([row["loss"] for row in rows_of(tmp_path / str(at_once))])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


@pytest.mark.slow
def test_a_preference_file_can_be_named(tmp_path: Path, policy: Artifact, datasets: Artifact) -> None:
    keys = {**KEYS, "num_train_epochs": 1, "preference_data_path": str(datasets.file("dpo_clean_train/data.jsonl"))}
    assert run_stage("mdlm_dpo", tmp_path, keys, policy=policy)["pairs"] == 48
    with pytest.raises(PipelineError, match="two datasets to train on"):
        run_stage("mdlm_dpo", tmp_path / "b", keys, policy=policy, datasets=datasets)


def test_what_it_refuses(tmp_path: Path, datasets: Artifact) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        validate(MdlmDpoConfig, {"diffusion_steps": "auto", "max_diffusion_steps": 12})
    with pytest.raises(PipelineError, match="no model to start from"):
        run_stage("mdlm_dpo", tmp_path, KEYS, datasets=datasets)
    keys = {**KEYS, "model_name_or_path": "someone/model", "trust_remote_code": True}
    with pytest.raises(ConfigError, match="pinned revision"):
        run_stage("mdlm_dpo", tmp_path, keys, datasets=datasets)
