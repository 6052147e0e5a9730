"""What a training's ranks hold in a node's own memory, against what they are given there: by a job, or by this machine.

Left out is what is small beside models: rows, a dataloader's processes, which share their parent's memory, and caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefmill.distributed.limits import ProcessLimits
from prefmill.slurm.cluster import Resources
from prefmill.slurm.jobs import gigabytes
from prefmill.slurm.memory import FRAGMENTS, GIGABYTE, GpuMemory
from prefmill.slurm.partitions import Partition, offer_of

_PROCESS_GB = 0.6  # Python with torch, transformers and TRL: 0.4 to 0.6 were measured
_CUDA_PROCESS_GB = 2.5  # an allowance: CUDA's libraries and context too


@dataclass(frozen=True)
class HostMemory:
    """GB that each of a node's `ranks` holds at its fullest, part by part."""

    ranks: int
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Of all ranks, and what allocators lose between."""
        return self.ranks * sum(self.parts.values()) * (1 + FRAGMENTS)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.parts.items() if value >= 0.05)
        return f"{self.total:.1f} GB of a node's memory: {self.ranks} x ({parts})"


@dataclass(frozen=True)
class Given:
    """GB that a training may hold on a node, and who says so."""

    gb: float
    by: str


def host_need(memory: GpuMemory, held: float, ranks: int, on_gpus: bool) -> HostMemory:
    """What `ranks` hold on a node, of which each holds `held` there for its GPU: on CPUs all that a GPU would."""
    if on_gpus:
        return HostMemory(ranks, {"process": _CUDA_PROCESS_GB, "weights while loading, or offloaded": held})
    return HostMemory(ranks, {"process": _PROCESS_GB, **{k: v for k, v in vars(memory).items() if k != "runtime"}})


def given_here() -> Given:
    """What this process may hold; swap is not counted, as a training that swaps takes many times as long."""
    return Given(ProcessLimits().memory() / GIGABYTE, "this machine, its control groups and job allow")


def given_by_job(resources: Resources, offered: Mapping[str, Partition]) -> Given | None:
    """What a job asks for, else what the largest node has; None where neither is known."""
    options = resources.options
    counts = {"mem": 1, "mem-per-cpu": resources.cpus, "mem-per-gpu": resources.gpus}
    asked = [_gigabytes(str(options[name])) * count for name, count in counts.items() if name in options]
    if gb := resources.memory_gb or sum(asked):
        return Given(gb, "its job asks for")
    partition = offer_of(resources.partition, offered)
    return Given(partition.memory_gb, f"nodes of {partition.name} have") if partition else None


def _gigabytes(text: str) -> float:
    """Of a size as sbatch takes it: in MB where it has no unit; 0 asks for all of a node."""
    return gigabytes(text if text[-1:].isalpha() else f"{text}M") or 0.0
