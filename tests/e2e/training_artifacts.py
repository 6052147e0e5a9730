"""Small datasets as artifacts, and training that is killed on the way, for tests of the stages that train."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.stage import Task
from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.artifacts import payload, publish
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.tiny import pair_rows, save_tiny_qwen2, sentence

Rows = list[dict[str, Any]]


def publish_as(folder: Path, kind: str) -> Artifact:
    """What is in `folder` as an artifact."""
    return publish(folder, kind, Provenance("test", "all", "f", {}, {}, "0", {}), {})


def make_checkpoint(folder: Path) -> Artifact:
    """A tiny model as the checkpoint to start from."""
    return publish_as(save_tiny_qwen2(folder), "checkpoint")


def sft_rows(count: int, start: int = 0) -> Rows:
    """Chats as build_datasets writes them."""
    return [
        {
            "id": f"r{n}",
            "paper_id": f"p{n}",
            "messages": [
                {"role": "user", "content": sentence(n, 5 + n % 4)},
                {"role": "assistant", "content": sentence(500 + n, 4 + n % 6)},
            ],
        }
        for n in range(start, start + count)
    ]


def make_datasets(folder: Path, **rows: Rows) -> Artifact:
    """A preference_datasets artifact; a dataset that is not given gets rows of its own."""
    given: dict[str, Rows] = {
        "sft_clean_train": sft_rows(24),
        "sft_clean_val": sft_rows(6, start=100),
        "dpo_clean_train": [*pair_rows(10, pairs=2)],
        "dpo_clean_val": [{**row, "id": f"v{row['id']}"} for row in pair_rows(3, pairs=1)],
    }
    for name, values in {**given, **rows}.items():
        write_jsonl(folder / name / "data.jsonl", values)
    return publish_as(folder, "preference_datasets")


def make_task(stage: str, folder: Path, **inputs: Artifact) -> Task:
    """The task of `stage` whose output and logs are below `folder`; the same folder resumes it."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    values = {name: (artifact,) for name, artifact in inputs.items()}
    return Task("r", stage, "clean", {"modality": "clean"}, {}, values, folder / "out", folder / "logs")


def content(folder: Path) -> dict[str, bytes]:
    """Every payload file of a task's output."""
    return {path.relative_to(folder / "out").as_posix(): path.read_bytes() for path in payload(folder / "out")}


def executed_steps(folder: Path) -> list[int]:
    """The optimizer steps a task took, in order, repeats included."""
    path = folder / "logs" / EXECUTED
    return [row["step"] for row in read_jsonl(path)] if path.is_file() else []


def kill_after(steps: int, folder: Path, work: Callable[[], object]) -> None:
    """Run `work` in a fork of this process and SIGKILL it after that many steps."""
    kill_when(lambda: len(executed_steps(folder)) >= steps, lambda: _slowed(work))


def kill_when(reached: Callable[[], bool], work: Callable[[], object]) -> None:
    """Run `work` in a fork of this process, which has the slow imports done, and SIGKILL it as soon as that is so."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    while not reached():
        assert child.is_alive(), f"ended by itself with code {child.exitcode}"
        time.sleep(0.001)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def _slowed(work: Callable[[], object]) -> None:
    from prefmill.training.callbacks import StageCallback

    original = StageCallback.on_step_end

    def on_step_end(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        time.sleep(0.1)

    StageCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    work()
