"""dpo: what it writes, resuming after SIGKILL, the control with shuffled labels, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_artifacts import content, executed_steps, kill_after, make_checkpoint, make_datasets, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import identity, validate
from prefmill.core.errors import ConfigError, InputError, PipelineError
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.dpo import STAGE, DpoConfig, run
from tests.tiny import pair_rows

SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 1,
    "effective_batch_size": 4, "max_length": 64, "logging_steps": 1, "save_steps": 3, "report_to": [],
}  # fmt: skip
LAYOUTS = ("pairwise", "group")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_checkpoint(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_datasets(tmp_path_factory.mktemp("datasets"))


def dpo(folder: Path, policy: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(DpoConfig, {**SETTINGS, **keys})
    return run(config, make_task("dpo", folder, policy=policy, datasets=datasets))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, policy: Artifact, datasets: Artifact) -> dict[str, Path]:
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    for layout, folder in folders.items():
        dpo(folder, policy, datasets, layout=layout)
    return folders


def test_defaults_are_those_of_the_field() -> None:
    config = DpoConfig()
    assert (config.learning_rate, config.num_train_epochs, config.beta) == (5e-6, 2, 0.1)
    assert (config.loss_type, config.precision, config.effective_batch_size) == (["sigmoid"], "bf16", 16)
    assert STAGE.reads["policy"].stage == "sft"


def test_it_starts_at_ln_2_and_learns(undisturbed: dict[str, Path]) -> None:
    for folder in undisturbed.values():
        assert losses(folder)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert losses(folder)[-1] < 0.8 * math.log(2)
    assert losses(undisturbed["group"]) == pytest.approx(losses(undisturbed["pairwise"]), abs=1e-5)


def test_the_reference_is_the_checkpoint_it_was_given(undisturbed: dict[str, Path], policy: Artifact) -> None:
    """The reference's log-likelihoods do not move with the policy."""
    rows = list(read_jsonl(undisturbed["group"] / "logs" / "margins" / "margins_log.jsonl"))
    name = next(key for key in rows[0] if key.startswith("ref") and "chosen" in key)
    for pair in {row["pair_id"] for row in rows}:
        assert len({row[name] for row in rows if row["pair_id"] == pair}) == 1
    assert content(undisturbed["group"])["model.safetensors"] != (policy.path / "model.safetensors").read_bytes()


def test_the_model_card_names_policy_and_datasets(
    undisturbed: dict[str, Path], policy: Artifact, datasets: Artifact
) -> None:
    card = content(undisturbed["group"])["README.md"].decode()
    assert policy.manifest.content_digest in card
    assert datasets.manifest.content_digest in card


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_and_rerun_it_ends_with_the_same_bytes(
    layout: str, tmp_path: Path, undisturbed: dict[str, Path], policy: Artifact, datasets: Artifact
) -> None:
    kill_after(7, tmp_path, lambda: dpo(tmp_path, policy, datasets, layout=layout))
    assert 7 <= len(executed_steps(tmp_path)) < 10
    dpo(tmp_path, policy, datasets, layout=layout)
    assert content(tmp_path) == content(undisturbed[layout])
    assert losses(tmp_path) == losses(undisturbed[layout])
    steps = executed_steps(tmp_path)
    assert sorted(set(steps)) == list(range(1, 11))
    assert len(steps) - len(set(steps)) <= SETTINGS["save_steps"]


@pytest.mark.timing
@pytest.mark.slow
def test_a_lost_reference_cache_is_made_from_the_checkpoint_not_the_policy(
    tmp_path: Path, undisturbed: dict[str, Path], policy: Artifact, datasets: Artifact
) -> None:
    kill_after(7, tmp_path, lambda: dpo(tmp_path, policy, datasets, layout="pairwise"))
    shutil.rmtree(tmp_path / "out" / "work" / "cache" / "reference")
    dpo(tmp_path, policy, datasets, layout="pairwise")
    assert content(tmp_path) == content(undisturbed["pairwise"])


@pytest.mark.timing
@pytest.mark.slow
def test_a_checkpoint_torn_by_the_kill_is_passed_over(
    tmp_path: Path, undisturbed: dict[str, Path], policy: Artifact, datasets: Artifact
) -> None:
    kill_after(8, tmp_path, lambda: dpo(tmp_path, policy, datasets, layout="pairwise"))
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").unlink()
    dpo(tmp_path, policy, datasets, layout="pairwise")
    assert content(tmp_path) == content(undisturbed["pairwise"])
    assert executed_steps(tmp_path).count(4) == 2, "it went on from step 3"


def test_shuffled_labels_are_part_of_the_identity_and_train_otherwise(
    tmp_path: Path, undisturbed: dict[str, Path], policy: Artifact, datasets: Artifact
) -> None:
    assert identity(DpoConfig(shuffle_labels=True)) != identity(DpoConfig())
    dpo(tmp_path, policy, datasets, shuffle_labels=True)
    shuffled, plain = (
        load_file(folder / "out" / "model.safetensors") for folder in (tmp_path, undisturbed["pairwise"])
    )
    assert any((shuffled[name] != plain[name]).any() for name in plain)


@pytest.mark.slow
def test_validation_pairs_are_never_shuffled(tmp_path: Path, policy: Artifact) -> None:
    """Where validation repeats the training pairs, learning shuffled labels does not raise its accuracy to 1."""
    rows = pair_rows(10, pairs=2)
    datasets = make_datasets(tmp_path / "data", dpo_clean_train=rows, dpo_clean_val=rows)
    accuracies = {}
    for shuffle in (False, True):
        folder = tmp_path / str(shuffle)
        dpo(folder, policy, datasets, shuffle_labels=shuffle, num_train_epochs=4)
        curve = read_curve(folder / "logs" / STEPS)
        accuracies[shuffle] = [row["eval_accuracy"] for row in curve if "eval_accuracy" in row][-1]
    assert accuracies[False] == 1.0
    assert 0.2 < accuracies[True] < 0.8


def test_overlong_pairs_are_refused_or_left_out_and_named(tmp_path: Path, policy: Artifact) -> None:
    """One long response costs the pairs it is in, not the other pairs of its prompt."""
    rows = pair_rows(4, pairs=2)
    rows[1]["rejected"] = {"from": "gpt", "value": " ".join(["paper"] * 200)}
    datasets = make_datasets(tmp_path / "data", dpo_clean_train=rows)
    with pytest.raises(ConfigError, match=r"1 of 8 rows are longer than max_length(.|\n)*nothing is ever truncated"):
        dpo(tmp_path / "a", policy, datasets)
    dpo(tmp_path / "b", policy, datasets, on_overlong="drop")
    (reported,) = json.loads((tmp_path / "b" / "logs" / "overlong_rows.json").read_text())
    assert (reported["file"], reported["id"]) == ("dpo_clean_train", rows[1]["id"])
    trained = {row["pair_id"] for row in read_jsonl(tmp_path / "b" / "logs" / "margins" / "margins_log.jsonl")}
    assert trained == {row["id"] for row in rows} - {rows[1]["id"]}


def test_what_it_refuses(tmp_path: Path, policy: Artifact, datasets: Artifact) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        dpo(tmp_path, policy, datasets, per_device_train_batch_size=3)
    with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):
        dpo(tmp_path, policy, datasets, loss_type=["sigmod"])
    with pytest.raises(PipelineError, match="no model to start from"):
        run(validate(DpoConfig, SETTINGS), make_task("dpo", tmp_path, datasets=datasets))
    broken = pair_rows(2)
    del broken[1]["rejected"]
    with pytest.raises(InputError, match=r"data\.jsonl:2"):
        dpo(tmp_path / "b", policy, make_datasets(tmp_path / "data", dpo_clean_train=broken))
