"""Every fault over random seeds of the moment: each run ends with the digests of an undisturbed one, and leaves no job.

    python -m tests.slurm.fault_matrix [--release 24.11] [--only "killed child"] [--seeds 3]

As root, for a small disk of its own and for nodes. Each row goes to benchmarks/results/faults-slurm-RELEASE.txt when
it is there, in place of an earlier one of the same fault.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.slurm import releases
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Site, free_ports, write_checkout
from tests.slurm.faults import FAULTS, INTERRUPT, ONE_AT_A_TIME
from tests.slurm.scene import NUM_TASKS, PIPELINE, Scene, fake_programs, live
from tests.slurm.test_job import rows
from tests.slurm.test_submit import digests

PATIENCE_SECONDS, DISK_MB = 300, 96
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
LATE = f"case $(uname -n) in n1) export LD_PRELOAD={FAKETIME} FAKETIME=-90s;; esac"
# Limits on submitted jobs are kept only where Slurm is told to; a partition whose jobs are preempted by cancelling.
SLURM_CONF = """AccountingStorageEnforce=limits
PartitionName=spare Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=10 MaxTime=600 DefMemPerCPU=1000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Play every fault and write the table; returns 1 where a run did not end as it must."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", default="")
    parser.add_argument("--only", choices=FAULTS, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="faults"))
    disk = root / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)], check=True)
    programs = releases.programs(arguments.release)
    # What a killed slurmctld has lost counts as ended when it could have been purged: after a minute, not after five.
    cluster = Cluster(root / "slurm", free_ports(), min_job_age=60, programs=programs, more=SLURM_CONF)
    os.environ.update(cluster.environment)
    try:
        cluster.up()
        cluster.ask("sacctmgr", "-iQ", "add", "account", "mill")
        cluster.ask("sacctmgr", "-iQ", "add", "user", "root", "account=mill")
        release = arguments.release or releases.installed()
        played = list(play_all(cluster, root, arguments.only or list(FAULTS), arguments.seeds, release))
    finally:
        cluster.down()
        subprocess.run(["umount", "-l", str(disk)], check=True)
    failed = any(problems for *_, problems in played)
    if not failed:
        shutil.rmtree(root)
    return int(failed)


Played = tuple[str, list[int], float, int, list[str]]


def play_all(cluster: Cluster, root: Path, names: Sequence[str], num_seeds: int, release: str) -> Iterator[Played]:
    """Every fault in a workspace of its own, which is removed where nothing is wrong."""
    checkout = write_checkout(root / "checkout")
    write_configs(checkout)
    programs = fake_programs(root / "programs")
    calm = undisturbed(Site(cluster, checkout, root / "disk" / "calm"))
    for name in names:
        seeds = [random.SystemRandom().randrange(10_000) for _ in range(num_seeds)]
        started, problems, attempts = time.monotonic(), [], 0
        for group in [[seed] for seed in seeds] if name in ONE_AT_A_TIME else [seeds]:
            site = Site(cluster, checkout, root / "disk" / f"{name.replace(' ', '_')}{group[0]}")
            scene = Scene(site, programs, [f"r{seed}" for seed in group], random.Random(group[0]))
            found = play(scene, name, calm)
            attempts += _attempts(scene)
            problems += found
            _keep(site.workspace, root / "failed") if found else None
            shutil.rmtree(site.workspace)
        played = (name, seeds, time.monotonic() - started, attempts, problems)
        _note(played, release)
        print(_line(played), *problems, sep="\n  ", flush=True)
        yield played


def write_configs(checkout: Path) -> None:
    """The pipeline that all faults meet, and its site, once with a node whose clock is behind."""
    (checkout / "configs/pipelines/storm.yaml").write_text(PIPELINE)
    base = "export: [OMP_NUM_THREADS]\nresources: { partition: main, time_limit_minutes: 10 }\n"
    (checkout / "configs/clusters/storm.yaml").write_text(base)
    (checkout / "configs/clusters/late.yaml").write_text(
        f"{base}setup: ['{LATE}']\nstages: {{ advance: {{ options: {{ exclude: n1 }} }} }}\n"
    )


def play(scene: Scene, name: str, calm: dict[str, str]) -> list[str]:
    """One fault; returns what is wrong with its runs afterwards. Beside each run another is cancelled on the way."""
    fault = FAULTS[name](scene)
    twins = [] if name in ONE_AT_A_TIME else [f"twin{run}" for run in scene.runs[:1]]
    problems: list[str] = []
    try:
        next(fault)
        with ThreadPoolExecutor(4) as pool:  # all train when the fault comes
            submitted = pool.map(scene.submit, [*scene.runs, *twins])
        problems += [f"submit: {done.stderr}" for done in submitted if done.returncode]
        next(fault)
        for twin in twins:
            done = scene.about("cancel", twin)
            problems += [f"{twin}: cancel: {done.stderr}"] if done.returncode else []
        _wait(scene, calm)
    except AssertionError as error:
        problems.append(str(error)[:3000])
    for _ in fault:
        pass
    scene.site.cluster.ask("scontrol", "update", "NodeName=ALL", "State=resume")
    problems += [problem for run in scene.runs for problem in check(scene, run, calm)]
    if name in INTERRUPT and _attempts(scene) <= NUM_TASKS * len(scene.runs):
        problems.append("nothing was interrupted")
    problems += [f"{twin}: left after cancel: {left}" for twin in twins if (left := _gone(scene, twin))]
    scene.site.cluster.ask("scancel", "--me")
    _gone(scene, "")
    return problems


def _attempts(scene: Scene) -> int:
    return sum(len(rows(path)) for path in scene.site.workspace.glob("logs/r*/*/*/attempts.jsonl"))


def check(scene: Scene, run: str, calm: dict[str, str]) -> list[str]:
    """What is wrong with a run that has ended."""
    made, work = digests(scene.site.workspace, run), scene.site.workspace
    problems = [f"{run}: {key} is {made.get(key, 'missing')}" for key in calm if made.get(key) != calm[key]]
    logs = work.glob(f"logs/{run}/*/*.log")
    problems += [f"{path}: runs twice" for path in logs if "is already running" in path.read_text()]
    for path in work.glob(f"logs/{run}/*/*/attempts.jsonl"):
        spans = sorted((row["started"], row["ended"], row["node"]) for row in rows(path))
        pairs = [
            (a, b) for a, b in itertools.pairwise(spans) if b[0] < a[1] and (a[2] == b[2] or scene.cluster != "late")
        ]
        problems += [f"{path}: attempts overlap: {pair}" for pair in pairs]
    if left := _gone(scene, run):
        problems.append(f"{run}: jobs left in the queue: {left}")
    return problems


def _wait(scene: Scene, calm: dict[str, str]) -> None:
    """Until every run is complete. Nobody waits for minutes on purpose: what Slurm holds back starts at once."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(len(digests_or_none(scene.site, run)) < len(calm) for run in scene.runs):
        scene.site.hurry()
        if scene.advised:
            _do_as_status_says(scene)
        if time.monotonic() > deadline:
            shown = "\n".join(scene.about("status", run).stdout for run in scene.runs)
            raise AssertionError(f"not complete after {PATIENCE_SECONDS} s: {scene.site.queue()}\n{shown}")
        time.sleep(1)


def _do_as_status_says(scene: Scene) -> None:
    time.sleep(10)
    for run in scene.runs:
        if "`prefmill advance" in scene.about("status", run).stdout:
            scene.about("advance", run)


def digests_or_none(site: Site, run: str) -> dict[str, str]:
    """The digests of what is finished; none where a manifest cannot be read now."""
    try:
        return digests(site.workspace, run)
    except Exception:
        return {}


def _gone(scene: Scene, run: str) -> list[str]:
    """What is still queued of a run after a while."""
    deadline = time.monotonic() + 240  # a controller that was killed learns late which jobs have ended
    while (left := live(scene.site, run) if run else scene.site.queue()) and time.monotonic() < deadline:
        scene.site.hurry()
        time.sleep(0.5)
    return left


def undisturbed(site: Site) -> dict[str, str]:
    """The digests of a run on this machine."""
    done = site.prefmill("run", "configs/pipelines/storm.yaml", f"workspace={site.workspace}", "run=calm")
    made = digests(site.workspace, "calm")
    assert len(made) == NUM_TASKS, done.stdout + done.stderr
    shutil.rmtree(site.workspace)
    return made


def _keep(workspace: Path, target: Path) -> None:
    """What a failed fault left, for a look; on the large disk."""
    shutil.copytree(workspace, target / workspace.name, symlinks=True, ignore=shutil.ignore_patterns("code", "filler"))


def _line(played: Played) -> str:
    name, seeds, seconds, attempts, problems = played
    verdict = "FAILED" if problems else "as undisturbed"
    shown = " ".join(f"{seed:>4}" for seed in seeds)
    return f"{name:<38} {shown}  {verdict:<15} {attempts:>3}  {seconds:4.0f} s  {date.today()}"


def _note(played: Played, release: str) -> None:
    """Write the row into the table of `release`, whose other rows stay."""
    path = REPOSITORY / "benchmarks/results" / f"faults-slurm-{release}.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = {name: line for line in lines if (name := line[:38].rstrip()) in FAULTS} | {played[0]: _line(played)}
    head = f"# make test-faults: Slurm {release}, 2 cores shared with other work"
    about = (
        f"# a run of {NUM_TASKS} tasks for each seed: digests as undisturbed, no two attempts at a task at once, no\n"
        "# job left; none of a twin run after `cancel`"
    )
    columns = f"{'fault':<38} {'seeds':<14}  {'ended':<15} attempts  time"
    path.write_text("\n".join([head, about, columns, *(rows[name] for name in FAULTS if name in rows)]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
