"""What a process may use: the least of the machine, of the control groups it is in or below, and of Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefmill.distributed.limits import ProcessLimits, limit_threads, machine_memory

GB = 1 << 30
DEEP = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"


def made(folder: Path, membership: str, files: dict[str, str]) -> ProcessLimits:
    for name, text in files.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(text + "\n")
    (folder / "membership").write_text(membership + "\n")
    return ProcessLimits(folder / "groups", folder / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/", {}, 64),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        (f"0::/{DEEP}", {f"{DEEP}/cpu.max": "max 100000", "system.slice/cpu.max": "300000 100000"}, 3),
        (f"0::/{DEEP}", {f"{DEEP}/cpu.max": "200000 100000", "system.slice/cpu.max": "300000 100000"}, 2),
        ("2:cpu:/a/b", {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000"}, 5),
        ("0::/../other", {"cpu.max": "700000 100000"}, 7),
        ("0::/not/in/this/container", {"cpu.max": "700000 100000"}, 7),
    ],
)
def test_quotas_of_all_groups_limit_the_threads(
    membership: str, files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`docker --cpus 4` on 64 cores shows all of them, and threads for all wait most of the time."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    limits = made(tmp_path, membership, files)
    assert limits.cpus() == cpus
    for given, threads in ((None, str(cpus) if cpus < 64 else None), ("3", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        limit_threads(limits)
        assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("membership", "files", "environment", "gigabytes"),
    [
        ("0::/", {"memory.max": "max", "memory.high": "max"}, {}, 512),
        ("0::/", {"memory.max": str(8 * GB)}, {}, 8),
        ("0::/", {"memory.max": str(8 * GB), "memory.high": str(6 * GB)}, {}, 6),
        (f"0::/{DEEP}", {f"{DEEP}/memory.max": "max", "system.slice/memory.max": str(32 * GB)}, {}, 32),
        (f"0::/{DEEP}", {f"{DEEP}/memory.max": str(GB), "system.slice/memory.max": str(32 * GB)}, {}, 1),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, {}, 512),
        ("4:memory:/job/step", {"memory/job/memory.limit_in_bytes": str(4 * GB)}, {}, 4),
        ("0::/\n4:memory:/x", {"unified/memory.max": str(3 * GB)}, {}, 3),
        ("0::/", {}, {"SLURM_MEM_PER_NODE": "0"}, 512),
        ("0::/", {}, {"SLURM_MEM_PER_NODE": "16384"}, 16),
        ("0::/", {"memory.max": str(20 * GB)}, {"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "5"}, 10),
    ],
)
def test_memory_is_the_least_of_all_limits(
    membership: str, files: dict[str, str], environment: dict[str, str], gigabytes: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sysconf = os.sysconf
    pages = {"SC_PHYS_PAGES": 512 * GB // 4096, "SC_AVPHYS_PAGES": 500 * GB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", lambda name: pages.get(name) or sysconf(name))
    limits = made(tmp_path, membership, files)
    assert limits.memory(environment) == gigabytes * GB
    assert limits.free_memory(environment) <= gigabytes * GB


def test_what_is_free_leaves_out_the_files_that_make_room(tmp_path: Path) -> None:
    held = {
        "memory.max": str(1 << 20),
        "memory.current": str(700 << 10),
        "memory.stat": f"anon 1\ninactive_file {500 << 10}",
    }
    assert made(tmp_path, "0::/", held).free_memory({}) == (1024 - 700 + 500) << 10


@pytest.fixture
def group() -> Iterator[Path]:
    """A real control group of the kernel, below this process's own, that may hold 300 MB."""
    own = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), "0::/")
    top = Path("/sys/fs/cgroup", *(["memory"] if ":memory:" in own else []))
    folder = top / own.split(":", 2)[2].lstrip("/") / f"prefmill-{uuid.uuid4().hex[:8]}"
    limit = "memory.limit_in_bytes" if ":memory:" in own else "memory.max"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(300 << 20))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error.strerror}")
    yield folder
    folder.rmdir()


def test_the_kernels_own_limit_is_found(group: Path) -> None:
    code = (
        f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from prefmill.distributed.limits import ProcessLimits\n"
        "held = bytearray(100 << 20); print(ProcessLimits().memory({}), ProcessLimits().free_memory({}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit, free = map(int, done.stdout.split())
    assert limit == 300 << 20 < machine_memory()
    assert 100 << 20 < free < 200 << 20
