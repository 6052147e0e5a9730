"""Two ranks leave the margins that one process leaves, and the tracker hears of each rank."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.telemetry import SPEED
from tests.tiny import pair_rows
from tests.unit.training import test_ranks

FIELDS = {
    "step", "epoch", "pair_id", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "margin",
    "chosen_length", "rejected_length", "gradient_coefficient",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> dict[int, Path]:
    """Logs of one process and of two, on 20 pairs in groups of one to four."""
    importlib.import_module("prefmill.families.causal.dpo")
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "data.jsonl", [row for n, row in enumerate(pair_rows(8, 4)) if n % 4 <= n // 4 % 4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_ranks, "SMALL", {**test_ranks.SMALL, "report_to": ["tensorboard"]})
        for ranks in (1, 2):
            test_ranks.train_on(ranks, folder / str(ranks), tiny_qwen2, folder / "data.jsonl", "group")
    return {ranks: folder / str(ranks) / "logs" for ranks in (1, 2)}


def rows(logs: Path) -> dict[tuple[int, str], dict[str, Any]]:
    (path,) = (logs / "margins").glob("*.jsonl")
    return {(row["step"], row["pair_id"]): row for row in read_jsonl(path)}


@pytest.mark.slow
def test_one_log_holds_the_pairs_of_all_ranks(runs: dict[int, Path]) -> None:
    one, two = rows(runs[1]), rows(runs[2])
    assert len(two) == 40
    assert set(one) == set(two)
    for key, row in two.items():
        assert set(row) == FIELDS
        assert row["margin"] == pytest.approx(one[key]["margin"], abs=1e-4)


@pytest.mark.slow
def test_the_margins_of_a_step_are_those_of_all_ranks(runs: dict[int, Path]) -> None:
    logged: dict[tuple[int, int], list[float]] = {}
    for row in rows(runs[2]).values():
        logged.setdefault((row["epoch"], row["step"]), []).append(row["margin"])
    files = sorted((runs[2] / "margins").glob("epoch_*/step_*.npy"))
    assert [path.parent.name + "/" + path.stem for path in files] == [
        f"epoch_{epoch:03}/step_{step:05}" for epoch, step in sorted(logged)
    ]
    for path, key in zip(files, sorted(logged), strict=True):
        assert np.load(path).tolist() == pytest.approx(logged[key])


@pytest.mark.slow
def test_the_tracker_hears_of_all_pairs_and_each_rank(runs: dict[int, Path]) -> None:
    curves = {ranks: scalars(logs / "tensorboard") for ranks, logs in runs.items()}
    for name in ("margin", "accuracy", "length_accuracy", "length_correlation", "chosen_change", "chosen_logps"):
        assert curves[2][f"train/{name}"] == pytest.approx(curves[1][f"train/{name}"], abs=1e-3), name
    each = [curves[2][f"train/rank{rank}/tokens_per_second"] for rank in (0, 1)]
    assert curves[2]["train/tokens_per_second"] == pytest.approx([sum(pair) for pair in zip(*each, strict=True)])
    highest = [curves[2][f"train/rank{rank}/peak_memory_gb"] for rank in (0, 1)]
    assert curves[2]["train/peak_memory_gb"] == pytest.approx([max(pair) for pair in zip(*highest, strict=True)])
    assert not any("rank" in name for name in curves[1])
    for rank in (0, 1):
        said = [row["tokens_per_second"] for row in read_jsonl(runs[2] / SPEED / f"rank{rank}.jsonl")]
        assert said == pytest.approx(each[rank])


def scalars(folder: Path) -> dict[str, list[float]]:
    """Every curve that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [event.value for event in events.Scalars(tag)]
    return found
