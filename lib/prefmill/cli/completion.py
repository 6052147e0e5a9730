"""Shell completion of commands, options, pipelines, runs, stages, tasks and keys; no heavy import, under 0.1 s.

`eval "$(prefmill completion bash)"` in ~/.bashrc, or the same with zsh in ~/.zshrc.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from prefmill.core.errors import PipelineError
from prefmill.core.places import default_workspace, expand_home
from prefmill.pipeline.run_record import run_tasks

KEYS = Path(__file__).parent / "keys.json"  # written by `python -m tests.docs.keys`: importing the stages takes seconds
# COMP_WORDBREAKS: bash cuts words at `=` and `:`, and would complete the parts of `run=mine` and `dpo:clean` alone.
_BASH = """_prefmill() {
  local IFS=$'\\n'
  COMPREPLY=($(prefmill __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
  [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//[=:]/}
complete -o default -F _prefmill prefmill
"""
# Not by zsh's bashcompinit: it knows no compopt, so a space would follow `run=`.
_ZSH = """_prefmill() {
  local -a found
  found=(${(f)"$(prefmill __complete "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)"})
  (( $#found )) || { _files; return }
  compadd -S '' -- ${(M)found:#*[=.]}
  compadd -- ${found:#*[=.]}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _prefmill prefmill
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}
SHELLS = tuple(_SCRIPTS)
_RUN_FIRST = ("status", "advance", "pair", "pairs", "rate", "rm", "gc", "compare")
_TASK_FIRST = ("logs", "rerun", "cancel", "restore")


def script(shell: str) -> str:
    """What the shell evaluates once at its start."""
    return _SCRIPTS[shell]


def complete(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The candidates for the last of `words`, all that was typed after `prefmill`."""
    *before, word = words or [""]
    commands = commands_of(parser)
    if before in ([], ["help"]):
        return _starting(word, [*commands, "help"])
    if before[0] not in commands:
        return []
    if word.startswith("-"):
        return _starting(word, options_of(commands[before[0]]))
    return _starting(word, _values(before, word))


def _values(before: Sequence[str], word: str) -> Iterable[str]:
    workspace = _workspace(before)
    command, last = before[0], before[-1]
    pipeline = next((Path(item) for item in before[1:] if item.endswith((".yaml", ".yml"))), None)
    if last == "--run" or (command in _RUN_FIRST and not last.startswith("--")):
        return _runs(workspace)
    if command in _TASK_FIRST:
        run = before[before.index("--run") + 1] if "--run" in before[:-1] else "latest"
        return _tasks(workspace, run)
    if pipeline is None:
        return sorted(str(path) for path in Path("configs/pipelines").glob("*.yaml"))
    stages = _stages(pipeline)
    if last == "--only" or (command == "why" and last == str(pipeline)):
        return stages
    keys = json.loads(KEYS.read_text()) if KEYS.is_file() else {}
    named = [stage for stage in stages if word.startswith(f"{stage}.")]
    if named:
        return [f"{named[0]}.{key}=" for key in keys.get(named[0], ())]
    return ["run=", "workspace=", *(f"{stage}." for stage in stages)]


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    # argparse has no public way to ask a parser for its subcommands.
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices)


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a parser."""
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _workspace(before: Sequence[str]) -> Path:
    given = [item.removeprefix("workspace=") for item in before if item.startswith("workspace=")]
    given += [before[place + 1] for place, item in enumerate(before[:-1]) if item == "--workspace"]
    return expand_home(given[-1]) if given else default_workspace()


def _runs(workspace: Path) -> list[str]:
    return sorted(path.parent.name for path in (workspace / "logs").glob("*/plan.json"))


def _tasks(workspace: Path, run: str) -> list[str]:
    try:
        keys = [task["key"] for task in run_tasks(workspace, run)]
    except PipelineError:  # a key press explains nothing: `prefmill status` does
        return []
    return [*dict.fromkeys(key.partition(":")[0] for key in keys), *keys]


def _stages(pipeline: Path) -> list[str]:
    """The stages of a pipeline file by its indentation: reading YAML takes longer than a key press may."""
    try:
        text = pipeline.read_text()
    except OSError:
        return []
    return re.findall(r"^  (\w+):", text.partition("\nstages:")[2], re.MULTILINE)


def _starting(word: str, candidates: Iterable[str]) -> list[str]:
    return [item for item in candidates if item.startswith(word)]
