"""How long torch's threads spin while they wait for each other, as libgomp itself reports."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, 1000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0)],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(given: dict[str, str], spins: int) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", "import prefmill, torch"], env={**kept, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {str(spins)}
