"""torchrun on one node of a job, its rendezvous taken from Slurm: the same for one node and for many.

python -m prefmill.distributed.torchrun PROCESSES -m MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from prefmill.distributed.isolation import end_with_parent

_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below the ports that systems hand out by themselves


def arguments(environment: Mapping[str, str], processes: int) -> list[str]:
    """torchrun's options for this node; outside Slurm it is the only one."""
    nodes = int(environment.get("SLURM_NNODES", "1"))
    port = _FIRST_PORT + int(environment.get("SLURM_JOB_ID", str(os.getpid()))) % _NUM_PORTS
    host = first_host(environment["SLURM_JOB_NODELIST"]) if nodes > 1 else "127.0.0.1"
    return [
        f"--nnodes={nodes}", f"--node-rank={environment.get('SLURM_NODEID', '0')}", f"--nproc-per-node={processes}",
        f"--master-addr={host}", f"--master-port={port}", "--max-restarts=0",
        "--signals-to-handle=SIGINT,SIGHUP",  # SIGTERM is the parent's business: it has the ranks save
    ]  # fmt: skip


def first_host(nodes: str) -> str:
    """The first name in Slurm's list of nodes, such as `gpu[07-09,12],login1`."""
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


if __name__ == "__main__":
    from torch.distributed.run import main

    end_with_parent()  # its ranks end with it
    main([*arguments(os.environ, int(sys.argv[1])), *sys.argv[2:]])
