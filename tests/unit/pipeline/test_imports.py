"""Slow imports are done without the garbage collector, and what runs after them has it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
from toys import STAGES, MakeConfig, toy_plan

from prefmill.core.stage import Metrics, Stage, Task
from prefmill.pipeline.local import run_plan
from prefmill.pipeline.worker import import_now
from prefmill.store.artifacts import read_manifest
from prefmill.store.jsonl import write_jsonl

SLOW = "import gc\nfound = gc.isenabled()\n"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A module that sees whether the collector is on while it is imported, and one that cannot be imported."""
    (tmp_path / "slow_one.py").write_text(SLOW)
    (tmp_path / "broken_one.py").write_text(f"{SLOW}raise ImportError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["slow_one", "broken_one"]


def test_the_collector_is_off_for_the_imports_alone(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slow, broken = modules
    import_now([slow])
    assert gc.isenabled()
    assert sys.modules[slow].found is False
    gc.disable()
    try:
        import_now([slow])  # it is there: nothing is changed
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ImportError, match="broken"):
        import_now([broken])
    assert gc.isenabled()
    monkeypatch.delitem(sys.modules, slow)
    gc.unfreeze()  # this process goes on with other tests


def look(config: MakeConfig, task: Task) -> Metrics:
    """Whether the collector is on in a stage."""
    write_jsonl(task.output / "numbers.jsonl", [{"n": config.rows}])
    return {"collects": gc.isenabled(), "frozen": gc.get_freeze_count() > 0}


def test_a_task_of_a_local_run_collects_its_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "make", Stage("make", MakeConfig, look, "data", "review_corpus", preload=("decimal",)))
    plan = toy_plan(tmp_path, make={})
    assert run_plan(plan, say=lambda _: None) == 0
    manifest = read_manifest(plan.tasks[0].output)
    assert manifest is not None
    assert manifest.metrics == {"collects": True, "frozen": True}
