"""The command's habits: help, version, nearest names, any order, JSON, completion, colours, and quick starts."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefmill.cli.completion import script
from prefmill.cli.console import Console
from prefmill.cli.main import main
from prefmill.core import terminal
from tests.conftest import REPOSITORY

DEMO = str(REPOSITORY / "configs" / "pipelines" / "demo.yaml")


def test_alone_it_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_a_wrong_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stauts"]) == 2
    assert "no command 'stauts' (did you mean 'status'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--dry-run", DEMO, "--only", "dpo", "{0}", "dpo.beta=0.7"],
        ["run", "{0}", "dpo.beta=0.7", DEMO, "--only", "dpo", "--dry-run"],
        ["run", "{0}", "--only", "dpo", DEMO, "--dry-run", "dpo.beta", "=", "0.7"],
    ],
)
def test_words_may_come_in_any_order(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(f"workspace={tmp_path}") for word in words]) == 0
    printed = capsys.readouterr().out
    assert "dpo:clean" in printed
    assert "sft:clean" not in printed.splitlines()[1][:20]
    assert list(tmp_path.iterdir()) == []  # a dry run touches nothing


def test_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"workspace={tmp_path}"
    for words in (
        ["stages"],
        ["plan", DEMO, where],
        ["why", DEMO, "dpo", where],
        ["runs", "--workspace", str(tmp_path)],
    ):
        main([*words, "--json"])
        json.loads(capsys.readouterr().out)
    main(["plan", DEMO, where, "--json"])
    assert {task["freshness"] for task in json.loads(capsys.readouterr().out)["tasks"]} == {"missing", "waiting"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statsu"], "no command 'statsu' (did you mean 'status'?)\n  expected: run, submit, plan,"),
        (["help", "nope"], "no command 'nope'\n"),
        (["sft", "x.yaml"], "fix:      a stage is run with python -m stages.sft CONFIG"),
        (["plan", "--workspace", "x", DEMO], "(did you mean 'workspace='?)"),
        (["runn", "--help"], "no command 'runn' (did you mean 'run'?)\n  expected: run, submit, plan,"),
        (["--verison"], "unrecognized arguments: --verison (did you mean '--version'?)"),
        (["status", "--wacth"], "unrecognized arguments: --wacth (did you mean '--watch'?)"),
        (["plan", DEMO, "--jsn=1"], "unrecognized arguments: --jsn=1 (did you mean '--json'?)"),
        (["why", DEMO, "dop"], "no task 'dop' in this pipeline (did you mean 'dpo'?)"),
        (["logs", "--workspace", "{0}", "--run", "demo", "dop"], "(did you mean 'dpo'?)"),
        (["restore", "--workspace", "{0}", "--run", "demo", "dpo:claen"], "(did you mean 'dpo:clean'?)"),
        (["status", "--workspace", "{0}", "demmo"], "no such run (did you mean 'demo'?)"),
    ],
)
def test_wrong_words_get_the_nearest(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with({"demo": ["dpo:clean", "sft:clean"]}, tmp_path)
    try:
        code = main([word.format(tmp_path) for word in words])
    except SystemExit as ended:  # argparse's own
        code = int(str(ended.code))
    assert code == 2
    assert said in capsys.readouterr().err


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in ((["help"], "usage: prefmill [-h]"), (["help", "status"], "usage: prefmill status")):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        assert capsys.readouterr().out.startswith(shown)


def run_with(tasks: dict[str, list[str]], workspace: Path) -> None:
    for run, keys in tasks.items():
        folder = workspace / "logs" / run
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(
            json.dumps(
                {
                    "run": run,
                    "tasks": [{"key": key, "output": f"data/{run}/s/a", "logs": f"logs/{run}/s/a"} for key in keys],
                }
            )
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stat"], ["status"]),
        (["hel"], ["help"]),
        (["help", "stat"], ["status"]),
        (["status", "--workspace", "{0}", "m"], ["mine"]),
        (["rm", "--workspace", "{0}", ""], ["demo", "mine"]),
        (["logs", "--workspace", "{0}", "--run", "demo", "dpo"], ["dpo", "dpo:clean"]),
        (["run", DEMO, "dp"], ["dpo."]),
        (["run", DEMO, "dpo.loss_"], ["dpo.loss_type=", "dpo.loss_weights="]),
        (["run", DEMO, "--only", "val"], ["validate_datasets"]),
        (["plan", DEMO, "--js"], ["--json"]),
    ],
)
def test_completion(words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with({"demo": ["dpo:clean"], "mine": []}, tmp_path)
    assert main(["__complete", *(word.format(tmp_path) for word in words)]) == 0
    assert capsys.readouterr().out.split() == expected


def test_bash_completes(tmp_path: Path) -> None:
    """The script itself in bash: colons and equal signs are parts of words."""
    text = subprocess.run(
        [sys.executable, "-m", "prefmill.cli.main", "completion", "bash"], capture_output=True, check=True
    )
    program = f'prefmill() {{ {shlex.quote(str(Path(sys.executable).with_name("prefmill")))} "$@"; }}'
    typed = f"COMP_WORDS=(prefmill run {shlex.quote(str(DEMO))} dpo.be); COMP_CWORD=3"
    ask = "\n".join([program, typed, "_prefmill 2>/dev/null", 'echo "${COMPREPLY[@]}"'])
    done = subprocess.run(["bash", "-c", text.stdout.decode() + ask], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["dpo.beta="], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
@pytest.mark.parametrize(
    ("word", "added"), [("dpo.be", "-S -- dpo.beta=\n--\n"), ("--onl", "-S --\n-- --only\n"), ("no", "files\n")]
)
def test_zsh_completes(word: str, added: str) -> None:
    """The script itself in zsh, with stand-ins for what only its line editor has: no space follows an equal sign."""
    stand_ins = "compdef() {}; compadd() { print -r -- $@ }; _files() { print files }"
    program = f'prefmill() {{ {Path(sys.executable).with_name("prefmill")} "$@"; }}'
    typed = f"words=(prefmill run {DEMO} {word}); CURRENT=4; PREFIX={word}; _prefmill"
    ask = "\n".join([stand_ins, program, script("zsh"), typed])
    done = subprocess.run(["zsh", "-fc", ask], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (added, "")


def test_colours_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.paint("x", "red") == "x"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.paint("x", "red") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.paint("x", "red") == "x"


def test_a_quiet_run_prints_failures_warnings_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["> a:all missing", "+ a:all done in 1 s", "  3 rows", "! 1 warning", "x b:all failed", "/tmp/report.html"]
    shown = {}
    for quiet, verbose in ((False, False), (True, False), (False, True)):
        console = Console(argparse.Namespace(quiet=quiet, verbose=verbose), Path("logs/r"))
        for line in lines:
            console(line)
        shown[quiet, verbose] = capsys.readouterr().out.splitlines()
    assert shown[False, False] == lines
    assert [line for line in shown[True, False] if line[0] in ">+ "] == []
    assert shown[True, False] == ["! 1 warning", "x b:all failed", "/tmp/report.html"]
    assert shown[False, True][1] == "  log: logs/r/a/all.log"


@pytest.mark.parametrize(
    "words",
    [["--help"], ["status", "--workspace", "{}"], ["__complete", "run", DEMO, "dpo.b"], ["__complete", "logs", "d"]],
)
def test_it_starts_at_once(words: list[str], tmp_path: Path) -> None:
    """By what it imports, not by a clock: nothing that configurations, trainings or Slurm's scripts need."""
    (tmp_path / "logs" / "r").mkdir(parents=True)
    (tmp_path / "logs" / "latest").symlink_to("r")
    task = {"key": "sft:all", "output": "data/r/sft/all", "logs": "logs/r/sft/all", "needs": []}
    (tmp_path / "logs" / "r" / "plan.json").write_text(json.dumps({"tasks": [task]}))
    words = [word.format(tmp_path) for word in words]
    code = (
        f"import sys; from prefmill.cli.main import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    *shown, modules = run.stdout.splitlines()
    assert shown
    slow = {"torch", "numpy", "pydantic", "omegaconf", "yaml", "msgspec", "submitit", "typing_extensions"}
    assert slow.isdisjoint(modules.split())
