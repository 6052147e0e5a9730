"""Searches the keys of a training stage with Optuna, by a held-out metric; any number of workers share a study."""

from __future__ import annotations

from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.sweep.config import StudyConfig


class SweepConfig(StudyConfig):
    """Which stage, over what, judged by what."""


def run(config: SweepConfig, task: Task) -> Metrics:
    """Take trials until the study has all, then write `trials.jsonl`, `best.yaml` and `sweep.html`."""
    from prefmill.report.sweep_page import sweep_page
    from prefmill.sweep.run import sweep

    return sweep(config, task, sweep_page)


STAGE = Stage(
    name="sweep",
    config=SweepConfig,
    run=run,
    root="checkpoints",
    on="both",
    writes="sweep",
    result="sweep.html",
    reads={
        "datasets": Reads("preference_datasets", "build_datasets", optional=True),
        "validation": Reads("validation", "validate_datasets", optional=True),
        "pairs": Reads("image_pairs", "build_image_pairs", optional=True),
        "policy": Reads("checkpoint", optional=True),
        "model": Reads("checkpoint", optional=True),
        "clip": Reads("checkpoint", optional=True),
        "reward": Reads("reward_model", optional=True),
        "scorer": Reads("reward_model", optional=True),
    },
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
