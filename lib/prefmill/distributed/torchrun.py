"""torchrun on one node, alone or as one of a job's nodes, whose rendezvous is then taken from Slurm.

python -m prefmill.distributed.torchrun NODES PROCESSES -m MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping

from prefmill.distributed.isolation import end_with_parent

_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below the ports that systems hand out by themselves
_TRIES = 100


def arguments(environment: Mapping[str, str], nodes: int, processes: int) -> list[str]:
    """torchrun's options for this node, one of `nodes` that train together: a job may have more."""
    if nodes > 1:  # they agree by the job alone
        host, place = first_host(environment["SLURM_JOB_NODELIST"]), environment["SLURM_NODEID"]
        port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _NUM_PORTS
    else:
        host, place, port = "127.0.0.1", "0", free_port()
    return [
        f"--nnodes={nodes}", f"--node-rank={place}", f"--nproc-per-node={processes}",
        f"--master-addr={host}", f"--master-port={port}", "--max-restarts=0",
        "--signals-to-handle=SIGQUIT",  # the others are the parent's business: it has the ranks save
    ]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on: several trainings may run on a node, and in containers have one process id."""
    for _ in range(_TRIES):
        port = _FIRST_PORT + secrets.randbelow(_NUM_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            break
    return port


def first_host(nodes: str) -> str:
    """The first name in Slurm's list of nodes, such as `gpu[07-09,12],login1`."""
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


if __name__ == "__main__":
    from torch.distributed.run import main

    end_with_parent()  # its ranks end with it
    main([*arguments(os.environ, *map(int, sys.argv[1:3])), *sys.argv[3:]])
