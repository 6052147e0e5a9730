"""What Slurm says of partitions, as sinfo prints it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import ge

from prefmill.slurm.cluster import Resources
from prefmill.slurm.jobs import ask

# A100 and V100 are sold in two sizes: these are the larger ones, and --gpu-memory says otherwise.
_GPU_GB = {"h200": 141, "b200": 180, "h100": 80, "a100": 80, "l40s": 48, "a40": 48, "a6000": 48, "v100": 32, "l4": 24}


@dataclass(frozen=True)
class Partition:
    """What a partition offers: `max_minutes` and `max_nodes` None where there is no limit; the rest is per node."""

    name: str
    nodes: int
    max_minutes: int | None
    max_nodes: int | None
    cpus: int
    memory_gb: float
    gpus: int
    up: bool = True
    gpu_type: str = ""


# -a, as jobs may be submitted to a hidden partition as well.
_SINFO = ("sinfo", "-a", "-h", "-o", "%P|%D|%l|%s|%c|%m|%G|%a")


def partitions() -> dict[str, Partition] | None:
    """Every partition by name; the default one also as "". None when Slurm does not answer."""
    text = ask(_SINFO)
    return None if text is None else _partitions(text)


def fits_when_back(resources: Resources) -> bool:
    """Whether a node that is down or drained now could take a task with these resources."""
    nodes = (ask([*_SINFO, "-N", "-t", "down,drain,fail,maint"]) or "").splitlines()
    kinds = filter(None, (offer_of(resources.partition, _partitions(node)) for node in nodes))
    wanted = (resources.cpus, resources.memory_gb or 0.0, resources.gpus)
    return any(all(map(ge, (kind.cpus, kind.memory_gb, kind.gpus), wanted)) for kind in kinds)


def partition_names(partition: str | None) -> list[str]:
    """The partitions of a job: Slurm starts it in any one of a list such as `a,b`; "" is the default one."""
    return [name for name in (partition or "").split(",") if name] or [""]


def offer_of(partition: str | None, offered: Mapping[str, Partition]) -> Partition | None:
    """What a partition offers, or the best of each of a list; None where none of that name is known."""
    found = [offered[name] for name in partition_names(partition) if name in offered]
    return reduce(_better, found) if found else None


def minutes(text: str) -> int | None:
    """Slurm's [days-]hours:minutes:seconds in minutes; None for infinite."""
    if not text or not text[0].isdigit():
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes = (parts[0], parts[1]) if len(parts) == 3 else (0, parts[0]) if len(parts) == 2 else (parts[0], 0)
    return (int(days or 0) * 24 + hours) * 60 + minutes


def _partitions(text: str) -> dict[str, Partition]:
    """sinfo writes a line for every kind of node in a partition: nodes add up, the rest is the largest kind's."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        shown, nodes, limit, size, cpus, memory, gres, up = line.split("|")
        name = shown.rstrip("*")
        # `gpu:8`, `gpu:h100:8(S:0-1)` or `gpu:a:2,gpu:b:2`
        gpus = sum(map(int, re.findall(r"gpu:(?:[\w.-]+:)?(\d+)", gres)))
        largest = int(size.split("-")[-1]) if size[-1:].isdigit() else None
        kind = Partition(
            name, int(nodes), minutes(limit), largest, _number(cpus), _number(memory) / 1024, gpus, up == "up",
            next(iter(re.findall(r"gpu:([\w.-]+):\d", gres)), ""),
        )  # fmt: skip
        old = found.get(name)
        found[name] = replace(_better(old, kind), nodes=old.nodes + kind.nodes) if old else kind
        if shown.endswith("*"):
            found[""] = found[name]
    return found


def _better(one: Partition, other: Partition) -> Partition:
    """The larger of each number of two partitions, where None is no limit; of two kinds of GPU none is known."""
    longest, widest = (
        None if None in pair else max(pair)  # type: ignore[type-var]
        for pair in ((one.max_minutes, other.max_minutes), (one.max_nodes, other.max_nodes))
    )
    kinds = {each.gpu_type for each in (one, other) if each.gpus}
    return Partition(
        ",".join(dict.fromkeys((one.name, other.name))), max(one.nodes, other.nodes), longest, widest,
        max(one.cpus, other.cpus), max(one.memory_gb, other.memory_gb), max(one.gpus, other.gpus),
        one.up or other.up, kinds.pop() if len(kinds) == 1 else "",
    )  # fmt: skip


def _number(text: str) -> int:
    # sinfo writes 64+ in a line of nodes that differ.
    digits = re.match(r"\d+", text)
    return int(digits.group()) if digits else 0


def gpu_kind(name: str) -> str:
    """`h100` of a site's names for it, such as `nvidia_h100_80gb`; "" where none is known."""
    known = re.search(r"[abhlv]\d+s?", name.lower())
    return known[0] if known else ""


def gpu_memory_gb(name: str) -> float | None:
    """Of a GPU, by a site's name for it: as that says (`a100_40gb`, `3g.40gb` of a divided one), else its kind's."""
    stated = re.search(r"(\d+)gb", name.lower())
    return float(stated[1]) if stated else _GPU_GB.get(gpu_kind(name))
