"""The hours and the memory that `prefmill estimate` forecasts, against what the demo took."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.documented_runs import DocumentedRun

FACTOR = 3  # 0.8 to 1.4 was measured; the run and its forecast may have had other neighbours


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score_reviews", "dpo"])
def test_the_demo_is_forecast_within_a_factor_of_three(stage: str, documented_demo: DocumentedRun) -> None:
    checkout = documented_demo.checkout
    before = sorted(path.name for path in checkout.iterdir())
    words = ["estimate", "configs/pipelines/demo.yaml", f"workspace={checkout}", "--measure", "--only", stage]
    for _ in range(3):  # half a second of scoring beside a test that starts takes thrice as long; an error comes again
        done = subprocess.run(
            [sys.executable, "-m", "prefmill.cli.main", *words],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r"the finished run took .*: the forecast is ([\d.]+) times that", done.stdout)
        assert found, done.stdout
        if 1 / FACTOR < float(found[1]) < FACTOR:
            break
    else:
        pytest.fail(done.stdout)
    # More than one slice, each run as the task itself is; nothing of them is left.
    assert done.stdout.count(f"+ {stage}:") > 1
    assert sorted(path.name for path in checkout.iterdir()) == before


@pytest.mark.slow
def test_the_demos_memory_is_forecast_within_a_factor_of_two(documented_demo: DocumentedRun) -> None:
    """The kernel counts what a process held (getrusage): here nearly all of it is the libraries, 0.4 to 0.6 GB."""
    words = ["estimate", "configs/pipelines/demo.yaml", f"workspace={documented_demo.checkout}"]
    done = subprocess.run(
        [sys.executable, "-m", "prefmill.cli.main", *words],
        cwd=documented_demo.checkout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    shares = [float(found) for found in re.findall(r"the forecast of one is ([\d.]+) times that", done.stdout)]
    assert len(shares) == 2, done.stdout + done.stderr
    assert all(0.75 < share < 2 for share in shares), shares
