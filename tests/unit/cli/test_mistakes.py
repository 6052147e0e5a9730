"""What a newcomer mistypes: every mistake is explained with a fix, and none ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefmill.cli.main import main
from prefmill.cli.stage import run_stage
from prefmill.pipeline.run_record import ROOTS
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
DEMO = str(CONFIGS / "pipelines" / "demo.yaml")


def make_run(workspace: Path, name: str) -> None:
    """A run without a task, and the links `latest` that name it."""
    for root in ROOTS:
        (workspace / root / name).mkdir(parents=True)
        (workspace / root / "latest").symlink_to(name)
    (workspace / "logs" / name / "plan.json").write_text('{"run": "mine", "tasks": []}')


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a refused command prints; argparse leaves by SystemExit."""
    try:
        code = main(words)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["no pipeline", "stages", "configs/pipelines"]),
        ("run: a\n", ["no pipeline"]),
        ("beta: 0.3\n", ["no pipeline", "beta", "python -m"]),
        ("- a\n", ["keys and values"]),
        ("name: a\nstages: [dpo]\n", ["stages = ['dpo']"]),
        ("name: a\nstages:\n\tdpo: {}\n", ["unreadable YAML", "line 3"]),
        ("name: a\nname: b\n", ["duplicate key name"]),
        ("name: &a [*a]\n", ["refers to itself"]),
        ("name: \xff\n", ["no text in UTF-8"]),
        ("name: latest\nstages: {toy_preferences: {}}\n", ["'latest'", "another name"]),
        ("name: \xc3\xbc\nstages: {toy_preferences: {}}\n", ["a to z"]),
    ],
)
def test_a_wrong_pipeline_is_explained(
    text: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_bytes(text.encode("latin-1"))
    for words in (["plan"], ["why", "dpo"]):
        error = said(capsys, words[0], str(tmp_path / "x.yaml"), *words[1:], f"workspace={tmp_path}")
        assert "x.yaml" in error
        assert "Value error" not in error
        for part in expected:
            assert part in error


def test_a_folder_or_a_bare_name_gets_a_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    folder = said(capsys, "plan", "configs/pipelines")
    assert "a folder, not a file" in folder
    assert "configs/pipelines/demo.yaml" in folder
    assert "did you mean 'configs/pipelines/demo.yaml'?" in said(capsys, "plan", "demo")
    assert main(["plan", "configs/pipelines/demo.yaml"]) == 0
    # A stage finds its own files by name, as an entry of a pipeline does.
    capsys.readouterr()
    assert run_stage("dpo", ["dmo"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err
    assert run_stage("dpo", ["configs/pipelines/demo.yaml"]) == 2
    assert "prefmill run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["run", DEMO, "workspace={0}/file"], ["init", "{0}/file"], ["compare", "mine", "--output", "{0}/file/page.html"]],
)
def test_a_file_in_place_of_a_folder_is_explained(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "mine")
    other = tmp_path / "logs" / "other"
    other.mkdir()
    (other / "plan.json").write_text('{"run": "other", "tasks": []}')
    (tmp_path / "file").touch()
    where = ["other", "--workspace", str(tmp_path)] if words[0] == "compare" else []
    error = said(capsys, *(word.format(tmp_path) for word in words), *where)
    assert "a file is where a folder should be" in error
    assert "fix:" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run"], "required: pipeline\n"),
        (["why", DEMO], "required: STAGE[:TASK]\n"),
        (["run", DEMO, "--jobs", "x"], "a whole number, 1 or more, not 'x'"),
        (["logs", "dpo", "-n", "-3"], "a whole number, 0 or more, not '-3'"),
        (["status", "--watch", "--every", "-1"], "a time in seconds, 0 or more, not '-1'"),
        (["compare", "mine"], "nothing to compare"),
    ],
)
def test_wrong_arguments_are_explained(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in said(capsys, *words)


@pytest.mark.parametrize("words", [["rm", "mine", "{0}", "latest"], ["pair", "a:b", "{0}", "mine"]])
def test_an_option_may_come_between_words(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "mine")
    main([word.format(f"--workspace={tmp_path}") for word in words])
    assert "unrecognized" not in capsys.readouterr().err


def test_a_stage_may_be_named_before_its_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "dpo", DEMO, f"workspace={tmp_path}"]) == 0
    assert "dpo:clean: waiting" in capsys.readouterr().out


def test_without_a_run_the_fix_starts_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--workspace", str(tmp_path)]
    for command in (["status"], ["pairs"], ["rm", "mine"], ["restore", "dpo"], ["logs", "dpo"]):
        error = said(capsys, *command, *where)
        assert "no run yet" in error
        assert "prefmill run configs/pipelines/demo.yaml" in error
    assert main(["runs", *where]) == 0
    assert "no run yet" in capsys.readouterr().out
    assert main(["gc", *where]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_the_newest_run_is_deleted_by_its_link_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "mine")
    assert main(["rm", "latest", "mine", "--yes", "--workspace", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("logs/mine") == 1
    assert [path.name for root in ROOTS for path in (tmp_path / root).iterdir()] == []


def test_what_a_terminal_cannot_show_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    shown = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    (tmp_path / "d\xfc").mkdir()
    assert main(["plan", DEMO, f"workspace={tmp_path}/d\xfc"]) == 0
    shown.flush()
    assert b"/d?" in written.getvalue()


def test_a_reader_that_goes_ends_the_command_as_any_other_program() -> None:
    """`prefmill run ... | head -1` is cut off: it may neither print a traceback nor report success."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "prefmill.cli.main", "stages"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_error_and_no_files_number(closed: str, tmp_path: Path) -> None:
    """Its number went to the next file opened: what the command and its children print would stand in that."""
    script = (
        "import os, sys; from prefmill.cli.console import guarded; "
        "sys.exit(guarded(lambda: [open(sys.argv[1], 'w'), print('told'), os.system('echo heard; echo heard >&2')][2]))"
    )
    command = ["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, script, str(tmp_path / "kept")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "kept").read_text() == ""


def test_a_workspace_given_as_a_key_where_it_is_an_option_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "workspace=/tmp"])
    assert "unrecognized arguments: workspace=/tmp (did you mean '--workspace'?)" in capsys.readouterr().err


def test_hidden_files_are_not_suggested(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in (".hidden.yaml", "mine.yaml"):
        (tmp_path / name).touch()
    assert main(["run", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "mine.yaml" in told
    assert ".hidden.yaml" not in told


def test_runs_that_share_no_papers_are_compared_without_an_empty_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for run in ("one", "two"):
        (tmp_path / "logs" / run).mkdir(parents=True)
        (tmp_path / "logs" / run / "plan.json").write_text(json.dumps({"run": run, "tasks": []}))
    assert main(["compare", "one", "two", "--workspace", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "PAIRED BY PAPER" not in told
    assert "nothing to pair by paper" in told
