"""`prefmill submit` on a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefmill.store.artifacts import read_manifest
from tests.slurm.conftest import Site

pytestmark = pytest.mark.slow


def digests(workspace: Path, run: str) -> dict[str, str]:
    """The content digest of every finished artifact of a run."""
    found = {}
    for path in sorted(workspace.glob(f"*/{run}/*/*/manifest.json")):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        found[f"{manifest.stage}:{manifest.task}"] = manifest.content_digest
    return found


def jobs(site: Site, run: str, number: int = 1) -> list[dict[str, object]]:
    """What a submission recorded of its jobs."""
    path = site.workspace / "logs" / run / "submissions" / f"{number:04d}" / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pipeline_gives_what_a_local_run_gives_and_its_arrays_wait_for_each_other(site: Site) -> None:
    printed = site.submit("toy", "run=far", "make.seconds=1")
    first, second, third = jobs(site, "far")
    assert second["dependency"] == f"aftercorr:{first['job_id']}"
    assert third["dependency"] == f"afterok:{second['job_id']}"
    assert [job["indices"] for job in (first, second, third)] == [[0, 1, 2], [0, 1, 2], [0]]
    assert "7 to submit" in printed
    site.wait()
    site.prefmill(
        "run", "configs/pipelines/toy.yaml", f"workspace={site.workspace}", "run=near", "share=false", "make.seconds=1"
    )
    assert digests(site.workspace, "far") == digests(site.workspace, "near")
    assert len(digests(site.workspace, "far")) == 7
    assert "nothing to submit" in site.submit("toy", "run=far", "make.seconds=1")


def test_a_dry_run_prints_what_slurm_then_stores_and_touches_nothing(site: Site) -> None:
    arguments = ["toy", "run=dry", "make.seconds=2"]
    printed = site.submit(*arguments, "--dry-run")
    assert not site.workspace.exists()
    site.submit(*arguments)
    for job in jobs(site, "dry"):
        stored = site.cluster.ask("scontrol", "write", "batch_script", str(job["job_id"]), "-")
        assert stored is not None
        assert stored.rstrip("\n\0") in printed
        script = next(site.workspace.glob(f"logs/dry/submissions/0001/arrays/{job['stage']}.0.sbatch"))
        assert stored.rstrip("\n\0") == script.read_text().rstrip("\n")
    assert printed.count("#SBATCH --array=") == 3


def test_arrays_over_the_sites_limit_are_cut_and_everything_waits_for_every_chunk(site: Site) -> None:
    (site.checkout / "configs/clusters/small.yaml").write_text(
        "max_array_size: 4\nadvance: false\nresources: {partition: main, max_concurrent: 2}\n"
    )
    site.submit("toy", "run=cut", "stages.make.array={shard: 6}", "stages.use.array={shard: 6}", cluster="small")
    make0, make1, use0, use1, join = jobs(site, "cut")
    assert [job["indices"] for job in (make0, make1)] == [[0, 1, 2, 3], [0, 1]]
    assert use0["dependency"] == f"aftercorr:{make0['job_id']}"
    assert use1["dependency"] == f"aftercorr:{make1['job_id']}"
    assert join["dependency"] == f"afterok:{use0['job_id']},afterok:{use1['job_id']}"
    script = (site.workspace / "logs/cut/submissions/0001/arrays/make.0.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in script
    site.wait()
    assert len(digests(site.workspace, "cut")) == 13, site.logs()


def test_submitting_twice_duplicates_nothing_and_what_is_complete_is_left_out(site: Site) -> None:
    site.submit("toy", "run=twice", "make.rows=30", "make.seconds=3")
    assert "nothing to submit" in site.submit("toy", "run=twice", "make.rows=30", "make.seconds=3")
    assert len(site.queue()) == 7
    site.wait()
    made = digests(site.workspace, "twice")
    printed = site.submit("toy", "run=twice", "make.rows=30", "use.factor=5")  # make is complete: nothing to wait for
    assert "3 tasks complete, 0 queued or running, 4 to submit" in printed
    second = jobs(site, "twice", 2)
    assert [job["stage"] for job in second] == ["use", "join"]
    assert second[0]["dependency"] == ""
    site.wait()
    again = digests(site.workspace, "twice")
    assert {key for key in made if made[key] != again[key]} == {"use:shard0", "use:shard1", "use:shard2", "join:all"}


def test_elements_already_queued_are_waited_for_one_by_one(site: Site) -> None:
    site.submit("toy", "run=half", "make.seconds=5", "--only", "make:shard1")
    (first,) = jobs(site, "half")
    assert first["indices"] == [1]  # its place in the plan, in every submission
    printed = site.submit("toy", "run=half", "make.seconds=5")
    assert "1 queued or running, 6 to submit" in printed
    records = {(job["stage"], tuple(job["indices"])): job for job in jobs(site, "half", 2)}  # type: ignore[arg-type]
    make = records["make", (0, 2)]
    assert str(records["use", (0, 1, 2)]["dependency"]).split(",") == [
        f"afterok:{first['job_id']}",
        f"afterok:{make['job_id']}",
    ]
    site.wait()
    assert len(digests(site.workspace, "half")) == 7, site.logs()


def test_only_refuses_what_nobody_makes(site: Site) -> None:
    done = site.prefmill(
        "submit", "configs/pipelines/toy.yaml", "--cluster", "configs/clusters/test.yaml", "--only", "join",
        f"workspace={site.workspace}",
    )  # fmt: skip
    assert done.returncode == 2
    assert "join:all reads an input that nothing makes" in done.stderr
    assert site.queue() == []


def test_queued_jobs_run_the_code_and_configuration_as_submitted(site: Site) -> None:
    site.submit("toy", "run=pinned", "make.seconds=3", "use.factor=3")
    use = site.checkout / "stages" / "use.py"
    use.write_text(use.read_text().replace('row["n"] * config.factor', "0"))
    (site.checkout / "configs" / "pipelines" / "toy.yaml").write_text("name: other\nstages: {make: {}}\n")
    site.wait()
    rows = (site.workspace / "data/pinned/join/all/all.jsonl").read_text()
    assert [json.loads(line)["n"] for line in rows.splitlines()] == [0, 3, 6, 9, 12, 15]


def test_hostile_values_break_nothing_and_run_nothing(site: Site) -> None:
    pwned = site.checkout / "pwned"
    text = f"\"'; touch {pwned} # $(touch {pwned}) `touch {pwned}`\n%j ü"
    workspace = site.workspace / f"a b 'c' \"d\" $(touch {pwned.name}) %j ü;#"
    done = site.prefmill(
        "submit", "configs/pipelines/toy.yaml", "--cluster", "configs/clusters/test.yaml", "run=hostile",
        f"workspace={json.dumps(str(workspace))}", f"make.text={json.dumps(text)}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    site.wait()
    row = json.loads((workspace / "data/hostile/make/shard0/numbers.jsonl").read_text().splitlines()[0])
    assert row["text"] == text, site.logs()
    assert len(digests(workspace, "hostile")) == 7
    assert not list(site.checkout.rglob("pwned"))
    assert len(list((workspace / "logs/hostile/make/slurm").glob("*_?.out"))) == 3


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("run", "a b", "folder"), ("run", "$(id)", "folder"), ("run", "../x", "folder"), ("run", "-x", "folder"),
        ("workspace", "/tmp/a:b", "cannot be given this path"), ("workspace", "/tmp/a\nb", "cannot be given"),
        ("workspace", "/tmp/a\\b", "cannot be given this path"),
    ],
)  # fmt: skip
def test_names_and_paths_that_slurm_would_misread_are_refused(site: Site, key: str, value: str, said: str) -> None:
    done = site.prefmill(
        "submit", "configs/pipelines/toy.yaml", "--cluster", "configs/clusters/test.yaml", f"{key}={json.dumps(value)}"
    )
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert site.queue() == []


def test_secrets_reach_the_stage_and_nothing_else(site: Site) -> None:
    value = "s3cr3t-value-of-the-test"
    file = site.checkout / "secrets.env"
    file.write_text(f"# comment\nTOY_SECRET={value}\n")
    config = site.checkout / "configs/clusters/secret.yaml"
    config.write_text(f"advance: false\nsecrets: {{file: {file}, names: [TOY_SECRET]}}\n")
    files = ["configs/pipelines/toy.yaml", "--cluster", str(config), f"workspace={site.workspace}", "run=quiet"]
    refused = site.prefmill("submit", *files)
    assert refused.returncode == 2
    assert "others can read the secrets" in refused.stderr
    file.chmod(0o600)
    done = site.prefmill("submit", *files, "make.seconds=4", TOY_SECRET=value)
    assert done.returncode == 0, done.stderr
    spool = [path for path in site.cluster.root.joinpath("state").rglob("*") if path.is_file()]
    assert len([path for path in spool if path.name in ("script", "environment")]) >= 3
    site.wait()
    assert "secret True" in (site.workspace / "logs/quiet/make/shard0.log").read_text()
    everything = [*site.cluster.root.rglob("*"), *site.workspace.rglob("*")]
    leaks = [path for path in everything if path.is_file() and path != file and value.encode() in path.read_bytes()]
    assert leaks == []
    assert value not in done.stdout + done.stderr


def test_a_stage_runs_in_its_own_environment(site: Site, tmp_path: Path) -> None:
    import subprocess
    import sys
    import sysconfig

    other = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    packages = next(other.glob("lib/python3*/site-packages"))
    (packages / "first.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    config = site.checkout / "configs/clusters/two.yaml"
    config.write_text(f"advance: false\nstages: {{make: {{python: {other}/bin/python}}}}\n")
    site.submit("toy", "run=two", cluster="two")
    site.wait()
    assert len(digests(site.workspace, "two")) == 7, site.logs()
    assert f"python {other}/bin/python" in (site.workspace / "logs/two/make/shard0.log").read_text()


def test_after_a_failure_what_could_never_run_is_submitted_anew(site: Site) -> None:
    site.submit("toy", "run=mend", "make.fail=true")
    site.wait(lambda: all("DependencyNeverSatisfied" in line or "Dependency" in line for line in site.queue()))
    assert digests(site.workspace, "mend") == {}
    site.wait(lambda: sum("DependencyNeverSatisfied" in line for line in site.queue()) == 3)
    printed = site.submit("toy", "run=mend")
    assert "4 that could never run" in printed
    site.wait(lambda: len(digests(site.workspace, "mend")) == 7)
    assert [row["outcome"] for row in rows(site, "mend", "use:shard0")] == ["complete"]


def rows(site: Site, run: str, key: str) -> list[dict[str, object]]:
    """The attempts at a task that have ended."""
    path = site.workspace / "logs" / run / key.replace(":", "/") / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_submissions_at_once_submit_once(site: Site) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda _: site.submit("toy", "run=race", "make.seconds=5"), range(2)))
    assert sum("nothing to submit" in text for text in printed) == 1
    assert len(site.queue()) == 7


def test_a_job_refuses_what_was_changed_since_its_submission(site: Site) -> None:
    """It read the file as it found it, and nothing said that this was not what had been submitted."""
    file = site.checkout / "words.txt"
    file.write_text("then")
    (site.checkout / "configs/clusters/hold.yaml").write_text("advance: false\nresources: {options: {hold: true}}\n")
    site.submit("toy", "run=swap", f"make.file={file}", "--only", "make", cluster="hold")
    file.write_text("now!")
    (job,) = jobs(site, "swap")
    site.cluster.ask("scontrol", "release", str(job["job_id"]))
    site.wait()
    assert digests(site.workspace, "swap") == {}, site.logs()
    shown = site.prefmill("status", "swap", "--workspace", str(site.workspace)).stdout
    assert "changed since this job was submitted" in shown
    assert str(file) in site.logs()
    file.write_text("then")  # put back, the very submission goes on
    done = site.prefmill("rerun", "make:shard0", "--run", "swap", "--workspace", str(site.workspace))
    assert done.returncode == 0, done.stderr
    again = jobs(site, "swap")[-1]
    site.cluster.ask("scontrol", "release", f"{again['job_id']}")
    site.wait()
    assert list(digests(site.workspace, "swap")) == ["make:shard0"], site.logs()
    file.write_text("now!")  # and a new submission reads it as it is now
    site.submit("toy", "run=swap", f"make.file={file}", "--only", "make")
    site.wait()
    row = json.loads((site.workspace / "data/swap/make/shard1/numbers.jsonl").read_text().splitlines()[0])
    assert row["text"] == "now!"
    assert len(digests(site.workspace, "swap")) == 3, site.logs()
