"""Which elements each sbatch call runs and what it waits for; scripts; what a submission keeps."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import STAGES, UseConfig, toy_plan, use

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.stage import Reads, Stage
from prefmill.pipeline.freeze import check_path, freeze, snapshot
from prefmill.pipeline.plan import PipelineFile, make_plan, plan_task
from prefmill.pipeline.run_record import run_tasks
from prefmill.pipeline.task_status import at_work
from prefmill.pipeline.worker import execute
from prefmill.slurm.cluster import ClusterFile, Resources
from prefmill.slurm.script import array_script, array_spec
from prefmill.slurm.submission import Intent, Submission, claim_folder, submissions
from prefmill.slurm.submit import submit
from prefmill.slurm.task_batches import TaskBatch, dependency, make_batches
from tests.conftest import REPOSITORY

EACH = Stage(
    "each", UseConfig, use, "data", "review_scores", {"numbers": Reads("review_corpus", "make", "elementwise")}
)


@pytest.fixture(autouse=True)
def _each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "each", EACH)


def waits(batches: list[TaskBatch], whole: dict[str, tuple[int, ...]] | None = None) -> list[str]:
    """Every batch's dependency, jobs by the names of their batches."""
    jobs = {**(whole or {}), **{batch.name: batch.indices for batch in batches}}
    return [dependency(batch, jobs, {}) for batch in batches]


def test_elements_wait_for_their_own_and_a_join_for_every_chunk(tmp_path: Path) -> None:
    array = {"array": {"shard": 5}}
    plan = toy_plan(tmp_path, make=array, each=array, use={})
    batches = make_batches(plan, plan.tasks, {}, 3)
    assert [(batch.stage, batch.chunk, batch.indices) for batch in batches] == [
        ("make", 0, (0, 1, 2)), ("make", 1, (0, 1)), ("each", 0, (0, 1, 2)), ("each", 1, (0, 1)), ("use", 0, (0,)),
    ]  # fmt: skip
    made = ["<make.0 ready>", "<make.1 ready>"]
    assert waits(batches) == ["", "", *(f"aftercorr:{name}" for name in made), ",".join(f"afterok:{n}" for n in made)]


def test_no_dependency_on_what_is_complete_and_ready_elements_do_not_wait(tmp_path: Path) -> None:
    array = {"array": {"shard": 4}}
    plan = toy_plan(tmp_path, make=array, each=array)
    todo = [task for task in plan.tasks if task.key not in ("make:shard0", "make:shard2")]
    make, ready, waiting = make_batches(plan, todo, {}, 100)
    assert (make.indices, ready.indices, waiting.indices) == ((1, 3), (0, 2), (1, 3))
    assert waits([make, ready, waiting]) == ["", "", "aftercorr:<make.0 ready>"]


def test_of_a_job_that_is_only_needed_in_part_the_parts_are_named(tmp_path: Path) -> None:
    array = {"array": {"shard": 3}}
    plan = toy_plan(tmp_path, make=array, each=array)
    todo = [task for task in plan.tasks if task.stage.name == "each"]
    live = {"make:shard1": ("41", 1), "make:shard2": ("41", 2)}  # element 0 of job 41 has failed or ended
    ready, waiting = make_batches(plan, todo, live, 100)
    assert waits([ready, waiting], {"41": (0, 1, 2)}) == ["", "afterok:41_1:41_2"]


def test_dependencies_never_leave_out_a_live_parent(tmp_path: Path) -> None:
    """Random states: whatever is live and needed is in the expression, elementwise only where that is right."""
    draw = random.Random(0)
    for _ in range(200):
        count, size = draw.randint(1, 7), draw.randint(1, 4)
        array = {"array": {"shard": count}}
        plan = toy_plan(tmp_path, make=array, each=array, use={})
        done = {task.key for task in plan.tasks if task.stage.name == "make" and draw.random() < 0.4}
        todo = [task for task in plan.tasks if task.key not in done]
        batches = make_batches(plan, todo, {}, size)
        made = {(b.stage, b.chunk * size + i): b.name for b in batches for i in b.indices}
        for batch, text in zip(batches, waits(batches), strict=True):
            if batch.stage == "make":
                assert text == ""
                continue
            if batch.stage == "each":
                needed = {made.get(("make", batch.chunk * size + i)) for i in batch.indices} - {None}
            else:
                needed = {name for (stage, _), name in made.items() if stage == "make"}
            assert all(str(name) in text for name in needed)
            parents = [other for other in batches if f"aftercorr:{other.name}" in text]
            assert all(parent.indices == batch.indices for parent in parents)


@pytest.mark.parametrize(
    ("indices", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([5, 1, 2, 7], "1-2,5,7"), (list(range(1000)), "0-999")]
)
def test_indices_as_slurm_writes_them(indices: list[int], text: str) -> None:
    assert array_spec(indices) == text
    assert array_spec(indices, 4) == f"{text}%4"


def test_a_script_asks_for_what_it_was_given_and_runs_a_command(tmp_path: Path) -> None:
    cluster = validate(ClusterFile, {"account": "acc", "setup": ["module load cuda"], "export": ["HF_HOME"]})
    wanted = Resources(
        partition="gpu",
        nodes=2,
        gpus=8,
        gpu_type="h100",
        cpus=96,
        memory_gb=1.5,
        time_limit_minutes=90,
        options={"constraint": "ib", "reboot": True},
    )
    path = tmp_path / "a b" / "logs" / "r" / "submissions" / "0001" / "arrays" / "sft.0.json"
    text = array_script(cluster, wanted, "r.sft", [0, 1, 3], path, tmp_path / "code")
    for line in (
        "--array=0-1,3", "--account=acc", "--partition=gpu", "--nodes=2", "--gpus-per-node=h100:8",
        "--cpus-per-task=96",
        "--mem=1536M", "--time=90", "--constraint=ib", "--reboot", "--kill-on-invalid-dep=no", "--requeue",
        "--signal=B:USR1@120", "--ntasks-per-node=1", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert f"#SBATCH --output='{tmp_path}/a b/logs/r/sft/slurm/%A_%a.out'" in text
    (export,) = (line for line in text.splitlines() if line.startswith("#SBATCH --export="))
    assert export.endswith(",HF_HOME")
    assert "ALL" not in export.split(",")
    assert "pkl" not in text
    assert text.splitlines()[-1].startswith("exec ")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize("name", ["a:b", "a\\b", "a\nb", "a\x1b"])
def test_paths_that_slurm_or_python_would_misread_are_refused(name: str) -> None:
    with pytest.raises(PipelineError, match="cannot be given this path"):
        check_path(Path("/data") / name)


def test_a_frozen_pipeline_needs_no_file_and_plans_the_same(tmp_path: Path) -> None:
    pipelines = tmp_path / "configs" / "pipelines"
    pipelines.mkdir(parents=True)
    (tmp_path / "configs" / "use").mkdir()
    (tmp_path / "configs" / "use" / "mine.yaml").write_text("factor: 7\n")
    values = {
        "name": "toy", "workspace": str(tmp_path),
        "stages": {"make": {"array": {"shard": 2}}, "use": {"config": "mine", "array": {"modality": ["a", "b"]}}},
    }  # fmt: skip
    pipeline, source = PipelineFile.model_validate(values), pipelines / "toy.yaml"
    plan = make_plan(pipeline, source)
    frozen = validate(PipelineFile, json.loads(json.dumps(freeze(pipeline, plan, source))))
    (tmp_path / "configs" / "use" / "mine.yaml").unlink()
    assert make_plan(frozen, source) == plan
    assert plan_task(frozen, source, "use", "b") == plan.select("use:b")[0]
    with pytest.raises(PipelineError, match="no task 'use:c'"):
        plan_task(frozen, source, "use", "c")


def test_a_snapshot_is_importable_and_knows_its_version(tmp_path: Path) -> None:
    from prefmill.pipeline.state import code_version

    snapshot(tmp_path / "code")
    code = (
        "import prefmill.pipeline.state as s, stages; print(s.__file__, stages.__file__, s.code_version(), sep='\\n')"
    )
    environment = {"PYTHONPATH": f"{tmp_path}/code/lib:{tmp_path}/code", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    library, stages, version = done.stdout.splitlines()
    assert library.startswith(str(tmp_path))
    assert stages.startswith(str(tmp_path))
    assert version == code_version()


def test_the_version_is_that_of_the_code_and_no_repository_around_it(tmp_path: Path) -> None:
    from prefmill.pipeline.state import code_version

    def git(*words: str) -> str:
        given = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(given, check=True, capture_output=True, text=True).stdout

    # As in a project's own environment, site-packages below its repository.
    library = tmp_path / ".venv" / "lib" / "python3" / "site-packages"
    shutil.copytree(REPOSITORY / "lib" / "prefmill", library / "prefmill")
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "a project")
    code = "import prefmill.pipeline.state as s; print(s.__file__, s.code_version(), sep='\\n')"

    def version(path: Path, **more: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(path), **more}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        file, found = done.stdout.splitlines()
        assert file.startswith(str(path))
        return found

    assert version(library) == "0.1.0"
    # A checkout that belongs to somebody else, which git refuses to describe unless told otherwise.
    found = version(REPOSITORY / "lib", GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    code_version.cache_clear()  # an earlier test may have asked where there was no git
    assert found == code_version()
    assert (found == "0.1.0") is not (REPOSITORY / ".git").exists()


def test_two_that_ask_at_once_get_a_number_each(tmp_path: Path) -> None:
    assert [claim_folder(tmp_path, "r")[0] for _ in range(3)] == [1, 2, 3]
    assert submissions(tmp_path, "r") == []  # none has been written: nothing was submitted


def test_more_nodes_are_refused_where_nothing_trains(tmp_path: Path) -> None:
    pipeline = PipelineFile.model_validate(
        {"name": "toy", "workspace": str(tmp_path), "stages": {"make": {"resources": {"nodes": 2}}}}
    )
    plan = make_plan(pipeline, tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot use more than one node"):
        submit(pipeline, plan, tmp_path / "x.yaml", validate(ClusterFile, {}), dry_run=True, say=lambda _: None)
    assert not (tmp_path / "logs").exists()


def test_nothing_is_submitted_beside_a_local_run(tmp_path: Path) -> None:
    """Its jobs held their nodes, and failed as their tasks were taken."""
    pipeline = PipelineFile.model_validate({"name": "toy", "workspace": str(tmp_path), "stages": {"make": {}}})
    plan = make_plan(pipeline, tmp_path / "x.yaml")
    (tmp_path / "logs" / "toy").mkdir(parents=True)
    with at_work(tmp_path, "toy"), pytest.raises(PipelineError, match="is at work on this run"):
        submit(pipeline, plan, tmp_path / "x.yaml", validate(ClusterFile, {}), say=lambda _: None)


def test_a_run_that_takes_all_from_others_is_there(tmp_path: Path) -> None:
    """`status`, `runs` and `rm` found none of that name."""
    values = {"name": "toy", "workspace": str(tmp_path), "stages": {"make": {}}}
    runs = [PipelineFile.model_validate({**values, "run": run}) for run in ("first", "second")]
    first, second = (make_plan(run, tmp_path / "x.yaml") for run in runs)
    execute(first.tasks[0])
    submit(runs[1], second, tmp_path / "x.yaml", validate(ClusterFile, {}), say=lambda _: None)
    assert [task["key"] for task in run_tasks(tmp_path, "latest")] == ["make:all"]
    assert (tmp_path / "logs" / "latest").resolve().name == "second"


def test_a_torn_line_costs_no_other_job(tmp_path: Path) -> None:
    number, folder = claim_folder(tmp_path, "r")
    submission = Submission(folder, number, "r", tmp_path, {}, "", {}, "")
    submission.record_job(Intent("array", "make", 0, (0, 1), "", 0.0, "r.make.1"), "1")
    with (folder / "jobs.jsonl").open("a") as stream:
        stream.write('{"kind": "arr')
    submission.record_job(Intent("array", "use", 0, (0,), "afterok:1", 0.0, "r.use.2"), "2")
    assert [(job.job_id, job.indices) for job in submission.jobs()] == [("1", (0, 1)), ("2", (0,))]
