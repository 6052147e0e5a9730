"""A slice of `make test-faults`: one fault of sbatch, one of a disk, at a moment drawn anew each time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.slurm.conftest import Site
from tests.slurm.fault_matrix import play, undisturbed, write_configs
from tests.slurm.scene import Scene, fake_programs

pytestmark = pytest.mark.slow


def test_a_job_accepted_but_reported_failed_runs_once_and_a_flipped_bit_is_found(site: Site, tmp_path: Path) -> None:
    write_configs(site.checkout)
    calm = undisturbed(site)
    seed = random.SystemRandom().randrange(10_000)
    scene = Scene(site, fake_programs(tmp_path / "programs"), [f"r{seed}"], random.Random(seed))
    for name in ("sbatch accepted but reported failed", "flipped bit"):  # the second in what the first has made
        assert play(scene, name, calm) == [], f"seed {seed}, {name}"
