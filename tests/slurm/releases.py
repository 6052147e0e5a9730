"""Another release of Slurm beside the installed one: its Debian packages unpacked, and run with its own libraries.

Nothing of it is installed and no root directory is changed: jobs of its nodes see this machine's files and Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUITES = {"24.11": "trixie"}  # the Debian release that has this Slurm
PACKAGES = "slurmctld,slurmd,slurmdbd,slurm-client,slurm-wlm-basic-plugins,slurm-wlm-mysql-plugin"
PROGRAMS = ("sbatch", "squeue", "sinfo", "sacct", "sacctmgr", "scontrol", "scancel", "srun", "sdiag", "sprio")
DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "slurmstepd")


def installed() -> str:
    """The release of the Slurm that is installed here, as 22.05; "" where there is none."""
    found = shutil.which("slurmd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return _run([found, "-V"]).split()[-1].rpartition(".")[0] if found else ""


def programs(release: str) -> Path | None:
    """A folder with the programs of `release`, fetched once; None where it is the one that is installed.

    Raises ValueError for a release that no Debian has, subprocess.CalledProcessError where it cannot be fetched.
    """
    if release in ("", installed()):
        return None
    if release not in SUITES:
        raise ValueError(f"Slurm {release} is neither installed nor one of: {', '.join(SUITES)}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefmill" / f"slurm-{release}"
    if not (home / "bin").is_dir():
        _unpack(SUITES[release], home / "tree")
        _patch(home / "tree", home / "bin")
    return home / "bin"


def _unpack(suite: str, tree: Path) -> None:
    """The packages and all they need, without their scripts: apt and dpkg-deb verify and unpack, and run nothing."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    _run(["mmdebstrap", "--quiet", "--variant=extract", f"--include={PACKAGES}", suite, str(tree)])


def _patch(tree: Path, target: Path) -> None:
    """A copy of each program that its own release's loader and libraries run: this machine's C library is older.

    Not `loader PROGRAM`: slurmctld starts itself again by /proc/self/exe, which would then be the loader.
    """
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    change = [
        "patchelf", "--set-interpreter", str(tree / "usr/lib64/ld-linux-x86-64.so.2"),
        "--force-rpath", "--set-rpath", f"{libraries}:{libraries}/slurm-wlm",
    ]  # fmt: skip
    partial = target.with_name("bin.partial")
    partial.mkdir(exist_ok=True)
    for name in (*PROGRAMS, *DAEMONS):
        places = (tree / f"usr/{folder}/{name}{end}" for folder in ("bin", "sbin") for end in ("-wlm", ""))
        shutil.copy(next(place for place in places if place.is_file()), partial / name)
        _run([*change, str(partial / name)])
    partial.rename(target)  # last: it says that all is there


def plugins(folder: Path) -> Path:
    """Where the plugins of the programs in `folder` are."""
    return folder.parent / "tree/usr/lib/x86_64-linux-gnu/slurm-wlm"


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
