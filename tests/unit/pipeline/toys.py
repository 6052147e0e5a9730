"""Toy stages and a plan of them: the pipeline's own tests need no model."""

from __future__ import annotations

from pathlib import Path

from prefmill.core.config import ExternalPath, StrictConfig, later, runtime
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.pipeline.plan import PipelineFile, Plan, make_plan
from prefmill.store.jsonl import read_jsonl, write_jsonl


class MakeConfig(StrictConfig):
    rows: int = 3
    fail: str = runtime("")
    model_name_or_path: str | None = later(None)
    source: ExternalPath | None = later(None)


class UseConfig(StrictConfig):
    factor: int = 2
    modality: str = "clean"


RUNS: list[str] = []


def make(config: MakeConfig, task: Task) -> Metrics:
    """Writes numbers; leaves half its work behind when told to fail."""
    RUNS.append(f"{task.stage}:{task.name}")
    done = task.work / "half"
    first = "resumed" if done.exists() else "started"
    done.write_text(first)
    if config.fail == "bug":
        raise ValueError("a bug")
    if config.fail == "disk":
        raise OSError(28, "No space left on device", str(task.output / "x"))
    rows = [{"n": n} for n in range(config.rows) if task.shard.holds(str(n))]
    write_jsonl(task.output / "numbers.jsonl", rows)
    return {"rows": len(rows), "attempt": first, **({} if rows else {"warnings": ["no rows"]})}


def use(config: UseConfig, task: Task) -> Metrics:
    RUNS.append(f"{task.stage}:{task.name}")
    rows = [row for artifact in task.inputs["numbers"] for row in read_jsonl(artifact.file("numbers.jsonl"))]
    write_jsonl(task.output / "products.jsonl", [{"n": row["n"] * config.factor} for row in rows])
    return {}


STAGES = {
    "make": Stage("make", MakeConfig, make, "data", "review_corpus"),
    "use": Stage("use", UseConfig, use, "data", "review_scores", {"numbers": Reads("review_corpus", "make")}),
    "pair": Stage(
        "pair",
        UseConfig,
        use,
        "data",
        "report",
        {
            "numbers": Reads("review_corpus", "make"),
            "same": Reads("review_scores", "use", match="elementwise", optional=True),
        },
    ),
}


def toy_plan(workspace: Path, **stages: object) -> Plan:
    """A plan of toy stages; `make` and `use` with their defaults unless given."""
    chosen = stages or {"make": {}, "use": {}}
    values = {"name": "toy", "workspace": str(workspace), "stages": chosen}
    return make_plan(PipelineFile.model_validate(values), workspace / "configs" / "pipelines" / "toy.yaml")
