"""Ctrl-C, kill and a closed terminal: a training saves and goes on there, at most one step twice; so does the clock."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pipeline_runs import DEMO, command, environment, prefmill

from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.artifacts import read
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.tiny import save_tiny_qwen2

pytestmark = [pytest.mark.slow, pytest.mark.timing]
STEPS = 1000  # seconds of signals and of looking at steps are a part of the training, however busy the machine


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and chats for many steps."""
    folder = tmp_path_factory.mktemp("given")
    chats = [{"prompt": f"Paper {n}?", "completion": f"It has {n} proofs."} for n in range(4 * STEPS)]
    write_jsonl(folder / "chats.jsonl", chats)
    save_tiny_qwen2(folder / "model")
    return folder


def write_pipeline(given: Path, workspace: Path) -> Path:
    """One training of many steps that by its keys saves at the end alone."""
    keys = {
        "model_name_or_path": str(given / "model"), "dataset": str(given / "chats.jsonl"),
        "max_length": 64, "learning_rate": 1e-3, "precision": "fp32", "num_train_epochs": 1,
        "per_device_train_batch_size": 4, "effective_batch_size": 4, "logging_steps": 20, "save_steps": 500,
        "report_to": [],
    }  # fmt: skip
    path = workspace / "one.yaml"
    stages = {"sft": {"set": keys}}
    path.write_text(yaml.safe_dump({"name": "one", "workspace": str(workspace), "share": False, "stages": stages}))
    return path


@pytest.fixture
def pipeline(given: Path, tmp_path: Path) -> Path:
    return write_pipeline(given, tmp_path)


@pytest.fixture(scope="module")
def calm(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that saves by the clock and is never interrupted leaves: no signal falls in it, so one is enough."""
    workspace = tmp_path_factory.mktemp("calm")
    done = prefmill("run", write_pipeline(given, workspace), "run=calm", "sft.save_minutes=0.00001")
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace / "checkpoints" / "calm" / "sft" / "all"


def executed(workspace: Path, run: str) -> list[int]:
    path = workspace / "logs" / run / "sft" / "all" / EXECUTED
    return [row["step"] for row in read_jsonl(path)] if path.is_file() else []


def start(pipeline: Path, run: str, *more: str, on_sigint: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
    # Tests that run in a script's background are told to ignore Ctrl-C, and so would be what they start.
    return subprocess.Popen(
        command("run", pipeline, f"run={run}", *more), env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: (signal.signal(signal.SIGINT, on_sigint), signal.signal(signal.SIGHUP, signal.SIG_DFL)),
    )  # fmt: skip


def interrupt(pipeline: Path, run: str, number: signal.Signals, at_step: int, *more: str) -> tuple[int, str]:
    """Start the run and send the signal to all of its processes, as a terminal does, after `at_step` steps."""
    started = start(pipeline, run, *more)
    while len(executed(pipeline.parent, run)) < at_step:
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.02)
    if number == signal.SIGTERM:
        started.send_signal(number)
    else:
        os.killpg(started.pid, number)
    if number == signal.SIGHUP:
        time.sleep(0.1)
        os.killpg(started.pid, number)  # by the kernel and by the shell
    printed, _ = started.communicate(timeout=120)
    return started.returncode, printed


def test_the_clock_saves_where_a_loss_is_logged(calm: Path) -> None:
    by_the_clock = sorted(int(path.name.removeprefix("checkpoint-")) for path in calm.glob("checkpoint-*"))
    assert by_the_clock == [STEPS - 20, STEPS]  # two are kept


def test_an_interrupted_training_saves_and_repeats_at_most_one_step(pipeline: Path, calm: Path) -> None:
    for number, further in ((signal.SIGINT, 7), (signal.SIGTERM, 23), (signal.SIGHUP, 23)):
        code, printed = interrupt(pipeline, "cut", number, len(executed(pipeline.parent, "cut")) + further)
        assert code == 130, printed
        assert "sft:all saved and stopped at step" in printed
        status = prefmill("status", "cut", "--workspace", pipeline.parent).stdout
        assert "interrupted" in status
        assert "run again to resume" in status
    done = prefmill("run", pipeline, "run=cut")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = Counter(executed(pipeline.parent, "cut"))
    assert set(steps) == set(range(1, STEPS + 1))
    assert sum(steps.values()) <= STEPS + 3, "three interruptions, one step each"
    assert max(steps.values()) <= 2
    made = [read(folder) for folder in (calm, pipeline.parent / "checkpoints" / "cut" / "sft" / "all")]
    assert made[0].manifest.content_digest == made[1].manifest.content_digest


def test_several_ranks_that_were_interrupted_say_what_is_saved(pipeline: Path) -> None:
    keys = ["stages.sft.processes=2", "sft.per_device_train_batch_size=2"]
    code, printed = interrupt(pipeline, "ranks", signal.SIGINT, 7, *keys)
    assert code == 130, printed
    assert "saved and stopped at step" in printed, printed
    status = prefmill("status", "ranks", "--workspace", pipeline.parent).stdout
    assert "interrupted" in status
    assert "run again to resume" in status


@pytest.mark.parametrize("seed", [1, 2])
def test_ctrl_c_at_random_moments_repeats_at_most_one_step_each(pipeline: Path, seed: int) -> None:
    """While prefmill imports, loads, trains, saves or publishes, as the moment falls."""
    moments, interruptions = random.Random(seed), 0
    for _ in range(2):
        started, at_step = start(pipeline, "cut"), moments.randint(-STEPS // 4, STEPS)
        while len(executed(pipeline.parent, "cut")) < at_step and started.poll() is None:
            time.sleep(0.02)
        try:
            printed, _ = started.communicate(timeout=moments.uniform(1, 3))
            assert started.returncode == 0, printed
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGINT)
            printed, _ = started.communicate(timeout=120)
            assert started.returncode in (0, 130), printed  # it may just have ended
            interruptions += 1
        assert "Traceback" not in printed
    done = prefmill("run", pipeline, "run=cut")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = Counter(executed(pipeline.parent, "cut"))
    assert set(steps) == set(range(1, STEPS + 1))
    assert sum(steps.values()) <= STEPS + interruptions


def test_a_run_that_is_to_ignore_ctrl_c_goes_on(tmp_path: Path) -> None:
    """`prefmill run FILE &` in a script: Ctrl-C reaches the fork server too, which ended."""
    only = ["--only", "ingest_reviews", f"workspace={tmp_path}"]
    started = start(DEMO, "one", *only, on_sigint=signal.SIG_IGN)
    while started.poll() is None:
        os.killpg(started.pid, signal.SIGINT)
        time.sleep(0.02)
    assert started.returncode == 0, started.communicate()[0]
