"""Commands that srun, mpirun, accelerate or DeepSpeed's launcher start: settings beside the keys are refused."""

from __future__ import annotations

import argparse
import dataclasses
import socket
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from prefmill.cli.stage import as_keys
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.stage import Task
from prefmill.distributed.launchers import is_one_of_ranks, leave_ranks, refuse_copies, refuse_settings_of_accelerate
from prefmill.pipeline import launched
from prefmill.pipeline.worker import import_and_run
from stages.dpo import STAGE
from tests.conftest import REPOSITORY

RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


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


def test_several_processes_that_accelerate_does_not_start_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs it starts all by mpirun or one by itself, which would train alone without a word."""
    told = environment_of(monkeypatch)
    with pytest.raises(ConfigError, match="starts one"):
        refuse_copies(told)
    refuse_copies(environment_of(monkeypatch, "--num_processes", "1"))


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


@pytest.mark.parametrize(
    "told", [RANKS, {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "a"}, {**RANKS, **PLACE, "RANK": "2"}]
)
def test_a_rank_that_is_told_half_is_refused(told: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="`unset RANK WORLD_SIZE LOCAL_RANK`"):
        is_one_of_ranks(told)


def test_what_is_done_once_is_refused_to_ranks_and_forgets_a_rank_alone() -> None:
    assert is_one_of_ranks({**RANKS, **PLACE})
    with pytest.raises(ConfigError, match="RANK=1, WORLD_SIZE=2"):
        leave_ranks({**RANKS, **PLACE})
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "gone", "HOME": "/"}
    leave_ranks(alone)
    assert alone == {"HOME": "/"}


@pytest.mark.parametrize(("mine", "other"), [("0", "1"), ("1", "0")])
def test_a_rank_without_partner_says_at_once_whom_it_waits_for(
    mine: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with variables left in a shell: it waited for an hour without a word, and rank 0 before its first gather."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {**RANKS, **PLACE, "RANK": mine, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(launched, "_ARRIVAL_MINUTES", 0.01)
    with pytest.raises(PipelineError, match=f"none of rank {other}\n.*2 ranks\n.*unset RANK"):
        launched._meet()
    assert (
        f"RANK={mine}, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: waits"
        in capsys.readouterr().err
    )


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {**RANKS, **PLACE, "RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PipelineError, match="EADDRINUSE"):
            launched._meet()
