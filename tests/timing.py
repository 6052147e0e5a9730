"""python -m tests.timing [--times N] [pytest's arguments]: tests with threads, waits or clocks, idle and under load.

Every test marked `timing` runs 20 times with nothing else to do and 20 times beside two busy processes. Slurm's and
vLLM's own tests are left out: they wait for daemons with limits of minutes, and start one cluster or server for all.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

Result = tuple[bool, float]  # passed, seconds
LEFT_OUT = ("tests/slurm", "tests/vllm")
_BUSY_PROCESSES = 2


def main() -> int:
    """Run both rounds, print the table; 0 where nothing has failed and something ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    own, others = parser.parse_known_args()
    idle = measure(own.times, others)
    with busy_processes(_BUSY_PROCESSES):
        load = measure(own.times, others)
    print("\n".join(table(idle, load)))
    results = [result for each in (idle, load) for runs in each.values() for result in runs]
    return int(not results or not all(passed for passed, _ in results))


def measure(times: int, arguments: Sequence[str]) -> dict[str, list[Result]]:
    """Every repetition of every test, by the test's name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "timing", f"--repeat={times}", f"--junitxml={report}"]
        ignored = [f"--ignore={folder}" for folder in LEFT_OUT]
        subprocess.run([*command, *ignored, *arguments], check=False)
        return read_report(report)


def read_report(path: Path) -> dict[str, list[Result]]:
    """What pytest wrote of its tests, repetitions of the same test together; a skipped one is left out."""
    found = defaultdict(list)
    for case in ElementTree.parse(path).iter("testcase"):
        name = re.sub(r"\d+-(?=.*\])|\[\d+\]$", "", case.attrib["name"], count=1)
        if case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            found[f"{case.attrib['classname']}::{name}"].append((passed, float(case.attrib["time"])))
    return dict(found)


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Have that many processes compute and nothing else."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(idle: Mapping[str, list[Result]], load: Mapping[str, list[Result]]) -> Iterator[str]:
    """A row per test: how many passed of how many, and the slowest in seconds."""
    yield f"{'idle':>7} {'slowest':>9} {'load':>7} {'slowest':>9}  test"
    for name in sorted({*idle, *load}):
        cells = [f"{_passed(runs.get(name, []))} {_slowest(runs.get(name, [])):>7.2f} s" for runs in (idle, load)]
        yield f"{' '.join(cells)}  {name.removeprefix('tests.')}"


def _passed(runs: Sequence[Result]) -> str:
    return f"{sum(passed for passed, _ in runs)}/{len(runs)}".rjust(7)


def _slowest(runs: Sequence[Result]) -> float:
    return max((seconds for _, seconds in runs), default=0.0)


if __name__ == "__main__":
    sys.exit(main())
