"""What starts a command besides prefmill: copies that are no ranks, and settings of accelerate's beside the keys."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Protocol, runtime_checkable

from prefmill.core.errors import ConfigError
from prefmill.core.places import STAGES
from prefmill.distributed.devices import is_launched

# What torch and accelerate take for a rank's; the first five make it one.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE",
                  "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip
_COPIES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
# The variables by which `accelerate launch` hands on its file and options, with the keys that say the same here.
_OF_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "torch_compile"),
    "ACCELERATE_USE_FSDP": ("fsdp", "fsdp"),
    "ACCELERATE_USE_DEEPSPEED": ("deepspeed", "deepspeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("megatron_lm", None),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", None),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "effective_batch_size"),
}
FORGET = f"`unset {' '.join(RANK_VARIABLES[:3])}`"
_NOTHING = ("", "no", "false", "0", "1")


@runtime_checkable
class TrainerKeys(Protocol):
    """The keys of a stage that uses transformers' Trainer which accelerate can contradict and agree with."""

    @property
    def precision(self) -> str: ...
    @property
    def torch_compile(self) -> bool: ...


def is_one_of_ranks(environment: Mapping[str, str]) -> bool:
    """Whether a process is told to be one rank of several; raises ConfigError where it is told a part of that."""
    numbers = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if all(value in ("", "1" if name == "WORLD_SIZE" else "0") for name, value in numbers.items()):
        return False
    needed = RANK_VARIABLES[:5]
    whole = all(environment.get(name) for name in needed) and all(value.isdecimal() for value in numbers.values())
    if whole and int(numbers["RANK"]) < int(numbers["WORLD_SIZE"]):
        return True
    raise ConfigError(
        "this process is told to be a rank, but not which of how many, and where",
        got=", ".join(f"{name}={environment.get(name, '')}" for name in needed), expected="a value for each",
        fix=f"start it by torchrun, which sets them; where no launcher did, {FORGET}",
    )  # fmt: skip


def leave_ranks(environment: MutableMapping[str, str]) -> None:
    """Take out what makes a process a rank; raises ConfigError where it is one of several."""
    if is_one_of_ranks(environment):
        raise ConfigError(
            "one rank of several is to do what is done once", got=told_rank(environment),
            expected="one copy of this command, which starts a rank for every GPU itself",
            fix=f"start it without torchrun; where no launcher set these variables, {FORGET}",
        )  # fmt: skip
    for name in RANK_VARIABLES:
        environment.pop(name, None)


def told_rank(environment: Mapping[str, str]) -> str:
    """The variables by which a process is told its rank, for people."""
    return ", ".join(f"{name}={environment[name]}" for name in RANK_VARIABLES[:5])


def refuse_copies(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where a launcher was to start several ranks, and no copy of this command is told its rank."""
    for name, launcher in _COPIES.items():
        if not is_launched() and (copies := environment.get(name, "1")) != "1":
            raise ConfigError(
                "several copies of one command, none of them a rank", got=f"{name}={copies}",
                expected="one copy, which starts a rank for every GPU itself, or ranks by torchrun",
                fix=f"start it once per node: `{launcher} {'--ntasks=1' if launcher == 'srun' else '-n 1'} ...`; "
                f"on several nodes let `prefmill submit` or `sbatch sbatch/STAGE.sbatch` start them",
            )  # fmt: skip
    if not is_launched() and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys():
        raise ConfigError(
            "accelerate is to start several processes, and starts one", got="neither multi_gpu nor mpirun",
            fix=f"start `torchrun --nproc-per-node N -m {STAGES}.STAGE ...`, or `accelerate launch --num_processes 1` "
            "with no MASTER_ADDR in the environment",
        )  # fmt: skip


def refuse_settings_of_accelerate(config: TrainerKeys, environment: Mapping[str, str]) -> None:
    """Raise ConfigError for what `accelerate launch` asks for and `config` does not: transformers would obey both.

    `precision` and `torch_compile` may say the same as accelerate's file. How a model is sharded is for the keys alone.
    """
    given = {name: value for name in _OF_ACCELERATE if (value := environment.get(name, "")).lower() not in _NOTHING}
    if given.get("ACCELERATE_MIXED_PRECISION") == config.precision:
        del given["ACCELERATE_MIXED_PRECISION"]
    if config.torch_compile and given.get("ACCELERATE_DYNAMO_BACKEND", "").lower() == "inductor":
        del given["ACCELERATE_DYNAMO_BACKEND"]
    if given:
        keys = ", ".join(key for name in given if (key := _OF_ACCELERATE[name][1]))
        raise ConfigError(
            "accelerate's file or options set what the configuration's keys decide", where=", ".join(given),
            got=", ".join(f"{_OF_ACCELERATE[name][0]}: {value}" for name, value in given.items()),
            expected="a launcher that starts ranks and sets nothing else",
            fix=f"start `torchrun --nproc-per-node N -m {STAGES}.STAGE ...`, or accelerate without these settings"
            + (f"; the keys for them are {keys}" if keys else ""),
        )  # fmt: skip
