"""The scripts of sbatch/, submitted by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefmill.slurm.cluster import SIGNAL_SECONDS
from tests.conftest import REPOSITORY
from tests.slurm.conftest import Site
from tests.slurm.test_job import go_on, rows, warn
from tests.slurm.test_submit import digests

SCRIPTS = sorted((REPOSITORY / "sbatch").glob("*.sbatch"))
MODALITIES = ("clean", "clean_images", "vision")


def sbatch(site: Site, *arguments: str) -> str:
    """Submit by hand, from the checkout; returns the job's id."""
    done = site.run(["sbatch", "--parsable", *arguments, f"workspace={site.workspace}"], PREFMILL_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split(";")[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_thin_and_type_no_number_of_their_own(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 20
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert f"#SBATCH --signal=B:USR1@{SIGNAL_SECONDS}" in options  # the one number, as in a cluster file
    assert [line for line in options if re.search(r"(gpus|cpus|time|nodes|partition)", line)] == []


def test_scripts_pass_shellcheck() -> None:
    files = [str(path) for path in [*SCRIPTS, REPOSITORY / "sbatch" / "_env.sh"]]
    done = subprocess.run(
        [".venv/bin/shellcheck", "-x", *files], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_an_array_over_the_modalities(site: Site) -> None:
    config = site.checkout / "sft.yaml"
    config.write_text("steps: 3\n")
    sbatch(site, "--array=0-2", "sbatch/sft.sbatch", str(config), "run=hand")
    site.wait()
    assert sorted(digests(site.workspace, "hand")) == [f"sft:{name}" for name in MODALITIES], site.logs()
    printed = [path.read_text() for path in site.checkout.glob("slurm-*_*.out")]
    assert len(printed) == 3
    assert all(f"see {site.workspace}/logs/hand/sft/" in text for text in printed)
    job = sbatch(site, "sbatch/sft.sbatch", str(config), "run=one", "array.modality=[clean]")
    site.wait()
    # `%a` of a job that is no array is 4294967294: the names are Slurm's own.
    assert f"see {site.workspace}/logs/one/sft/" in (site.checkout / f"slurm-{job}.out").read_text()


@pytest.mark.slow
def test_an_array_called_from_another_folder_finds_its_checkout(site: Site, tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    script, keys = site.checkout / "sbatch/sft.sbatch", f"steps=3 run=far workspace={site.workspace}"
    call = f"cd {elsewhere} && sbatch --parsable --array=0-2 {script} {keys}"
    done = site.run(["bash", "-c", call], PREFMILL_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    site.wait()
    printed = "".join(path.read_text() for path in elsewhere.glob("slurm-*_*.out"))
    assert sorted(digests(site.workspace, "far")) == [f"sft:{name}" for name in MODALITIES], printed + site.logs()


@pytest.mark.slow
def test_a_warning_requeues_one_element_of_a_hand_made_array(site: Site) -> None:
    keys = ["run=hand", "steps=20", "step_seconds=0.5", "array.modality=[clean,vision]"]
    job = sbatch(site, "--array=0-1", "sbatch/sft.sbatch", *keys)
    logs = site.workspace / "logs/hand/sft"
    executed = logs / "vision/executed_steps.jsonl"
    site.wait(lambda: len(rows(executed)) > 2)
    warn(site, f"{job}_1")
    go_on(site, f"{job}_1")
    site.wait()
    assert [row["outcome"] for row in rows(logs / "vision/attempts.jsonl")] == ["requeued", "complete"], site.logs()
    assert [row["outcome"] for row in rows(logs / "clean/attempts.jsonl")] == ["complete"]
    assert [row["step"] for row in rows(executed)] == list(range(1, 21))


INSIDE = """#!/bin/bash
sbatch --parsable sbatch/sft.sbatch steps=20 step_seconds=0.5 run=inner 'array.modality=[clean]' workspace={work} > id
{prefmill} submit {pipeline} run=wide {keys} --cluster configs/clusters/test.yaml \\
    'stages.train.resources={{nodes: 2, processes: 2}}'
{prefmill} run {pipeline} run=local {keys} --jobs 2 stages.train.processes=2 'stages.train.array={{shard: 2}}'
sleep 100
"""


@pytest.mark.slow
def test_a_job_that_an_arrays_element_submits_is_itself(site: Site) -> None:
    """sbatch hands on which element the submitting job is, and its memory; a run in it stays on its node."""
    pipeline, keys = "configs/pipelines/train.yaml", f"train.meet=true workspace={site.workspace}"
    prefmill = f"{sys.executable} -m prefmill.cli.main"
    text = INSIDE.format(work=site.workspace, prefmill=prefmill, pipeline=pipeline, keys=keys)
    (site.checkout / "inside.sh").write_text(text)
    sent = site.run(
        ["sbatch", "--parsable", "--array=3", "-N2", "--mem=3000", "inside.sh"], PREFMILL_PYTHON=sys.executable
    )
    assert sent.returncode == 0, sent.stderr
    logs = site.workspace / "logs/inner/sft/clean"
    site.wait(lambda: len(rows(logs / "executed_steps.jsonl")) > 2)
    inner = (site.checkout / "id").read_text().strip()
    warn(site, inner)
    go_on(site, inner)
    site.wait(lambda: [row["outcome"] for row in rows(logs / "attempts.jsonl")] == ["requeued", "complete"])
    assert all("array_job_id" not in row for row in rows(logs / "attempts.jsonl"))
    site.wait(lambda: [len(digests(site.workspace, run)) for run in ("wide", "local")] == [1, 2])
    site.wait(lambda: site.queue("%i %T") == [f"{sent.stdout.strip()}_3 RUNNING"])


@pytest.mark.slow
def test_training_of_both_stages_as_one_array(site: Site) -> None:
    pipeline = "configs/pipelines/modalities.yaml"
    job = sbatch(site, "--array=0-5", "sbatch/train_pipeline.sbatch", pipeline, "run=both", "sft.step_seconds=1")
    waiting = [f"{job}_{index} PENDING Dependency" for index in (3, 4, 5)]
    site.wait(lambda: {line for line in site.queue() if " PENDING " in line} >= set(waiting[:1]), 60)
    site.wait(seconds=180)
    wanted = [f"{stage}:{name}" for stage in ("dpo", "sft") for name in MODALITIES]
    assert sorted(digests(site.workspace, "both")) == wanted, site.logs()
    for name in MODALITIES:  # none of them ran before its policy was there
        assert len(rows(site.workspace / f"logs/both/dpo/{name}/attempts.jsonl")) == 1
    assert "waits for" in "".join(path.read_text() for path in site.checkout.glob("slurm-*.out"))


@pytest.mark.slow
def test_a_dpo_whose_sft_has_failed_says_so_and_ends(site: Site) -> None:
    job = sbatch(
        site, "--array=3", "sbatch/train_pipeline.sbatch", "configs/pipelines/modalities.yaml", "run=alone"
    )  # fmt: skip
    site.wait()
    text = (site.checkout / f"slurm-{job}_3.out").read_text()
    assert "element 0 is not queued" in text
    assert "see why that one ended" in text
    assert digests(site.workspace, "alone") == {}
    words = ["sbatch/train_pipeline.sbatch", "configs/pipelines/modalities.yaml", "run=alone", "sft.step_seconds=2"]
    maker = sbatch(site, "--array=0", *words)
    site.wait(lambda: len(rows(site.workspace / "logs/alone/sft/clean/executed_steps.jsonl")) > 1)
    job = sbatch(site, "--array=3", *words)
    site.wait()
    text = (site.checkout / f"slurm-{job}_3.out").read_text()
    assert f"submit this one again with --dependency=afterok:{maker}_0" in text, text
    sbatch(site, "--array=3", f"--dependency=afterok:{maker}_0", *words)
    site.wait()
    assert sorted(digests(site.workspace, "alone")) == ["dpo:clean", "sft:clean"], site.logs()


@pytest.mark.slow
def test_stages_by_their_index_wait_for_each_other(site: Site) -> None:
    job = sbatch(site, "--array=0-2", "sbatch/run_pipeline.sbatch", "configs/pipelines/toy.yaml", "run=stages")
    site.wait(seconds=180)
    assert len(digests(site.workspace, "stages")) == 7, site.logs()
    assert f"waits for {job}_0" in (site.checkout / f"slurm-{job}_1.out").read_text()
    job = sbatch(site, "--array=7", "sbatch/run_pipeline.sbatch", "configs/pipelines/toy.yaml", "run=stages")
    site.wait()
    assert "expected: 0 make, 1 use, 2 join" in (site.checkout / f"slurm-{job}_7.out").read_text()
