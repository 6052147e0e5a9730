"""Ten stages of a thousand tasks, submitted to a real Slurm: time, sbatch calls and controller RPCs, side by side.

    python -m benchmarks.orchestration [--stages 10] [--tasks 1000] [--repeats 3] [--port PORT]

Needs the programs of `make slurm-up`; a cluster is started for it and ended. The nodes are drained, so that jobs are
queued but none runs: submission alone is measured, for prefmill with its interpreter, imports, copy of the code and
the follow-up job. The others are called in a process that has imported them.
Compared, in this order and again in the next repeat: bare submitit `map_array`, plain sbatch, datatrove where it is
installed, prefmill. The last line is for machines.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from tests.slurm.cluster import Cluster

# A stage that does nothing; a shard of it reads the same shard of the stage before.
STAGE = '''"""Stage {number} of the benchmark."""
from prefmill.core.config import StrictConfig
from prefmill.core.stage import Metrics, Reads, Stage, Task

class Config(StrictConfig):
    """Nothing to choose."""

def run(config: Config, task: Task) -> Metrics:
    """Write a line."""
    (task.output / "line.txt").write_text(task.name)
    return {{}}

READS = {reads}
STAGE = Stage("s{number}", Config, run, "data", "report", READS)
'''


@dataclass(frozen=True)
class Measured:
    """What one way of submitting took: seconds on the clock, calls of sbatch, RPCs the controller served."""

    seconds: float
    sbatch_calls: int
    rpcs: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every way and print the medians; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=1000, help="tasks of a stage (default: 1000)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=28800, help="first of the cluster's ports")
    arguments = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="orchestration"))
    cluster = Cluster(root / "slurm", port=arguments.port)
    cluster.up()
    os.environ.update(cluster.environment)
    try:
        _measure_all(cluster, root, arguments.stages, arguments.tasks, arguments.repeats)
    finally:
        cluster.down()
        shutil.rmtree(root, ignore_errors=True)
    return 0


def _measure_all(cluster: Cluster, root: Path, stages: int, tasks: int, repeats: int) -> None:
    nodes = ",".join(cluster.node_names)  # drained: jobs are accepted and queued, and none starts
    cluster.ask("scontrol", "update", f"NodeName={nodes}", "State=drain", "Reason=benchmark")
    checkout = _write_checkout(root / "checkout", stages, tasks)
    ways: dict[str, Callable[[Path], None]] = {
        "submitit map_array": lambda folder: submitit_map(folder, stages, tasks),
        "plain sbatch": lambda folder: plain_sbatch(folder, stages, tasks),
        "prefmill submit": lambda folder: prefmill_submit(folder, checkout),
    }
    if importlib.util.find_spec("datatrove"):
        ways["datatrove"] = lambda folder: datatrove_launch(folder, stages, tasks)
    else:
        print("datatrove is not installed: left out")
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            folder = root / f"{name.replace(' ', '_')}{repeat}"
            found[name].append(measure(cluster, lambda way=way, folder=folder: way(folder)))
    _report(found, stages, tasks)


def measure(cluster: Cluster, way: Callable[[], None]) -> Measured:
    """Run `way` with the controller's counters set to zero; its jobs are cancelled afterwards."""
    cluster.ask("sdiag", "--reset")
    started = time.perf_counter()
    way()
    seconds = time.perf_counter() - started
    counts = rpc_counts(cluster.ask("sdiag") or "")
    cluster.ask("scancel", "--me")
    while cluster.ask("squeue", "-h"):
        time.sleep(0.2)
    return Measured(seconds, counts.get("REQUEST_SUBMIT_BATCH_JOB", 0), sum(counts.values()))


def rpc_counts(text: str) -> dict[str, int]:
    """Calls of every kind that the controller has served, from sdiag; its own and the nodes' left out."""
    by_type = text.partition("Remote Procedure Call statistics by message type")[2].partition("statistics by user")[0]
    found = {name: int(count) for name, count in re.findall(r"(\w+)\s+\(\s*\d+\) count:(\d+)", by_type)}
    noise = ("MESSAGE_NODE", "REQUEST_STATS", "REQUEST_PING", "MESSAGE_EPILOG", "REQUEST_COMPLETE", "ACCOUNTING")
    return {name: count for name, count in found.items() if not name.startswith(noise)}


def submitit_map(folder: Path, stages: int, tasks: int) -> None:
    """Every stage by map_array, after the one before."""
    import submitit

    before = None
    for _ in range(stages):
        executor = submitit.SlurmExecutor(folder)
        dependency = f"aftercorr:{before}" if before else None
        executor.update_parameters(partition="main", time=10, array_parallelism=tasks, dependency=dependency)
        before = executor.map_array(_nothing, list(range(tasks)))[0].job_id.split("_")[0]


def plain_sbatch(folder: Path, stages: int, tasks: int) -> None:
    """Every stage by the shortest script there is."""
    folder.mkdir(parents=True)
    script = folder / "script"
    script.write_text("#!/bin/bash\ntrue\n")
    before = None
    for _ in range(stages):
        after = [f"--dependency=aftercorr:{before}"] if before else []
        options = ["--parsable", f"--array=0-{tasks - 1}", "--partition=main", "--time=10", *after]
        before = subprocess.run(["sbatch", *options, str(script)], capture_output=True, text=True, check=True).stdout
        before = before.strip()


def prefmill_submit(folder: Path, checkout: Path) -> None:
    """The command a user gives, interpreter and imports included."""
    command = ["submit", "configs/pipelines/bench.yaml", "--cluster", "cluster.yaml", f"workspace={folder}/work"]
    # An empty value lets Python keep what it compiles, as it does for anybody who has not switched that off.
    environment = {"PYTHONPATH": f"{checkout}/lib:{checkout}", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(
        [sys.executable, "-m", "prefmill.cli.main", *command],
        cwd=checkout, env=os.environ | environment, check=True, capture_output=True,
    )  # fmt: skip


def datatrove_launch(folder: Path, stages: int, tasks: int) -> None:
    """The same chain by datatrove's SlurmPipelineExecutor."""
    from datatrove.executor import SlurmPipelineExecutor

    last = None
    for number in range(stages):
        last = SlurmPipelineExecutor(
            pipeline=[_nothing], tasks=tasks, time="00:10:00", partition="main", job_name=f"s{number}",
            logging_dir=str(folder / f"s{number}"), depends=last, venv_path=None, qos="normal",
        )  # fmt: skip
    with redirect_stdout(StringIO()):
        last.run()


def _nothing(*_: object) -> None:
    """A task."""


def _write_checkout(checkout: Path, stages: int, tasks: int) -> Path:
    """A checkout with the benchmark's pipeline, compiled as any command but the first finds it."""
    repository = Path(__file__).parents[1]
    shutil.copytree(repository / "lib", checkout / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "stages").mkdir()
    (checkout / "stages" / "__init__.py").write_text('"""The benchmark\'s stages."""\n')
    for number in range(stages):
        reads = f'{{"before": Reads("report", "s{number - 1}", match="elementwise")}}' if number else "{}"
        (checkout / "stages" / f"s{number}.py").write_text(STAGE.format(number=number, reads=reads))
    entries = "\n".join(f"  s{number}: {{ array: {{ shard: {tasks} }} }}" for number in range(stages))
    (checkout / "configs" / "pipelines").mkdir(parents=True)
    (checkout / "configs" / "pipelines" / "bench.yaml").write_text(f"name: bench\nstages:\n{entries}\n")
    (checkout / "cluster.yaml").write_text("resources: { partition: main, time_limit_minutes: 10 }\n")
    (checkout / "pyproject.toml").touch()
    compileall.compile_dir(checkout, quiet=1)
    return checkout


def _report(found: dict[str, list[Measured]], stages: int, tasks: int) -> None:
    print(f"{stages} stages of {tasks} tasks, median of {len(next(iter(found.values())))} (all seconds)")
    for name, runs in found.items():
        seconds = statistics.median(run.seconds for run in runs)
        every = " ".join(f"{run.seconds:.2f}" for run in runs)
        print(f"{name:<20} {seconds:6.2f} s ({every})  sbatch {runs[0].sbatch_calls:>3}  RPCs {runs[0].rpcs:>4}")
    ours, theirs = ([run.seconds for run in found[name]] for name in ("prefmill submit", "submitit map_array"))
    # map_array writes a file a task, as fast as the disk takes them just then: the quickest says most.
    print(f"prefmill / submitit, quickest: {min(ours) / min(theirs):.2f} (target at most 1.2)")
    print(f"prefmill / submitit, median: {statistics.median(ours) / statistics.median(theirs):.2f}")
    print(f"seconds: {statistics.median(ours):.2f}")


if __name__ == "__main__":
    sys.exit(main())
