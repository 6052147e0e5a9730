"""What people and operators do to a run's jobs with Slurm's own commands: it goes on from where it had saved."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import Site
from tests.slurm.test_faults import check_steps, complete, reached, status, train
from tests.slurm.test_job import attempts, go_on
from tests.slurm.test_status import about
from tests.slurm.test_submit import digests, jobs

pytestmark = pytest.mark.slow

SLOWLY = "train.step_seconds=0.4"  # so that it still trains when somebody does something, on a busy machine too
BIG = '''
from prefmill.core.config import StrictConfig
from prefmill.core.stage import Metrics, Stage, Task


class BigConfig(StrictConfig):
    """Nothing to set."""


def run(config: BigConfig, task: Task) -> Metrics:
    with (task.output / "weights.bin2").open("wb") as stream:
        stream.truncate(8 << 30)
    (task.logs / "written").touch()
    return {}


STAGE = Stage("big", BigConfig, run, "checkpoints", "checkpoint")
'''


def element(site: Site, run: str) -> str:
    (job,) = (job for job in jobs(site, run) if job["kind"] == "array")  # the other looks after the run
    return f"{job['job_id']}_0"


def outcomes(site: Site, run: str) -> list[str]:
    """How the attempts have ended; an end is noted a moment behind what it has made."""
    return [row["outcome"] for row in attempts(site, run)]


def test_requeued_by_hand(site: Site) -> None:
    train(site, "again", SLOWLY)
    site.wait(reached(site, "again", 7))
    assert site.cluster.ask("scontrol", "requeue", element(site, "again")) is not None
    site.wait(complete(site, "again"), seconds=180)
    site.wait(lambda: outcomes(site, "again") == ["terminated", "complete"])
    check_steps(site, "again")


@pytest.mark.parametrize("by_name", [[], ["state=SpecialExit"]], ids=["held", "held by a name"])
def test_held_while_it_runs_and_released(site: Site, by_name: list[str]) -> None:
    train(site, "held", SLOWLY)
    site.wait(reached(site, "held", 7))
    name = element(site, "held")
    assert site.cluster.ask("scontrol", "requeuehold", *by_name, name) is not None
    site.wait(lambda: any(name in line and ("PENDING" in line or "SPECIAL_EXIT" in line) for line in site.queue()))
    assert "held" in (said := about(site, "status", "held")), said
    assert f"scontrol release {name}" in said, said
    said = about(site, "advance", "held")
    assert f"scontrol release {name}" in about(site, "status", "held"), said
    site.cluster.ask("scontrol", "release", name)
    go_on(site, name)
    site.wait(complete(site, "held"), seconds=180)
    check_steps(site, "held")


def test_suspended_and_resumed(site: Site) -> None:
    train(site, "suspended", SLOWLY)
    site.wait(reached(site, "suspended", 7))
    name = element(site, "suspended")
    assert site.cluster.ask("scontrol", "suspend", name) is not None
    assert "train:all  suspended  " in (said := about(site, "status", "suspended")), said
    assert f"`scontrol resume {name}`" in said
    assert "s left" not in said
    assert site.cluster.ask("scontrol", "resume", name) is not None
    site.wait(complete(site, "suspended"), seconds=180)
    check_steps(site, "suspended", interruptions=0)


def test_a_signal_to_the_steps_alone_disturbs_nothing(site: Site) -> None:
    train(site, "signal", SLOWLY)
    site.wait(reached(site, "signal", 3))
    site.cluster.ask("scancel", "-s", "USR1", element(site, "signal"))
    site.wait(complete(site, "signal"), seconds=180)
    assert digests(site.workspace, "signal")
    check_steps(site, "signal")


def test_a_node_is_set_down(site: Site) -> None:
    train(site, "down", SLOWLY)
    site.wait(reached(site, "down", 7))
    node = status(site, "down")["host"]
    assert site.cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test") is not None
    try:
        site.wait(lambda: site.hurry() or complete(site, "down")(), seconds=240)
    finally:
        site.cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")
    check_steps(site, "down", interruptions=2)


def test_requeued_while_it_publishes(site: Site) -> None:
    (site.checkout / "stages/big.py").write_text(BIG)
    (site.checkout / "configs/pipelines/big.yaml").write_text("name: big\nstages:\n  big: {}\n")
    site.submit("big", "run=big", cluster="heal")
    logs, output = site.workspace / "logs/big/big/all", site.workspace / "checkpoints/big/big/all"
    site.wait((logs / "written").exists)
    assert site.cluster.ask("scontrol", "requeue", element(site, "big")) is not None
    site.wait(lambda: any("PENDING" in line for line in site.queue() if line.startswith(element(site, "big"))))
    assert not (output / "manifest.json").exists()
    assert "complete" not in about(site, "status", "big").split("\n")[2]
    go_on(site, element(site, "big"))
    site.wait((output / "manifest.json").exists, seconds=240)
    site.wait(seconds=120)
    assert about(site, "verify", "big").startswith("ok")


@pytest.mark.parametrize("phase", ["load", "save"])
def test_the_time_limit_comes_while_it_loads_or_saves(site: Site, phase: str) -> None:
    keys = {"load": ["train.step_seconds=3"], "save": ["train.step_seconds=1", "train.save_steps=1"]}[phase]
    train(site, phase, *keys, "train.steps=12")
    name = element(site, phase)
    site.wait(lambda: any("RUNNING" in line for line in site.queue() if line.startswith(name)))
    if phase == "save":
        site.wait(reached(site, phase, 3))
    site.cluster.ask("scontrol", "update", f"jobid={name}", "EndTime=now+1")
    site.wait(lambda: site.hurry() or complete(site, phase)(), seconds=240)
    site.wait(lambda: outcomes(site, phase)[-1:] == ["complete"])
