"""Steps inside a task: what is reused, what is run again."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.optimize.run import Step, run_steps

NAMES = ("a", "b", "c")


class Recorder:
    """Three steps that write their settings; `b` writes `content` beside."""

    def __init__(self) -> None:
        self.content = "same"
        self.fails: str | None = None

    def steps(self, **changed: Mapping[str, Any]) -> list[Step]:
        return [Step(name, changed.get(name, {}), lambda folder, name=name: self.write(folder, name)) for name in NAMES]

    def write(self, folder: Path, name: str) -> None:
        assert list(folder.iterdir()) == []
        (folder / "out.txt").write_text(self.content if name == "b" else name)
        if name == self.fails:
            raise RuntimeError("stop")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_attempt_goes_on_behind_the_last_finished_step(tmp_path: Path, recorder: Recorder) -> None:
    recorder.fails = "b"
    with pytest.raises(RuntimeError):
        run_steps(recorder.steps(), tmp_path / "o", tmp_path / "none", None)
    recorder.fails = None
    assert run_steps(recorder.steps(), tmp_path / "o", tmp_path / "none", None) == ["b", "c"]
    assert run_steps(recorder.steps(), tmp_path / "o", tmp_path / "none", None) == []
    run_steps(recorder.steps(), tmp_path / "whole", tmp_path / "none", None)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("changed", "expected"), [("a", ["a", "b", "c"]), ("b", ["b", "c"]), ("c", ["c"])])
def test_a_changed_step_and_those_after_it_are_run(
    tmp_path: Path, recorder: Recorder, changed: str, expected: list[str]
) -> None:
    run_steps(recorder.steps(), tmp_path / "old", tmp_path / "none", None)
    steps = recorder.steps(**{changed: {"x": 1}})
    assert run_steps(steps, tmp_path / "new", tmp_path / "old", None) == expected
    run_steps(steps, tmp_path / "fresh", tmp_path / "none", None)
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(("redo", "expected"), [(None, list(NAMES)), ("a", ["a"]), ("b", ["b"]), ("c", ["c"])])
def test_when_nothing_has_changed_the_work_is_wanted_again(
    tmp_path: Path, recorder: Recorder, redo: str | None, expected: list[str]
) -> None:
    run_steps(recorder.steps(), tmp_path / "old", tmp_path / "none", None)
    assert run_steps(recorder.steps(), tmp_path / "new", tmp_path / "old", redo) == expected
    assert contents(tmp_path / "new") == contents(tmp_path / "old")


def test_what_follows_from_another_output_is_run_too(tmp_path: Path, recorder: Recorder) -> None:
    run_steps(recorder.steps(), tmp_path / "old", tmp_path / "none", None)
    recorder.content = "other"
    assert run_steps(recorder.steps(), tmp_path / "new", tmp_path / "old", "b") == ["b", "c"]


@pytest.mark.parametrize("damage", ["edit", "add", "remove"])
def test_a_damaged_step_is_never_reused(tmp_path: Path, recorder: Recorder, damage: str) -> None:
    run_steps(recorder.steps(), tmp_path / "old", tmp_path / "none", None)
    file = tmp_path / "old" / "a" / "out.txt"
    {
        "edit": lambda: file.write_text("b"),
        "add": lambda: shutil.copy(file, file.with_name("more.txt")),
        "remove": file.unlink,
    }[damage]()
    steps = recorder.steps(c={"x": 1})
    assert run_steps(steps, tmp_path / "new", tmp_path / "old", None) == ["a", "c"]


def test_every_pair_of_settings_gives_its_own_keys(tmp_path: Path, recorder: Recorder) -> None:
    runs = [recorder.steps(), recorder.steps(a={"x": 1}), recorder.steps(b={"x": 1})]
    for number, steps in enumerate(runs):
        run_steps(steps, tmp_path / str(number), tmp_path / "none", None)
    for one, other in itertools.combinations(range(3), 2):
        assert contents(tmp_path / str(one))["c/step.json"] != contents(tmp_path / str(other))["c/step.json"]
