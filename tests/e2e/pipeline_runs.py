"""The review pipeline through the command line, for tests of the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefmill.core.places import MANIFEST
from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.jsonl import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "configs" / "pipelines" / "demo.yaml"
# The whole pipeline in half a minute: its mechanics are the same, its models learn little.
SMALL = (
    "ingest_reviews.sources=[{format: generated, num_papers: 150}]",
    "tiny_model.shape={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}",
    "tiny_model.num_train_epochs=1", "tiny_model.save_steps=10",
    "sft.logging_steps=1", "sft.save_steps=3",
    "dpo.logging_steps=1", "dpo.save_steps=3", "dpo.num_train_epochs=1",
    "evaluate.num_papers=10", "evaluate.samples_per_paper=1", "evaluate.max_new_tokens=32",
    "report.num_resamples=1000", "report.show_cost=false",
)  # fmt: skip


def prefmill(*arguments: str | Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(threads), check=False)


def command(*arguments: str | Path) -> list[str]:
    """The words of `prefmill ARGUMENTS` in this very environment."""
    return [sys.executable, "-m", "prefmill.cli.main", *map(str, arguments)]


def environment(threads: int = 1) -> dict[str, str]:
    """The environment of such a process."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def run(workspace: Path, *overrides: str, pipeline: Path = DEMO, threads: int = 1) -> str:
    """`prefmill run` that must succeed; what it printed."""
    done = prefmill("run", pipeline, f"workspace={workspace}", *overrides, threads=threads)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(printed: str) -> set[str]:
    """The tasks that a run started."""
    return {line.split()[1] for line in printed.splitlines() if line.startswith("> ")}


def digests(workspace: Path) -> dict[str, str]:
    """The content digest of every finished task, by `stage/task`."""
    found = {}
    for root in ("data", "checkpoints"):
        for path in sorted((workspace / root).glob(f"[!.l]*/[!.]*/*/{MANIFEST}")):
            found["/".join(path.parts[-3:-1])] = str(json.loads(path.read_text())["content_digest"])
    return found


def executed(workspace: Path) -> dict[str, list[int]]:
    """The optimizer steps every training task ever took, repeats included."""
    return {
        path.parts[-3]: [row["step"] for row in read_jsonl(path)]
        for path in (workspace / "logs").glob(f"[!l]*/*/*/{EXECUTED}")
    }


def comparison(workspace: Path) -> dict[str, Any]:
    """The numbers of the run's report."""
    (path,) = (workspace / "data").glob("[!l]*/report/all/comparison.json")
    (only,) = json.loads(path.read_text())["modalities"]
    return dict(only)
