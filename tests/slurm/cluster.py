"""A real Slurm with accounting on one machine: munge, MariaDB, slurmdbd, slurmctld and nodes that can lose power.

    python -m tests.slurm.cluster up [--release 24.11]    prints what to put into the environment
    python -m tests.slurm.cluster power-cut NODE          as if its plug were pulled
    python -m tests.slurm.cluster power-on NODE
    python -m tests.slurm.cluster down

Root or an ordinary user may run it; every file is below ROOT. Each node is a slurmd in namespaces of its own, so it
has its own host name, and killing its init takes the daemon and all its jobs at once.
"""

from __future__ import annotations

import argparse
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from tests.slurm import releases

CONFIGS = Path(__file__).parent / "etc"
COMMANDS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "unshare")
# Init of a node: names the host, hides the machine's hosts file, starts slurmd and reaps what it leaves behind.
NODE_INIT = """
hostname "$1"; mount --bind "$2" /etc/hosts; shift 2
"$@" & daemon=$!; trap 'kill -TERM $daemon' TERM
while kill -0 $daemon 2>/dev/null; do wait $daemon; done
"""


class ClusterError(RuntimeError):
    """The cluster cannot be started or does not answer."""


def missing_commands() -> list[str]:
    """The programs this needs and cannot find; empty where it can run."""
    return [name for name in COMMANDS if _which(name) is None]


@dataclass(frozen=True)
class Cluster:
    """A cluster below `root`, listening on loopback from `port` on."""

    root: Path
    port: int = 17800
    nodes: int = 4
    cpus: int = 16
    gpus: int = 8
    max_array_size: int = 1001
    min_job_age: int = 300
    programs: Path | None = None  # of another release than the one that is installed
    more: str = ""  # lines of slurm.conf

    @property
    def node_names(self) -> list[str]:
        """n1, n2, ..."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to talk to this cluster."""
        path = {"PATH": f"{self.programs}:{os.environ.get('PATH', '')}"} if self.programs else {}
        return {"SLURM_CONF": str(self.root / "etc" / "slurm.conf"), **path}

    def up(self) -> None:
        """Start everything and wait until every node is idle; raises ClusterError with the place of the logs."""
        if missing := missing_commands():
            raise ClusterError(f"not installed: {', '.join(missing)}; as root on Debian: bash tests/system_packages.sh")
        if any(self._is_ours(name) for name in self._daemons()):
            raise ClusterError(f"a cluster runs in {self.root}: `down` ends it")
        for name in ("etc", "log", "run", "pids", "dev", "state/slurmctld"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("munge", "db"):
            (self.root / name).mkdir(mode=0o711 if name == "munge" else 0o700, exist_ok=True)
        self._write_configs()
        self._start_munge()
        self._start_accounting()
        self._start("slurmctld", ["slurmctld", "-D"])
        self._wait(30, "slurmctld", lambda: self.ask("scontrol", "ping") is not None)
        for node in self.node_names:
            self.power_on(node)
        self._wait(30, "the nodes", self._all_idle)

    def down(self) -> None:
        """End the jobs, then every daemon by its own id, newest first."""
        if self._is_ours("slurmctld"):
            self.ask("scancel", "--full", "--user", getpass.getuser())
            deadline = time.monotonic() + 10
            while self.ask("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.1)
        for name in reversed(self._daemons()):
            self.stop(name)

    def power_cut(self, node: str) -> None:
        """Kill a node's init: its slurmd and every process of its jobs are gone at once."""
        self.kill(f"slurmd.{node}")

    def power_on(self, node: str) -> None:
        """Start a node."""
        namespaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        hosts = str(self.root / "etc" / "hosts")
        daemon = [self._find("slurmd"), "-D", "-N", node]
        daemon += ["-d", self._find("slurmstepd")] if self.programs else []
        if os.geteuid() != 0:
            ids = [f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
            namespaces[1:1] = ["--user", "--map-root-user"]
            daemon = ["unshare", "--user", *ids, *daemon]
        self._start(f"slurmd.{node}", [*namespaces, "bash", "-c", NODE_INIT, "node", node, hosts, *daemon])

    def kill(self, name: str) -> None:
        """End a daemon as a crash does."""
        self._signal(name, signal.SIGKILL)
        self._forget(name)

    def start_controller(self) -> None:
        """Start slurmctld again after `stop("slurmctld")`; it recovers its jobs."""
        self._start("slurmctld", ["slurmctld", "-D"])
        self._wait(30, "slurmctld", lambda: self.ask("scontrol", "ping") is not None)

    def start_accounting_daemon(self) -> None:
        """Start slurmdbd again after `stop("slurmdbd")`."""
        self._start("slurmdbd", ["slurmdbd", "-D"], {"MYSQL_UNIX_PORT": str(self.root / "run" / "mariadb.sock")})
        self._wait(60, "slurmdbd", lambda: self.ask("sacctmgr", "-n", "show", "cluster") is not None)

    def stop(self, name: str) -> None:
        """End one daemon politely, and by force after ten seconds."""
        self._signal(name, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while self._is_ours(name):
            if time.monotonic() > deadline:
                self._signal(name, signal.SIGKILL)
            time.sleep(0.05)
        self._forget(name)

    def ask(self, *command: str) -> str | None:
        """What a Slurm command prints; None when it fails."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | self.environment, timeout=60, check=False
        )
        return done.stdout if done.returncode == 0 else None

    def _write_configs(self) -> None:
        values = {
            "root": self.root, "host": socket.gethostname().split(".")[0], "user": getpass.getuser(),
            "port": self.port, "dbd_port": self.port + 1, "nodes": self.nodes, "cpus": self.cpus, "gpus": self.gpus,
            "max_array_size": self.max_array_size, "min_job_age": self.min_job_age,
        }  # fmt: skip
        etc = self.root / "etc"
        for name in ("slurm.conf", "slurmdbd.conf"):
            text = Template((CONFIGS / name).read_text()).substitute(values)
            text += self.more if name == "slurm.conf" else ""
            plugins = f"PluginDir={releases.plugins(self.programs)}\n" if self.programs else ""
            (etc / name).write_text(text + plugins)
        (etc / "slurmdbd.conf").chmod(0o600)
        with (etc / "slurm.conf").open("a") as stream:
            for number, node in enumerate(self.node_names, 1):
                stream.write(
                    f"NodeName={node} NodeHostname={values['host']} NodeAddr=127.0.1.{number} "
                    f"Port={self.port + 10 + number} CPUs={self.cpus} RealMemory=64000 Gres=gpu:h100:{self.gpus}\n"
                )
                (self.root / "state" / node).mkdir(exist_ok=True)
        for number in range(self.gpus):  # Slurm wants device files: links to /dev/null will do
            link = self.root / "dev" / f"nvidia{number}"
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")
        (etc / "gres.conf").write_text(
            f"NodeName=n[1-{self.nodes}] Name=gpu Type=h100 File={self.root}/dev/nvidia[0-{self.gpus - 1}]\n"
        )
        # 22.05 knows v1 and v2 only; v1 is never used, as nothing above asks for cgroups.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "plugstack.conf").write_text("")
        names = [f"127.0.1.{number} {node}" for number, node in enumerate(self.node_names, 1)]
        (etc / "hosts").write_text("\n".join([f"127.0.0.1 localhost {values['host']}", *names, ""]))

    def _start_munge(self) -> None:
        folder, sock = self.root / "munge", self.root / "munge" / "socket"
        key = folder / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(secrets.token_bytes(128))
        sock.unlink(missing_ok=True)
        options = {
            "key-file": key,
            "socket": sock,
            "pid-file": self.root / "run" / "munged.pid",
            "log-file": self.root / "log" / "munged.log",
            "seed-file": folder / "seed",
        }
        self._start("munged", ["munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in options.items())])
        self._wait(10, "munged", lambda: self.ask("munge", "-S", str(sock), "-n") is not None)

    def _start_accounting(self) -> None:
        data, sock, user = self.root / "db" / "data", self.root / "run" / "mariadb.sock", getpass.getuser()
        if not (data / "mysql").is_dir():
            install = [
                "mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}", "--skip-test-db",
                "--auth-root-authentication-method=socket", f"--auth-root-socket-user={user}", "--skip-name-resolve",
            ]  # fmt: skip
            subprocess.run(install, check=True, capture_output=True)
        server = [
            "mariadbd", "--no-defaults", f"--datadir={data}", f"--user={user}", f"--socket={sock}",
            f"--pid-file={self.root}/run/mariadbd.pid", f"--log-error={self.root}/log/mariadbd.log",
            "--skip-networking", "--skip-name-resolve", "--performance-schema=OFF", "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=32M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=2",
        ]  # fmt: skip
        self._start("mariadbd", server)
        ping = ("mariadb", "--no-defaults", f"--socket={sock}", "-e", "select 1")
        self._wait(60, "mariadbd", lambda: self.ask(*ping) is not None)
        self.start_accounting_daemon()
        # Before slurmctld starts: it does not register itself.
        if "mill" not in (self.ask("sacctmgr", "-nP", "show", "cluster") or ""):
            self.ask("sacctmgr", "-iQ", "add", "cluster", "mill")

    def _start(self, name: str, command: list[str], extra: dict[str, str] | None = None) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                [self._find(command[0]), *command[1:]],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | self.environment | (extra or {}) | {"PATH": _path(self.programs)},
            )  # fmt: skip
        (self.root / "pids" / name).write_text(f"{process.pid} {_started(process.pid)}\n")

    def _find(self, command: str) -> str:
        return _which(command, self.programs) or command

    def _daemons(self) -> list[str]:
        """Every daemon noted, oldest first."""
        return [path.name for path in sorted((self.root / "pids").glob("*"), key=lambda path: path.stat().st_mtime_ns)]

    def _pid(self, name: str) -> int | None:
        """The process id noted for a daemon, if that very process still runs."""
        try:
            pid, started = map(int, (self.root / "pids" / name).read_text().split())
        except FileNotFoundError:
            return None
        return pid if _started(pid) == started else None

    def _is_ours(self, name: str) -> bool:
        return self._pid(name) is not None

    def _signal(self, name: str, number: signal.Signals) -> None:
        pid = self._pid(name)
        if pid is None:
            return
        if number != signal.SIGKILL and name.startswith("slurmd."):  # unshare ignores signals: tell its child
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(children[0]) if children else pid
        os.kill(pid, number)

    def _forget(self, name: str) -> None:
        (self.root / "pids" / name).unlink(missing_ok=True)

    def _all_idle(self) -> bool:
        listed = self.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N") or ""
        return set(listed.split()) == set(self.node_names)

    def _wait(self, seconds: float, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise ClusterError(f"{what} did not come up within {seconds:.0f} s: see {self.root / 'log'}")
            time.sleep(0.05)


def _path(first: Path | None = None) -> str:
    return f"{first}:" * bool(first) + f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _which(command: str, first: Path | None = None) -> str | None:
    return shutil.which(command, path=_path(first))


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with its id that names it for good. None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m tests.slurm.cluster"
    )
    parser.add_argument("action", choices=["up", "down", "power-cut", "power-on"])
    parser.add_argument("node", nargs="?", help="for power-cut and power-on: n1, n2, ...")
    parser.add_argument("--root", type=Path, default=Path("logs/.slurm"), help="where its files are")
    parser.add_argument("--release", default="", help="of Slurm, such as 24.11 (default: the one that is installed)")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.root.absolute(), programs=releases.programs(arguments.release))
    if arguments.action in ("power-cut", "power-on"):
        getattr(cluster, arguments.action.replace("-", "_"))(arguments.node)
        return
    getattr(cluster, arguments.action)()
    if arguments.action == "up":
        print("export " + " ".join(f"{name}={value}" for name, value in cluster.environment.items()))


if __name__ == "__main__":
    main()
