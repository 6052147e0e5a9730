"""Commands that srun, mpirun, accelerate or DeepSpeed's launcher start: settings beside the keys are refused."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from prefmill.cli.stage import as_keys
from prefmill.core.errors import ConfigError
from prefmill.core.stage import Task
from prefmill.distributed.launchers import refuse_copies, refuse_settings_of_accelerate
from prefmill.pipeline.worker import import_and_run
from stages.dpo import STAGE
from tests.conftest import REPOSITORY

RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_copies_are_refused_unless_they_are_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"{name}=2"):
        refuse_copies({name: "2"})
    refuse_copies({name: "1", "SLURM_NTASKS": "8"})  # a job script of eight tasks is one process
    for variable, value in RANKS.items():
        monkeypatch.setenv(variable, value)
    refuse_copies({name: "2"})


def environment_of(monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, str]:
    """The variables that accelerate itself sets for these options."""
    monkeypatch.setattr("os.environ", {"HOME": "/nowhere"})  # and no file of the user's own
    cpu = () if "--use_fsdp" in options else ("--cpu",)  # accelerate takes one of them
    words = [*cpu, "--num_processes", "2", "--num_machines", "1", *options, "stages/dpo.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    if arguments.use_fsdp:
        return dict(prepare_multi_gpu_env(arguments))
    return dict(prepare_simple_launcher_cmd_env(arguments)[1])


@pytest.mark.parametrize(
    ("options", "keys", "named"),
    [
        ((), {}, None),
        (("--mixed_precision", "bf16"), {"precision": "bf16"}, None),
        (("--mixed_precision", "bf16"), {"precision": "fp32"}, "precision"),
        (("--dynamo_backend", "inductor"), {"torch_compile": True}, None),
        (("--dynamo_backend", "inductor"), {}, "torch_compile"),
        (("--dynamo_backend", "eager"), {"torch_compile": True}, "torch_compile"),
        (("--use_fsdp",), {}, "fsdp"),
    ],
)
def test_settings_of_accelerate_must_say_what_the_keys_say(
    options: tuple[str, ...], keys: dict[str, object], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = STAGE.config(**keys)
    environment = environment_of(monkeypatch, *options)
    if named is None:
        refuse_settings_of_accelerate(config, environment)
        return
    with pytest.raises(ConfigError, match=f"the keys for them are {named}$"):
        refuse_settings_of_accelerate(config, environment)


def test_a_training_begins_with_this_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as its file with deepspeed_config sets it
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    begun: list[str] = []
    stage = dataclasses.replace(STAGE, preload=(), run=lambda _config, _task: begun.append("run") or {})
    task = Task("r", "dpo", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    with pytest.raises(ConfigError, match="keys for them are deepspeed, effective_batch_size"):
        import_and_run(stage, STAGE.config(), task)
    assert begun == []


def test_the_rank_that_deepspeeds_launcher_appends_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--local_rank=1", str(REPOSITORY / "configs/dpo/demo.yaml"), "beta=0.2"]
    assert as_keys(words, argparse.ArgumentParser())[0] == "local_rank=1"  # told by hand it is an unknown key
    for variable, value in RANKS.items():
        monkeypatch.setenv(variable, value)
    assert as_keys(words, argparse.ArgumentParser()) == words[1:]
