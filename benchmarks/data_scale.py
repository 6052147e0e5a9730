"""One million generated reviews through ingest, lexical scoring, build and validate: time and peak memory.

    python -m benchmarks.data_scale [--reviews 1000000] [--jobs 2] [--peers] [--work DIR]

Every task runs in a process of its own, through the worker that pipelines use: hashing and publishing included.
Targets on 2 cores: under 1 GB, and under 300 s for a million reviews. With `--peers` the reviews come from a file, and
scripts with polars and orjson (benchmarks.data_peers) do the work of ingest and build in the same run, ingest to the
same bytes: it is to take at most twice polars' time, build at most 1.2 times orjson's. The last line, of
prefmill's own stages, is for machines.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prefmill.core.config import validate
from prefmill.pipeline.plan import PipelineFile as Pipeline
from prefmill.pipeline.plan import Plan, PlannedTask, make_plan
from prefmill.pipeline.worker import execute
from prefmill.store.artifacts import read
from prefmill.store.jsonl import write_jsonl

_REVIEWS_PER_PAPER = 4.0  # the generator's mean
_FILE = "reviews.jsonl"
_PEERS = {"ingest_reviews": ("ingest_polars", "ingest_orjson"), "build_datasets": ("build_orjson",)}
_STAGES = ("ingest_reviews", "score_reviews", "build_datasets", "validate_datasets")


@dataclass(frozen=True)
class Usage:
    """What a process used, as the kernel counted it; `seconds` on the clock, `cpu_seconds` on all its cores."""

    seconds: float
    cpu_seconds: float
    peak_gb: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages one after another and print what each took; returns 0 when all have finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=int, default=1_000_000, help="about how many (default: 1,000,000)")
    parser.add_argument("--jobs", type=int, default=2, help="shards scored at once (default: 2)")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / ".work" / "data_scale", metavar="DIR")
    parser.add_argument("--peers", action="store_true", help="measure scripts with polars and orjson beside")
    parser.add_argument("--task", help=argparse.SUPPRESS)  # a child's own: run this one task and end
    arguments = parser.parse_args(argv)
    if arguments.peers:  # asked before a million reviews are ingested
        try:
            print("beside", ", ".join(f"{name} {version(name)}" for name in ("polars", "orjson")))
        except PackageNotFoundError as error:
            parser.error(f"--peers needs {error.name}, which is not among the requirements: pip install {error.name}")
    plan = make_scale_plan(arguments.work, arguments.reviews, arguments.jobs, arguments.peers)
    if arguments.task:
        execute(plan.select(arguments.task)[0])
        return 0
    shutil.rmtree(arguments.work, ignore_errors=True)
    if arguments.peers:
        _write_reviews(arguments.work / _FILE, arguments.reviews)
    try:
        _measure(plan, sys.argv[1:] if argv is None else argv)
    finally:
        shutil.rmtree(arguments.work, ignore_errors=True)
    return 0


def make_scale_plan(work: Path, num_reviews: int, num_shards: int, from_file: bool = False) -> Plan:
    """The pipeline's data stages with a generated corpus, below `work`; `from_file` reads it from a file there."""
    generated = {"format": "generated", "num_papers": _num_papers(num_reviews)}
    source = {"format": "jsonl", "path": str((work / _FILE).absolute())} if from_file else generated
    stages = {
        "ingest_reviews": {"set": {"sources": [source]}},
        "score_reviews": {"set": {"engine": {"engine": "lexical"}}, "array": {"shard": num_shards}},
        "build_datasets": {"set": {"modalities": ["clean"]}},
        "validate_datasets": {},
    }
    values = {"name": "data_scale", "workspace": str(work.absolute()), "stages": stages}
    return make_plan(validate(Pipeline, values), Path(__file__))


def _num_papers(num_reviews: int) -> int:
    return max(1, round(num_reviews / _REVIEWS_PER_PAPER))


def _write_reviews(path: Path, num_reviews: int) -> None:
    from prefmill.reviews.generated import generate

    path.parent.mkdir(parents=True)
    write_jsonl(path, generate(0, _num_papers(num_reviews)))


def _measure(plan: Plan, argv: Sequence[str]) -> None:
    print(f"{'stage':<20}{'tasks':>6}{'reviews':>12}{'seconds':>10}{'reviews/s':>12}{'cpu s':>9}{'peak MB':>10}")
    all_seconds, peak_gb, num_reviews = 0.0, 0.0, 0
    for stage in _STAGES:
        tasks = plan.select(stage)
        begun = time.monotonic()
        with ThreadPoolExecutor(len(tasks)) as pool:
            usages = list(pool.map(lambda task: _run(task, argv), tasks))
        seconds = time.monotonic() - begun
        all_seconds += seconds
        together = sum(usage.peak_gb for usage in usages)  # shards run side by side: their peaks may coincide
        peak_gb = max(peak_gb, together)
        num_reviews = num_reviews or _num_reviews(tasks[0])
        cpu = sum(usage.cpu_seconds for usage in usages)
        row = f"{seconds:>10.1f}{num_reviews / seconds:>12,.0f}{cpu:>9.1f}{together * 1024:>10,.0f}"
        print(f"{stage:<20}{len(tasks):>6}{num_reviews:>12,}{row}", flush=True)
        if (plan.workspace / _FILE).is_file():
            _measure_peers(stage, usages[0], plan)
    print(f"peak_gb: {peak_gb:.3f} seconds: {all_seconds:.1f}")


def _measure_peers(stage: str, ours: Usage, plan: Plan) -> None:
    """The scripts that do this stage's work, each in a process of its own."""
    if stage == "build_datasets":
        with (plan.workspace / "evaluations.jsonl").open("wb") as joined:
            for task in plan.select("score_reviews"):
                with read(task.output).file("review_evaluations.jsonl").open("rb") as part:
                    # Not read_bytes: a process that is started next is counted with the peak of this one.
                    shutil.copyfileobj(part, joined)
    for name in _PEERS.get(stage, ()):
        command = [sys.executable, "-m", "benchmarks.data_peers", str(plan.workspace), name]
        usage = _timed(command, plan.workspace / f"{name}.log")
        if stage == "ingest_reviews":
            _check_same_work(plan, name)
        ratio = f"ours takes {ours.cpu_seconds / usage.cpu_seconds:.2f} times its cpu s"
        row = f"{usage.seconds:>10.1f}{'':>12}{usage.cpu_seconds:>9.1f}{usage.peak_gb * 1024:>10,.0f}"
        print(f"  {name:<36}{row}  {ratio}", flush=True)


def _check_same_work(plan: Plan, peer: str) -> None:
    """Exits where the corpus of `peer` is not ours to the last byte: it would have done other work."""
    (ours,) = plan.select("ingest_reviews")
    for table in ("papers.jsonl", "reviews.jsonl"):
        theirs = plan.workspace / f"{peer.removeprefix('ingest_')}_{table}"
        if not filecmp.cmp(ours.output / table, theirs, shallow=False):
            sys.exit(f"{peer} wrote another {table} than ingest_reviews")


def _run(task: PlannedTask, argv: Sequence[str]) -> Usage:
    """Run one task in a process of its own; exits with its output when it fails."""
    task.logs.mkdir(parents=True, exist_ok=True)
    return _timed([sys.executable, "-m", "benchmarks.data_scale", *argv, "--task", task.key], task.logs / "output.log")


def _timed(command: Sequence[str], output: Path) -> Usage:
    started = time.monotonic()
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{output.read_text(errors='replace')[-4000:]}")
    return Usage(time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)


def _num_reviews(ingest: PlannedTask) -> int:
    files = read(ingest.output).manifest.files
    return next(entry.rows or 0 for entry in files if entry.path == "reviews.jsonl")


if __name__ == "__main__":
    sys.exit(main())
