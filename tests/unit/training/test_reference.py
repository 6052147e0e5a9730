"""Reference scores survive a kill and a warning: no group is scored twice but those in flight and the spot check."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefmill.core.errors import DivergedError
from prefmill.core.files import append_row
from prefmill.core.graceful_stop import Stopped, clear_request, request_stop
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl
from prefmill.store.kept_tensors import KeptTensors
from prefmill.training.data import Group
from prefmill.training.reference import GroupScoring, kept_reference, reference_scores, weights_of
from tests.forked_ranks import end_codes, run_ranks, start_ranks

NUM_GROUPS = 90
GROUPS = [Group([n], [[n] * (1 + n % 7), [n]], []) for n in range(NUM_GROUPS)]
EXPECTED = [[float(sum(response)) for response in group.responses] for group in GROUPS]


def task_in(folder: Path) -> Task:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return Task("r", "dpo", "all", {}, {}, {}, folder / "out", folder / "logs")


def score_all(folder: Path, seconds: float = 0.0, stop_after: int | None = None, off: float = 0.0) -> list[Tensor]:
    """Score GROUPS with a reference that notes what it is asked; `off` is added to its scores."""
    if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    task = task_in(folder)
    notes = folder / f"scored-{os.environ.get('RANK', 0)}.jsonl"

    def score(group: Group) -> Tensor:
        append_row(notes, {"group": group.prompt[0]})
        time.sleep(seconds)
        if stop_after is not None and len(scored(folder)) >= stop_after:
            request_stop(task.logs, 10.0)
        return torch.tensor([float(sum(response)) for response in group.responses]) + off

    scoring = GroupScoring(
        content=lambda group: [group.prompt, group.responses],
        batches=lambda group: [group],
        score=score,
        join=lambda _, scores: scores[0],
    )
    kept = kept_reference(task, "weights", {}, torch.device("cpu"))
    return reference_scores(GROUPS, scoring, kept, task, "fp32")


def scored(folder: Path) -> list[int]:
    """Every group scored so far, on any rank, repeats included."""
    return [row["group"] for path in folder.glob("scored-*.jsonl") for row in read_jsonl(path)]


def check(folder: Path) -> None:
    """A rank that gets what the scores are."""
    assert [scores.tolist() for scores in score_all(folder)] == EXPECTED


def stopped(folder: Path) -> None:
    """A rank that stops when it is asked to."""
    with pytest.raises(Stopped, match=f"of {NUM_GROUPS} reference groups"):
        score_all(folder, stop_after=9)


def kept_in(folder: Path) -> int:
    """How many groups' scores are kept."""
    return len(kept_reference(task_in(folder), "weights", {}, torch.device("cpu")).read())


def test_scores_that_are_no_numbers_end_it_and_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="the reference's scores are not numbers"):
        score_all(tmp_path, off=float("nan"))
    assert kept_in(tmp_path) == 0


@pytest.mark.timing
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_at_random_no_group_is_scored_twice_but_those_in_flight(num_ranks: int, tmp_path: Path) -> None:
    dice = random.Random(num_ranks)
    for attempt in range(4):
        kept, before = kept_in(tmp_path), scored(tmp_path)
        children = start_ranks(num_ranks, score_all if attempt < 3 else check, tmp_path, *[0.02][: attempt < 3])
        deadline = time.monotonic() + 30
        while attempt < 3 and len(scored(tmp_path)) < len(before) + 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(dice.uniform(0.0, 0.1))
        for child in children if attempt < 3 else []:
            os.kill(child.pid, signal.SIGKILL)
        assert end_codes(children) == [-signal.SIGKILL if attempt < 3 else 0] * num_ranks
        checks = num_ranks if kept else 0  # every rank looks at one group that was kept
        new = len(scored(tmp_path)) - len(before) - checks
        assert 0 <= new - (kept_in(tmp_path) - kept) <= num_ranks, "more was lost than what was in flight"
    assert Counter(scored(tmp_path)).keys() == set(range(NUM_GROUPS))
    assert kept_in(tmp_path) == NUM_GROUPS


@pytest.mark.timing
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_asked_to_stop_all_ranks_do_after_the_round_and_go_on_later(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, stopped, tmp_path)
    assert 9 <= len(scored(tmp_path)) <= 9 + num_ranks
    clear_request(task_in(tmp_path).logs)
    run_ranks(num_ranks, check, tmp_path)
    assert len(scored(tmp_path)) == NUM_GROUPS + num_ranks  # each rank looks at one group that was kept


def test_another_reference_is_a_miss_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    score_all(tmp_path, off=1.0)
    check(tmp_path)
    assert "differ from this reference by 1 nats, more than 0.0001: all 90 are computed again" in caplog.text
    assert len(scored(tmp_path)) == 2 * NUM_GROUPS + 1
    check(tmp_path)
    assert len(scored(tmp_path)) == 2 * NUM_GROUPS + 2


def test_rounding_keeps_the_cache_and_another_kind_of_device_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_all(tmp_path, off=1e-5)
    score_all(tmp_path)
    assert len(scored(tmp_path)) == NUM_GROUPS + 1
    task, gpu = task_in(tmp_path), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert kept_reference(task, "weights", {}, gpu).read() == {}
    assert len(kept_reference(task, "weights", {}, torch.device("cpu")).read()) == NUM_GROUPS
    assert isinstance(kept_reference(task, "others", {}, gpu), KeptTensors)


@pytest.mark.parametrize("name", ["me/mine", "mine"])
def test_scores_are_of_a_commit_wherever_its_branch_moves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    branch = tmp_path / f"models--{name.replace('/', '--')}" / "refs" / "main"
    branch.parent.mkdir(parents=True)
    found = []
    for commit in ("c" * 40, "d" * 40):
        branch.write_text(commit)
        found.append(weights_of(name, None))
    assert found == [weights_of(name, "c" * 40), weights_of(name, "d" * 40)]
    assert found[0] != found[1]
