"""`prefmill status` on a real Slurm says what holds a job, and why one began no task."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import Site
from tests.slurm.test_submit import jobs

pytestmark = pytest.mark.slow


def test_held_jobs_and_failed_launches_are_told_in_words(site: Site, tmp_path: Path) -> None:
    """Also where the locale is C: a run's log folder and an interpreter that are gone when the job starts."""
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    (site.checkout / "configs/clusters/held.yaml").write_text(
        "export: [OMP_NUM_THREADS]\nadvance: false\nresources: {partition: main, options: {hold: true}}\n"
    )
    for run in ("closed", "bare"):
        site.submit("train", f"run={run}", f"stages.train.resources={{python: {python}}}", cluster="held")
    elements = {run: f"{jobs(site, run)[0]['job_id']}_0" for run in ("closed", "bare")}
    told = f"JobHeldUser: somebody holds it; to do: `scontrol release {elements['bare']}`"
    assert told in about(site, "status", "bare")
    shutil.rmtree(site.workspace / "logs/closed/train/slurm")
    python.unlink()
    for element in elements.values():
        site.cluster.ask("scontrol", "release", element)
    site.wait()
    told_by = ["sacct", "-nXP", "-o", "JobName,ExitCode"]
    # The accounting may be late, and of one job later than of the other.
    site.wait(lambda: all(code in (site.cluster.ask(*told_by) or "") for code in ("|0:53", "|127:0")))
    assert "FAILED: /" in (shown := about(site, "status", "bare")), shown
    assert f"{python}: " in shown
    assert "No such file or directory" in shown
    assert "with 0:53 before the task began: Slurm could not open its log" in about(site, "advance", "closed")
    assert "a program is missing on that node" in (said := about(site, "advance", "bare")), said


def about(site: Site, command: str, run: str) -> str:
    done = site.prefmill(command, run, "--workspace", str(site.workspace), LC_ALL="C")
    return done.stdout + done.stderr
