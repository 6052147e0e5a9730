"""Ranks as forks of the process that tests: a fork has the slow imports done. It must have started no process group."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

_SECONDS = 150.0


def import_before_the_forks(*names: str) -> None:
    """Modules and DeepSpeed, once for all ranks."""
    for name in (*names, "deepspeed"):
        importlib.import_module(name)


def start_ranks(world_size: int, work: Callable[..., object], *given: Any) -> list[Any]:
    """Start `work(*given)` in every rank, with the variables that a launcher sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_rank, args=(rank, world_size, port, work, given)) for rank in range(world_size)]
    for child in children:
        child.start()
    return children


def end_codes(children: list[Any]) -> list[int | None]:
    """How the ranks have ended; None for one that has not in time, which is killed."""
    for child in children:
        child.join(_SECONDS)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def run_ranks(world_size: int, work: Callable[..., object], *given: Any) -> None:
    """Run `work(*given)` in every rank to a good end."""
    assert end_codes(start_ranks(world_size, work, *given)) == [0] * world_size


def forget_ranks() -> None:
    """Be a process that no launcher has started."""
    for name in [*_variables(0, 1, 0)]:
        del os.environ[name]


def _rank(rank: int, world_size: int, port: int, work: Callable[..., object], given: tuple[Any, ...]) -> None:
    os.environ.update(_variables(rank, world_size, port))
    work(*given)


def _variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
