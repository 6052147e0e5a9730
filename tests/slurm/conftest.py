"""A real Slurm for the tests in this folder, and a checkout of toy stages to submit to it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, left_out
from tests.slurm import releases
from tests.slurm.cluster import Cluster, missing_commands

HELD_SECONDS = 60  # Slurm holds back a requeued job for less: its node would drop it


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of four nodes; SLURM_CONF points at it as long as it is up. PREFMILL_TEST_SLURM names a release."""
    missing = missing_commands()
    if missing:
        left_out("slurm", ", ".join(missing))
    programs = releases.programs(os.environ.get("PREFMILL_TEST_SLURM", ""))
    started = Cluster(tmp_path_factory.mktemp("slurm"), port=free_ports(), programs=programs)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        try:
            started.up()
            yield started
        finally:
            started.down()


@dataclass(frozen=True)
class Site:
    """A checkout on a login node: `prefmill` runs in it as a user would run it."""

    cluster: Cluster
    checkout: Path
    workspace: Path

    def prefmill(self, *arguments: str, seconds: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of prefmill with this checkout's code."""
        return self.run([sys.executable, "-m", "prefmill.cli.main", *arguments], seconds, **environment)

    def run(self, command: list[str], seconds: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout."""
        given = {"PYTHONPATH": f"{self.checkout}/lib:{self.checkout}", "PYTHONSAFEPATH": "1", **environment}
        return subprocess.run(
            command,
            cwd=self.checkout,
            env=os.environ | given,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def submit(self, pipeline: str, *arguments: str, cluster: str = "test") -> str:
        """Submit a pipeline of the checkout; returns what was printed."""
        files = [f"configs/pipelines/{pipeline}.yaml", "--cluster", f"configs/clusters/{cluster}.yaml"]
        # Runs are compared here, so each is made: one taken from another would equal it whatever happened.
        done = self.prefmill("submit", *files, f"workspace={self.workspace}", "share=false", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def queue(self, fields: str = "%i %T %r") -> list[str]:
        """The queued and running elements."""
        return (self.cluster.ask("squeue", "-h", "-r", "-o", fields) or "").splitlines()

    def wait(self, ready: Callable[[], object] | None = None, seconds: float = 120) -> None:
        """Wait until `ready` holds, by default until nothing is queued."""
        deadline = time.monotonic() + seconds
        while not (ready() if ready else not self.queue()):
            assert time.monotonic() < deadline, f"still not so: {self.queue()}\n{self.logs()}"
            time.sleep(0.2)

    def hurry(self) -> None:
        """Start now what is to start in some minutes; not what Slurm holds back for seconds after a requeue."""
        for line in self.queue("%i|%S|%r"):
            job, start, reason = line.split("|", 2)
            known = start[:1].isdigit() and reason == "BeginTime"
            if known and datetime.fromisoformat(start).timestamp() - time.time() > HELD_SECONDS:
                self.cluster.ask("scontrol", "update", f"jobid={job}", "StartTime=now")

    def logs(self) -> str:
        """Everything the tasks and their jobs have printed."""
        files = [path for path in self.workspace.glob("logs/*/**/*") if path.suffix in (".log", ".out")]
        return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted(files) if "latest" not in path.parts)


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """A checkout whose stages are toys, on the cluster; its jobs are cancelled at the end."""
    checkout = write_checkout(tmp_path / "checkout")
    yield Site(cluster, checkout, tmp_path / "work")
    cluster.ask("scancel", "--me")
    deadline = time.monotonic() + 30
    while cluster.ask("squeue", "-h") and time.monotonic() < deadline:
        time.sleep(0.1)


def write_checkout(checkout: Path) -> Path:
    """This checkout's code with the toy stages."""
    for name in ("lib", "sbatch"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(__file__).parent / "toys", checkout, dirs_exist_ok=True)
    (checkout / "pyproject.toml").touch()
    return checkout


def free_ports() -> int:
    """A base whose next twenty ports nobody listens on."""
    for base in range(18000 + os.getpid() % 97 * 100, 30000, 100):
        if all(_is_free(base + offset) for offset in range(20)):
            return base
    raise RuntimeError("no free ports for a cluster")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0
