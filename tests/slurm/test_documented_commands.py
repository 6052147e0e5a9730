"""The documented commands that need a cluster, typed as they stand in the pages, one after the other."""

from __future__ import annotations

import shutil

import pytest

from tests.docs.test_commands import NEEDS_SLURM, PAGES, commands, shell
from tests.slurm.conftest import Site

pytestmark = pytest.mark.slow
# What stands in for models of 3 billion parameters, under the pipeline's name: a training of the toys.
REVIEW = "name: review\nstages:\n  train: { set: { steps: 120, save_steps: 10, step_seconds: 0.1 } }\n"
WATCH_SECONDS = 3


def test_they_work_in_the_order_of_the_pages(site: Site) -> None:
    """The cluster files are the site's, as each page asks; a watch is ended, everything else must end by itself."""
    (site.checkout / "configs/pipelines/review.yaml").write_text(REVIEW)
    for name in ("h100", "mine"):
        shutil.copy(site.checkout / "configs/clusters/heal.yaml", site.checkout / f"configs/clusters/{name}.yaml")
    found = [command for page in PAGES for command in commands(page) if NEEDS_SLURM.match(command)]
    assert {command.split()[1] for command in found} >= {"submit", "rehearse", "status"}
    for command in found:
        watches = "--watch" in command
        done = shell(site.checkout, f"timeout {WATCH_SECONDS} {command}" if watches else command)
        assert done.returncode in ((0, 124) if watches else (0,)), f"{command}\n{done.stdout}{done.stderr}"
    site.wait()
    for run in ("review", "review-rehearsal"):
        assert (site.checkout / "checkpoints" / run / "train" / "all" / "manifest.json").is_file(), site.logs()
