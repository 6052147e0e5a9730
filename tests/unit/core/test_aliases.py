"""Keys under the names of other tools: accepted with a note, or answered with the right one; errors say where from."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.core import config as core_config
from prefmill.core.aliases import ALIASES, REFUSED
from prefmill.core.config import load, validate
from prefmill.core.errors import ConfigError
from prefmill.core.stage import load_stage, stage_names
from prefmill.pipeline.manual_submission import stage_plan
from prefmill.pipeline.overrides import joined
from prefmill.pipeline.plan import make_plan, read_pipeline
from stages.dpo import DpoConfig

# The minimal DPO loop's file, as its users have it.
MINIMAL = {
    "policy_name": "some/model", "precision": "bf16",
    "dataset": {"dataset_name": "some/pairs", "max_len": 512, "subset": 200},
    "dpo_training": {"batch_size": 2, "epochs": 3, "log_steps": 5, "fsdp": False, "learning_rate": 1e-6},
}  # fmt: skip


def test_the_minimal_loops_file_is_accepted_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    core_config._tell.cache_clear()
    config = validate(DpoConfig, MINIMAL)
    assert (config.model_name_or_path, config.dataset, config.max_length) == ("some/model", "some/pairs", 512)
    assert (config.per_device_train_batch_size, config.num_train_epochs, config.logging_steps) == (2, 3, 5)
    assert "note: policy_name is read as model_name_or_path" in capsys.readouterr().err


def test_a_key_under_two_names_is_refused() -> None:
    for twice in ({"batch_size": 1, "per_device_train_batch_size": 1}, {"epochs": 1, "num_epochs": 1}):
        with pytest.raises(ConfigError, match="one key under two names"):
            validate(DpoConfig, twice)


def test_every_alias_leads_to_a_key_of_some_stage_and_no_refused_key_hides_one() -> None:
    fields = {name: set(load_stage(name).config.model_fields) for name in stage_names()}
    everywhere = set.union(*fields.values()) | {"workspace"}
    assert set(ALIASES.values()) <= everywhere
    assert {key for key in REFUSED if key in fields["sft"]} == set()


@pytest.mark.parametrize(
    "key", ["gradient_accumulation_steps", "bf16", "lora_r", "mount_dir", "max_steps", "eval_steps", "dtype"]
)
def test_a_refused_key_is_answered_with_the_right_one(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(DpoConfig, {key: 1})
    assert REFUSED[key] in str(caught.value)


def test_a_list_of_valid_keys_stands_once() -> None:
    """axolotl's file gave the list of all keys a hundred times, and the lines between with what to write were lost."""
    axolotl = {
        "base_model": "some/model", "rl": "dpo", "adapter": "lora", "sequence_len": 2048, "micro_batch_size": 2,
        "flash_attention": True, "wandb_project": "x", "lora": {"zzz": 1, "yyy": 2},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load(DpoConfig, axolotl)
    text = str(caught.value)
    # One of the stage's keys, one of those of `lora`.
    assert text.count("valid keys: ") == 2
    assert text.count("unknown key") == 6
    assert "adapter: unknown key (write lora: {r: 16, alpha: 32})" in text
    assert all(key not in text for key in ("base_model", "sequence_len", "micro_batch_size"))


def test_blanks_around_the_sign_are_taken_out() -> None:
    assert joined(["a.b", "=", "0.2", "c=1", "d=", "2", "e", "=3", "f=[x=y]"]) == [
        "a.b=0.2",
        "c=1",
        "d=2",
        "e=3",
        "f=[x=y]",
    ]


def test_an_error_says_where_the_key_was_given_and_lists_no_fifty_on_a_line(tmp_path: Path) -> None:
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "own.yaml").write_text("learning_rat: 1.0e-6\n")
    path = tmp_path / "pipelines" / "p.yaml"
    path.parent.mkdir()
    path.write_text("name: toy\nstages: {dpo: {config: own, set: {bta: 1}, inputs: {datasets: d, policy: m}}}\n")

    def error(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            make_plan(read_pipeline(path, overrides), path)
        return str(caught.value)

    text = error("dpo.wombat=1")
    assert f"learning_rat: unknown key (did you mean 'learning_rate'?), in {tmp_path / 'dpo' / 'own.yaml'}" in text
    assert f"bta: unknown key (did you mean 'beta'?), in {path}" in text
    assert "given on the command line" in text
    assert max(map(len, text.splitlines())) < 180
    assert "did you mean 'dpo.beta'" in error("dpoo.beta=0.2")
    with pytest.raises(ConfigError, match=r"wombat: unknown key[\s\S]*given on the command line"):
        stage_plan("dpo", ["wombat=1", "inputs.datasets=d", "inputs.policy=m"])
