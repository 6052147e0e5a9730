"""CPUs and memory this process may use: the least of what the machine has, its control groups allow and Slurm gave."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

_MEMORY = (  # of control groups of version 2, and of version 1: limits, use, and the files in it that make room
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class ProcessLimits:
    """Asks the files that the kernel keeps below `groups`, and `membership` for this process's own place there."""

    groups: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def cpus(self) -> int:
        """CPUs that this process may keep busy: those it may run on, and no more than a quota pays for."""
        quotas = [_cpu_quota(folder) for folder in self._own("cpu")]
        return max(1, min([len(os.sched_getaffinity(0)), *quotas]))

    def memory(self, environment: Mapping[str, str] = os.environ) -> int:
        """Bytes that this process and its children may hold."""
        limits = [limit for folder in self._own("memory") for limit, _ in _memory_limits(folder)]
        return min([machine_memory(), *_slurm_memory(environment), *limits])

    def free_memory(self, environment: Mapping[str, str] = os.environ) -> int:
        """Bytes that are not held yet, by this process or by others that share its limits."""
        # Linux leaves its file cache out of this number, so it is on the safe side.
        free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        free += [given - _resident() for given in _slurm_memory(environment)]
        free += [limit - used for folder in self._own("memory") for limit, used in _memory_limits(folder)]
        return max(0, min(free))

    def _own(self, controller: str) -> Iterator[Path]:
        """The folders of this process's group and of all above it: each of them limits."""
        places = {self.groups: "", self.groups / "unified": "", self.groups / controller: ""}
        for line in self.membership.read_text().splitlines() if self.membership.is_file() else ():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                places |= {self.groups: path, self.groups / "unified": path}
            elif controller in controllers.split(","):  # mounted together with others, each name is a link there
                places[self.groups / controller] = path
        for top, path in places.items():
            # A container sees its own groups as the top, whatever the path says.
            place = PurePath("" if ".." in path else path.lstrip("/"))
            yield from (folder for part in (place, *place.parents) if (folder := top / part).is_dir())


def machine_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit_threads(limits: ProcessLimits = ProcessLimits()) -> None:
    """Have torch in processes that start after this use the threads that a quota of CPU time pays for.

    With one for every core of the machine most would wait for the group's turn, and the others for them.
    """
    if (cpus := limits.cpus()) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))


def _cpu_quota(folder: Path) -> int:
    files = [folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    # One file of two words in version 2, two files in version 1; none, `max` and -1 are no quota.
    words = " ".join(path.read_text() for path in files if path.is_file()).split()
    return -(-int(words[0]) // int(words[1])) if len(words) == 2 and words[0].isdigit() else sys.maxsize


def _memory_limits(folder: Path) -> Iterator[tuple[int, int]]:
    """The limits of a group, each with what is held; what is no number (`max`) is no limit."""
    for names, use, files in _MEMORY:
        texts = [path.read_text().strip() for name in names if (path := folder / name).is_file()]
        for limit in (int(text) for text in texts if text.isdigit()):
            stat = (folder / "memory.stat").read_text() if (folder / "memory.stat").is_file() else ""
            reclaimable = next((int(line.split()[1]) for line in stat.splitlines() if line.split()[:1] == [files]), 0)
            yield limit, int((folder / use).read_text()) - reclaimable if (folder / use).is_file() else 0


def _slurm_memory(environment: Mapping[str, str]) -> list[int]:
    """What the job may hold on this node: Slurm ends it above that, with control groups or without."""
    node, cpu = (int(environment.get(f"SLURM_MEM_PER_{name}", "0")) for name in ("NODE", "CPU"))
    megabytes = node or cpu * int(environment.get("SLURM_CPUS_ON_NODE", "1"))
    return [megabytes << 20] if megabytes else []  # 0 is all of the node's


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
