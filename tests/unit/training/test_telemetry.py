"""What training says of itself: the alarm for unlearnt answers, the audit of lengths, speed and memory of each rank."""

from __future__ import annotations

import random
from operator import and_, ne
from pathlib import Path

import pytest
import torch

from prefmill.core.files import append_row
from prefmill.core.statistics import correlation
from prefmill.pairs.forensics import read_histories
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.objectives import PairScores, Settings, mix
from prefmill.training.telemetry import ALARMS, CHOSEN_DROP, LOG, SPEED, Speed, Telemetry, f1_by_coin

SETTINGS = Settings(0.1)
SIGMOID = mix(["sigmoid"], [1.0], SETTINGS)


def scores(change: float, lengths: tuple[list[float], list[float]] = ([10.0, 20.0], [20.0, 10.0])) -> PairScores:
    """Two pairs whose chosen side became likelier by `change` nats per token."""
    chosen_length, rejected_length = map(torch.tensor, lengths)
    reference = torch.tensor([-30.0, -60.0])
    return PairScores(
        reference + change * chosen_length, reference, chosen_length, rejected_length, reference, reference
    )


@pytest.mark.parametrize(("change", "alarms"), [(-1.1 * CHOSEN_DROP, 1), (-0.9 * CHOSEN_DROP, 0), (2.0, 0)])
def test_the_alarm_is_for_chosen_answers_that_become_unlikely(tmp_path: Path, change: float, alarms: int) -> None:
    telemetry = Telemetry(tmp_path, 0)
    telemetry.add(["a", "b"], scores(change), SIGMOID, SETTINGS)
    telemetry.step(7, 0)
    assert telemetry.means()["chosen_change"] == pytest.approx(change, abs=1e-6)
    rows = list(read_jsonl(tmp_path / ALARMS)) if (tmp_path / ALARMS).is_file() else []
    assert [row["step"] for row in rows] == [7] * alarms
    assert telemetry.means() == {}


def test_a_row_that_a_kill_has_torn_spoils_no_other(tmp_path: Path) -> None:
    """Resumed, the training wrote on behind it: the report, and `prefmill pairs`, then refused the whole log."""
    for step in (1, 2):
        telemetry = Telemetry(tmp_path, 0)
        telemetry.add(["a", "b"], scores(0.5), SIGMOID, SETTINGS)
        telemetry.step(step, 0)
        log = tmp_path / "margins" / LOG
        if step == 1:
            log.write_bytes(log.read_bytes()[:-20])
    histories = read_histories([log])
    assert {name: [seen.step for seen in found.sightings] for name, found in histories.items()} == {
        "a": [1, 2], "b": [2],
    }  # fmt: skip
    append_row(tmp_path / STEPS, {"step": 1, "loss": 0.7})
    with (tmp_path / STEPS).open("a") as stream:
        stream.write('{"step": 2, "lo')
    append_row(tmp_path / STEPS, {"step": 2, "loss": 0.5})
    assert [row["loss"] for row in read_curve(tmp_path / STEPS)] == [0.7, 0.5]


def test_margins_that_follow_lengths_show(tmp_path: Path) -> None:
    """A change of equal nats per token makes the margin larger for the longer chosen side: correlation 1."""
    telemetry = Telemetry(tmp_path, 0)
    telemetry.add(["a", "b"], scores(0.5), SIGMOID, SETTINGS)
    telemetry.step(1, 0)
    assert telemetry.means()["length_correlation"] == pytest.approx(1.0)
    assert correlation([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0
    assert correlation([1.0, 2.0, 4.0], [3.0, 2.0, 0.0]) == pytest.approx(-1.0)


def test_every_rank_writes_its_speed_and_memory(tmp_path: Path) -> None:
    speed = Speed(tmp_path, 3)
    speed.add(1000)
    first = speed.window(1)
    second = speed.window(2)
    assert first["tokens_per_second"] > 0
    assert second["tokens_per_second"] == 0
    assert 0.05 < first["peak_memory_gb"] < 64
    rows = list(read_jsonl(tmp_path / SPEED / "rank3.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["tokens_per_second"] == first["tokens_per_second"]


def test_f1_of_a_guess_is_a_half_and_that_of_a_right_answer_1() -> None:
    names = [f"pair{number}" for number in range(400)]
    first = [random.Random(name).random() < 0.5 for name in names]
    wins = [float(random.Random(-number).random() < 0.8) for number in range(400)]
    says = [is_first == (win == 1) for is_first, win in zip(first, wins, strict=True)]
    hits = sum(map(and_, first, says))
    assert f1_by_coin(wins, names) == pytest.approx(2 * hits / (2 * hits + sum(map(ne, first, says))))
    assert f1_by_coin([0.5] * 400, names) == pytest.approx(0.5, abs=0.05)
    assert f1_by_coin([1.0] * 400, names) == 1.0
    assert f1_by_coin([], []) == 0.5
