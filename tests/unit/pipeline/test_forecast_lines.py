"""Hours ahead of time: a line through slices, a stated throughput, and slices that are whole groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toys import toy_plan

from prefmill.core.config import load
from prefmill.core.errors import ConfigError
from prefmill.core.stage import load_stage
from prefmill.pipeline.plan import PlannedTask
from prefmill.slurm import forecast as slices
from prefmill.slurm.cluster import ClusterFile, Resources, read_cluster
from prefmill.slurm.forecast import Timed, _lines, rows_of, seconds_for, stated
from prefmill.store.artifacts import publish, read
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.conftest import REPOSITORY


def test_a_forecast_is_a_start_and_so_much_for_each_row() -> None:
    # 10 s to start and 0.5 s a row; the first slice, which found cold disks, does not count.
    times = [Timed(4, 90.0), Timed(16, 18.0), Timed(64, 42.0)]
    assert seconds_for(times, 1000) == pytest.approx(510)
    assert seconds_for([Timed(16, 18.0)], 16) == 18  # every row was in the slice
    assert seconds_for([Timed(16, 20.0), Timed(64, 18.0)], 1000) == 18  # noise alone: never less than was seen


def task_of(stage: str, folder: Path, pairs: int, **keys: object) -> PlannedTask:
    found = load_stage(stage)
    config = found.config.model_validate({"model_name_or_path": "m", "learning_rate": 1e-5, **keys})
    rows = [{"id": str(n), "group": f"g{n // 3}", "images": [f"images/{n}.png"]} for n in range(pairs)]
    write_jsonl(folder / "dpo_clean_train" / "data.jsonl", rows)
    write_jsonl(folder / "dpo_clean_val" / "data.jsonl", rows[: pairs // 4])
    (folder / "images").mkdir()
    for row in rows:
        (folder / row["images"][0]).write_text(row["id"])
    origin = slices.Provenance("build_datasets", "all", "f", {}, {}, "v", {})
    publish(folder, "preference_datasets", origin, {})
    return PlannedTask("r", found, "clean", {}, {}, config, {"datasets": (folder,)}, folder / "o", folder / "l")


def test_one_of_eight_reviews_may_fail_where_few_of_all_may() -> None:
    """With a share of 5 % that is allowed, a review that is too long ended the measurement."""
    found = load_stage("score_reviews")
    shares = []
    for share in (0, 0.05, 0.9):
        config = found.config.model_validate({"engine": {"engine": "lexical"}, "max_failed_share": share, "limit": 90})
        task = PlannedTask("r", found, "all", {}, {}, config, {}, Path("o"), Path("l"))
        small = slices._slice(task, 8, Path("scratch")).config
        assert isinstance(small, found.config)
        shares.append((small.limit, small.max_failed_share))
    assert shares == [(8, 0), (8, 0.5), (8, 0.9)]


def test_a_slice_of_reviews_is_whole_papers_from_all_of_the_corpus(tmp_path: Path) -> None:
    """The first by id were taken: a corpus whose long reviews come last was forecast far too short."""
    found = load_stage("score_reviews")
    papers = [{"paper_id": f"p{n:03d}"} for n in range(200)]
    write_jsonl(tmp_path / "c" / "papers.jsonl", papers)
    write_jsonl(tmp_path / "c" / "reviews.jsonl", [{**paper, "review_id": i} for paper in papers for i in range(3)])
    publish(tmp_path / "c", "review_corpus", slices.Provenance("ingest_reviews", "all", "f", {}, {}, "v", {}), {})
    config = found.config.model_validate({"engine": {"engine": "lexical"}})
    inputs = {"corpus": (tmp_path / "c",)}
    task = PlannedTask("r", found, "all", {}, {"shard": 2}, config, inputs, Path("o"), Path("l"))
    small = slices._slice(task, 30, tmp_path / "scratch")
    (folder,) = small.inputs["corpus"]
    reviews, drawn = (
        list(read_jsonl(read(folder, "review_corpus").file(f"{name}.jsonl"))) for name in ("reviews", "papers")
    )
    assert (rows_of(small), len(reviews)) == (30, 60)  # as many for each of the shards
    assert [review["paper_id"] for review in reviews] == [paper["paper_id"] for paper in drawn for _ in range(3)]
    assert drawn[-1]["paper_id"] > "p100" > drawn[0]["paper_id"]


def test_where_nothing_can_be_measured_it_says_so(tmp_path: Path) -> None:
    told: list[str] = []
    slices.forecast(toy_plan(tmp_path), {}, told.append, only="make")
    assert told == ["nothing to measure: slices are of score_reviews and of trainings on chats or pairs of texts"]


@pytest.mark.parametrize("stage", ["dpo", "mdlm_dpo"])
def test_a_slice_is_whole_groups_from_all_of_the_file_with_their_images(stage: str, tmp_path: Path) -> None:
    task = task_of(stage, tmp_path / "made", pairs=300)
    assert rows_of(task) == 300
    small = slices._slice(task, 30, tmp_path / "scratch")
    (folder,) = small.inputs["datasets"]
    assert read(folder, "preference_datasets").manifest.stage == "build_datasets"
    train = list(read_jsonl(folder / "dpo_clean_train" / "data.jsonl"))
    assert len(train) == rows_of(small) == 30
    groups = {row["group"] for row in train}
    assert all(sum(row["group"] == name for row in train) == 3 for name in groups)
    numbers = [int(row["id"]) for row in train]
    assert numbers == sorted(numbers)
    assert max(numbers) > 150  # not the first rows of the file
    assert (folder / train[0]["images"][0]).read_text() == train[0]["id"]
    val = list(read_jsonl(folder / "dpo_clean_val" / "data.jsonl"))
    assert 7 <= len(val) <= 9  # a tenth of 75, in whole groups
    assert small.output.is_relative_to(tmp_path / "scratch")
    assert small.logs.is_relative_to(tmp_path / "scratch")
    assert small.config == task.config


def test_slices_grow_until_rows_weigh_more_than_the_start() -> None:
    assert not slices._enough([Timed(8, 10.0)], 1000)
    assert not slices._enough([Timed(8, 10.0), Timed(32, 11.0)], 1000)
    assert slices._enough([Timed(8, 10.0), Timed(32, 11.0), Timed(128, 23.0)], 1000)
    assert slices._enough([Timed(8, 10.0)], 8)
    assert slices._enough([Timed(8, 10.0), Timed(8, 10.0)], None)  # a dataset of the user's ends there
    assert slices._enough([Timed(8, 200.0), Timed(32, 210.0)], 1000)  # long enough


def test_no_rate_is_made_up_where_more_rows_took_no_longer(tmp_path: Path) -> None:
    task = task_of("dpo", tmp_path / "made", pairs=300, num_train_epochs=1)
    quick = list(_lines(task, [Timed(16, 0.42), Timed(64, 0.4)], None))
    assert quick == [
        "dpo:clean: no rate, as more rows took no longer; measured: 16 rows in 0.4 s and 64 rows in 0.4 s",
        "  at least 0.4 s here for 300 rows",
    ]
    slow = list(_lines(task, [Timed(16, 20.0), Timed(64, 116.0)], None))
    assert slow[0].startswith("dpo:clean: 0.5 rows per second on each of ")
    assert slow[1] == "  about 10 min here for 300 rows"
    assert list(_lines(task, [Timed(64, 1.5), Timed(300, 1.4)], None))[1] == "  about 1.4 s here for 300 rows"


def test_a_busy_machine_is_told(tmp_path: Path) -> None:
    task = task_of("dpo", tmp_path / "made", pairs=300, num_train_epochs=1)
    idle, cores = 0.02, float(os.cpu_count() or 1)
    assert "busy" not in "".join(_lines(task, [Timed(16, 20.0, idle), Timed(64, 116.0, idle)], None))
    told = list(_lines(task, [Timed(16, 20.0, idle), Timed(64, 116.0, cores)], None))[1]
    assert told.startswith(f"  the machine was busy: other programs used {cores:.1f} of its {os.cpu_count()} cores")


def test_cores_of_others_are_those_that_work_while_we_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert slices.cores_of_others() > 0.2  # of the one that it would have on an idle machine
    finally:
        spinning.kill()
        spinning.wait()
    monkeypatch.setattr(slices, "_MACHINE", tmp_path / "none")
    monkeypatch.setattr(slices, "_LOOK_SECONDS", 0.001)
    assert slices.cores_of_others() == 0


def test_a_sites_throughput_becomes_hours(tmp_path: Path) -> None:
    task = task_of("dpo", tmp_path / "made", pairs=300, num_train_epochs=2)
    (line,) = stated(task, Resources(nodes=2, gpus=4), {"dpo": 0.01}, "h100")
    assert line.startswith("  about 2.1 h a task: 300 rows x 2 epochs at 0.01 per second on each of 8")  # 600/0.01/8 s
    assert list(stated(task, Resources(), {"sft": 1.0}, "h100")) == []
    path = tmp_path / "cluster.yaml"
    path.write_text("throughput: {h100: {dpo: 0}}")
    with pytest.raises(ConfigError, match="greater than 0"):
        load(ClusterFile, path)
    path.write_text("throughput: {h100: {dpp: 1}}")
    with pytest.raises(ConfigError, match="dpp"):
        read_cluster(path)


def test_without_measuring_torch_is_not_imported(tmp_path: Path) -> None:
    files = [str(REPOSITORY / "configs" / name) for name in ("pipelines/demo.yaml", "clusters/test.yaml")]
    words = ["estimate", files[0], "--cluster", files[1], f"workspace={tmp_path}"]
    code = f"import sys; from prefmill.cli.main import main; main({words!r}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "steps: not known before its dataset is made" in done.stdout
