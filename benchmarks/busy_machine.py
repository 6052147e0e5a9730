"""How fast a tiny model trains on every core beside other work, by how long its threads spin while they wait.

    python -m benchmarks.busy_machine [--seconds 5] [--repeats 3]

Steps a second of a small network with torch's default number of threads: libgomp's own spin count (300,000) beside
prefmill's, on the machine as it is and beside one busy process a core. Medians of interleaved repeats. The last line is
for machines.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict

from tests.timing import busy_processes

SPINS = {"libgomp's": "300000", "prefmill's": None}  # None: as `import prefmill` sets it
STEPS = """
import time, prefmill, torch
from torch import nn
layers = [[nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96), nn.LayerNorm(96)] for _ in range(4)]
model = nn.Sequential(*sum(layers, []))
optimizer, rows, steps = torch.optim.AdamW(model.parameters()), torch.randn(1600, 96), 0
start = time.monotonic()
while time.monotonic() < start + {seconds}:
    model(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    steps += 1
print(steps / (time.monotonic() - start))
"""


def main() -> None:
    """Print the table, and the ratio beside other work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    measured = defaultdict(list)
    for _ in range(given.repeats):
        for others in (0, cores):
            for name, spins in SPINS.items():
                with busy_processes(others):
                    measured[others, name].append(steps_a_second(given.seconds, spins))
    print(f"{'steps/s':>10} {'least':>8} {'most':>8}  threads of {cores} cores")
    for (others, name), rates in measured.items():
        cells = f"{statistics.median(rates):>10.2f} {min(rates):>8.2f} {max(rates):>8.2f}"
        print(f"{cells}  {name} spins, {others} busy processes")
    ratio = statistics.median(measured[cores, "prefmill's"]) / statistics.median(measured[cores, "libgomp's"])
    print(f"ratio: {ratio:.2f}")


def steps_a_second(seconds: float, spins: str | None) -> float:
    """The rate of one process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, "-c", STEPS.format(seconds=seconds)]
    return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


if __name__ == "__main__":
    main()
