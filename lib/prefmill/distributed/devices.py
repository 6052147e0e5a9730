"""Which devices are this process's, and how many ranks train together: the only place that asks.

`visible_gpus`, `rank` and `world_size` neither import torch nor initialise CUDA, so that a command or the parent of
forked tasks may ask.
"""

from __future__ import annotations

import os
import sys
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefmill.core.errors import ConfigError
from prefmill.core.places import STAGES

if TYPE_CHECKING:
    import torch


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        # Device files are counted: asking CUDA would start it here, and no fork could use it any more.
        return [str(index) for index in range(sum(map(_may_open, Path("/dev").glob("nvidia[0-9]*"))))]
    names = [name.strip() for name in visible.split(",")]
    kind = names[0][:4] if names[0].startswith(("GPU-", "MIG-")) else ""
    # CUDA reads on to the first that is none (-1, Slurm's NoDevFiles), and takes nothing where one stands there twice.
    found = list(takewhile(lambda name: name.startswith(kind) if kind else name.isdecimal(), names))
    return found if len(set(found)) == len(found) else []


def _may_open(device: Path) -> bool:
    """Whether this process may use it: a job's control group hides no file, it forbids to open those of others."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True


def machine_has_gpu() -> bool:
    """Whether a GPU of NVIDIA or AMD is here, whoever may use it; CUDA is not asked, or no fork could use it after."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def is_launched() -> bool:
    """Whether a launcher has started this process as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's place among all ranks: in its process group if there is one, else as the launcher says; or 0."""
    group: Any = sys.modules.get("torch.distributed")  # not imported to ask
    if group is not None and group.is_available() and group.is_initialized():
        return int(group.get_rank())
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's place among the ranks of its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Ranks that train together, as the launcher says; known before any process group is there."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_gpu() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def device_type() -> Literal["cuda", "cpu"]:
    """Where this process puts its models."""
    return "cuda" if has_gpu() else "cpu"


def device_kind(device: torch.device) -> str:
    """What rounds alike: `cpu`, or a GPU's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def claim_device() -> None:
    """Make this rank's GPU the current one: 4-bit weights are loaded onto whichever is current.

    Raises ConfigError for a process that sees several GPUs and is no rank: transformers would wrap its model in
    torch.nn.DataParallel, which cuts packed rows apart and says nothing. And for a rank beyond the GPUs.
    """
    import torch

    if not has_gpu():
        return
    if is_launched():
        count = torch.cuda.device_count()
        if 1 < count <= local_rank():
            raise ConfigError(
                "more ranks than GPUs on this node", got=f"local rank {local_rank()}, {count} GPUs",
                expected="one GPU per rank", fix=f"start {count} ranks, or make more GPUs visible",
            )  # fmt: skip
        # A launcher may show each rank its own GPU alone, which is then number 0.
        torch.cuda.set_device(local_rank() if count > 1 else 0)
    elif (count := torch.cuda.device_count()) > 1:
        raise ConfigError(
            "a training process without ranks sees more than one GPU", got=f"{count} GPUs, one process",
            expected="one process per GPU",
            fix=f"start `torchrun --nproc-per-node {count} -m {STAGES}.STAGE ...`, or set CUDA_VISIBLE_DEVICES=0",
        )  # fmt: skip
