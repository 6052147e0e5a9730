"""The review pipeline as one: what runs again and why, SIGKILL anywhere, full and read-only disks, real reviews."""

from __future__ import annotations

import gzip
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pipeline_runs import DEMO, REPOSITORY, SMALL, command, digests, environment, executed, prefmill, ran, run

from prefmill.core.places import MANIFEST
from prefmill.pipeline.task_status import is_running

SAVE_STEPS = {"tiny_model": 10, "sft": 3, "dpo": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace with a small pipeline that nothing disturbed, and what that run printed."""
    workspace = tmp_path_factory.mktemp("finished")
    return workspace, run(workspace, *SMALL)


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished workspace, to disturb."""
    return Path(shutil.copytree(finished[0], tmp_path / "workspace", symlinks=True))


@pytest.mark.slow
def test_it_ends_with_the_conclusion_and_the_reports_path(finished: tuple[Path, str]) -> None:
    workspace, printed = finished
    *_, conclusion, path = printed.splitlines()
    assert conclusion.startswith("[clean] ")
    assert path == str(workspace / "data" / "demo" / "report" / "all" / "report.html")
    assert "<html" in Path(path).read_text()
    assert len(digests(workspace)) == 14
    for root in ("data", "checkpoints", "logs"):
        assert (workspace / root / "latest").readlink() == Path("demo")


@pytest.mark.slow
def test_a_second_run_does_nothing_and_says_why(finished: tuple[Path, str]) -> None:
    workspace, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob(MANIFEST)}
    printed = run(workspace, *SMALL)
    assert ran(printed) == set()
    assert printed.count("up to date: content ") == 14
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob(MANIFEST)} == before


@pytest.mark.slow
def test_a_touched_key_reruns_exactly_what_depends_on_it(copied: Path) -> None:
    before = digests(copied)
    touched = [*SMALL, "sft.learning_rate=1e-3"]
    why = prefmill("why", DEMO, "sft", f"workspace={copied}", *touched).stdout
    assert "sft:clean: stale" in why
    assert "learning_rate was 0.0003, is 0.001" in why
    later = prefmill("why", DEMO, "report", f"workspace={copied}", *touched).stdout
    assert "learning_rate was 0.0003, is 0.001" in later
    assert ran(run(copied, *touched)) == {
        "sft:clean", "dpo:clean", "evaluate:sft-clean", "evaluate:dpo-clean", "report:all",
    }  # fmt: skip
    after = digests(copied)
    changed = {key for key in before if before[key] != after[key]}
    assert {"sft/clean", "dpo/clean"} <= changed <= {
        "sft/clean", "dpo/clean", "evaluate/sft-clean", "evaluate/dpo-clean", "report/all",
    }  # fmt: skip


def progress(workspace: Path) -> int:
    """How far a run is, whatever the machine's speed: finished tasks and distinct optimizer steps taken."""
    return len(digests(workspace)) + sum(len(set(steps)) for steps in executed(workspace).values())


@pytest.mark.timing
@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_content(finished: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL of the whole process tree at five points of the run drawn beforehand, wherever they fall."""
    draw = random.Random(20)
    kills = sorted(draw.sample(range(1, progress(finished[0])), k=5))
    for point in kills:
        process = subprocess.Popen(
            command("run", DEMO, f"workspace={tmp_path}", *SMALL), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment(), start_new_session=True,
        )  # fmt: skip
        while progress(tmp_path) < point:
            assert process.poll() is None, f"it ended before point {point} of {kills}"
            time.sleep(0.005)
        time.sleep(draw.random() / 5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(tmp_path, *SMALL)
    assert digests(tmp_path) == digests(finished[0])
    for stage, steps in executed(tmp_path).items():
        undisturbed = executed(finished[0])[stage]
        assert set(steps) == set(undisturbed)
        assert len(steps) - len(undisturbed) <= len(kills) * SAVE_STEPS[stage]


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tiny_model", "sft", "dpo"])
def test_killed_in_training_it_repeats_at_most_one_save_interval(
    stage: str, finished: tuple[Path, str], copied: Path
) -> None:
    """SIGKILL of one training in its middle, the rest of the pipeline standing."""
    shutil.rmtree(next((copied / "checkpoints" / "demo" / stage).iterdir()))
    for logs in (copied / "logs" / "demo" / stage).glob("*/"):
        shutil.rmtree(logs)
    process = subprocess.Popen(
        command("run", DEMO, f"workspace={copied}", *SMALL), env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(executed(copied).get(stage, [])) < SAVE_STEPS[stage] + 2:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(copied, *SMALL)
    assert digests(copied) == digests(finished[0])
    undisturbed = executed(finished[0])[stage]
    steps = executed(copied)[stage]
    assert sorted(set(steps)) == undisturbed
    assert len(steps) - len(undisturbed) <= SAVE_STEPS[stage]


@pytest.mark.timing
@pytest.mark.slow
def test_no_task_outlives_the_command(tmp_path: Path) -> None:
    """SIGKILL of the command alone; its task must not go on and hold the lock."""
    many = SMALL[0].replace("150", "40000")
    words = command("run", DEMO, "--only", "ingest_reviews", f"workspace={tmp_path}", many)
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)
    logs = tmp_path / "logs/demo/ingest_reviews/all"
    deadline = time.monotonic() + 120
    while not is_running(logs):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    while is_running(logs):
        assert time.monotonic() < deadline, "its task goes on"
        time.sleep(0.01)
    assert not (tmp_path / "data/demo/ingest_reviews/all" / MANIFEST).exists()


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount file systems nobody else sees, as root or as an ordinary user."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return subprocess.run(
        ["unshare", *user, "--mount", "bash", "-euc", script], capture_output=True, text=True, env=environment()
    )


ONLY_INGEST = " ".join(
    f"'{word}'" for word in command("run", DEMO, "--only", "ingest_reviews", SMALL[0].replace("150", "3000"))
)


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_room_lets_it_finish(tmp_path: Path) -> None:
    disk, published = tmp_path / "disk", tmp_path / "disk/data/demo/ingest_reviews/all/manifest.json"
    disk.mkdir()
    done = in_namespace(f"""
        mount -t tmpfs -o size=1m none '{disk}'
        set +e
        {ONLY_INGEST} 'workspace={disk}'; echo "first exit code: $?"
        test -e '{published}' && echo 'published too early'
        mount -o remount,size=200m '{disk}'
        {ONLY_INGEST} 'workspace={disk}'; echo "second exit code: $?"
        test -e '{published}' && echo 'finished'
    """)
    assert "first exit code: 2" in done.stdout, done.stdout + done.stderr
    assert "No space left" in done.stdout
    assert "published too early" not in done.stdout
    assert "second exit code: 0" in done.stdout, done.stdout + done.stderr
    assert "finished" in done.stdout


@pytest.mark.slow
def test_a_read_only_output_is_an_error(tmp_path: Path) -> None:
    done = in_namespace(f"""
        mount -t tmpfs -o ro none '{tmp_path}'
        {ONLY_INGEST} 'workspace={tmp_path}'
    """)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "read-only" in done.stderr.lower()
    assert str(tmp_path) in done.stderr


@pytest.mark.slow
def test_real_reviews_go_all_the_way(reviews_file: Path, tmp_path: Path) -> None:
    """A slice of the real ICLR reviews as by `make demo REVIEWS=FILE`, then the same with MODEL=FOLDER."""
    sample = tmp_path / "slice.jsonl.gz"
    with gzip.open(reviews_file, "rt") as whole, gzip.open(sample, "wt") as part:
        part.writelines(itertools.islice(whole, 800))
    workspace, pipelines = tmp_path / "workspace", REPOSITORY / "configs" / "pipelines"
    keys = [
        f'ingest_reviews.sources=[{{format: jsonl, path: "{sample}"}}]',
        "evaluate.num_papers=10", "evaluate.max_new_tokens=64", "report.num_resamples=1000",
    ]  # fmt: skip
    tiny = ("tiny_model.vocab_size=2048", "tiny_model.max_length=640", SMALL[1])
    printed = run(workspace, *keys, *tiny, pipeline=pipelines / "demo_reviews.yaml")
    assert printed.splitlines()[-1].endswith("report.html")
    assert len(digests(tmp_path / "workspace")) == 13
    assert all(len(steps) > 1 for steps in executed(tmp_path / "workspace").values())
    model = Path(shutil.copytree(workspace / "checkpoints" / "demo_reviews" / "tiny_model" / "all", tmp_path / "model"))
    own = [f"{stage}.model_name_or_path={model}" for stage in ("sft", "evaluate")]
    more = "build_datasets.sft_top_fraction=0.2"  # a twentieth of the slice has no short row to validate on
    printed = run(workspace, *keys, *own, more, pipeline=pipelines / "demo_model.yaml")
    assert printed.splitlines()[-1].endswith("report.html")
    assert (workspace / "checkpoints" / "demo_model" / "dpo" / "clean" / "adapter" / "adapter_config.json").is_file()
