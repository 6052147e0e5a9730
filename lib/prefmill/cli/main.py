"""The `prefmill` command. Nothing here imports torch: `--help` and `status` answer at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from prefmill import __version__
from prefmill.cli.completion import SHELLS, commands_of, options_of
from prefmill.cli.console import guarded
from prefmill.cli.data import add_data_commands
from prefmill.cli.housekeeping import add_housekeeping
from prefmill.cli.pipelines import add_pipeline_commands, new_command
from prefmill.cli.runs import add_commands
from prefmill.core.places import STAGES, stages_folder

EXAMPLES = f"""examples:
  prefmill init work                                        configs and sbatch scripts in a folder of yours
  prefmill run configs/pipelines/demo.yaml                  the whole pipeline on this machine
  prefmill run configs/pipelines/demo.yaml dpo.beta=0.2     again: only what depends on that key
  prefmill run configs/pipelines/demo.yaml --only dpo       one stage, or one task as dpo:clean
  prefmill submit configs/pipelines/demo.yaml --cluster configs/clusters/h100.yaml     the same as Slurm arrays
  prefmill plan configs/pipelines/demo.yaml                 what would run, and why
  prefmill why configs/pipelines/demo.yaml dpo:clean        the keys and inputs that make it stale
  prefmill status --watch                                   the newest run, task by task
  prefmill logs -f dpo                                      what its tasks print
  prefmill verify                                           hash every output again
  prefmill runs                                             every run: state, age, size, headline
  prefmill compare demo mine                                keys that differ, metrics with paired intervals
  prefmill gc                                               what can be deleted; --yes deletes it
  prefmill advance                                          resubmit failed tasks that can be retried
  prefmill rerun dpo:clean                                  submit a task again
  prefmill doctor                                           check this machine
  eval "$(prefmill completion bash)"                        completion of commands, runs, stages, tasks, keys
  python -m {STAGES}.score_reviews configs/score_reviews/demo.yaml run=own inputs.corpus=data/demo/ingest_reviews/all
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 a bug, 2 something the user can fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # No command of the parser: the shell calls it at every press of Tab, and no help should list it.
    if words[:1] == ["__complete"]:
        from prefmill.cli.completion import complete

        print("\n".join(complete(words[1:], parser)))
        return 0
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words:
        parser.print_help()
        return 0
    return guarded(lambda: _run_command(parser, words))


def _run_command(parser: argparse.ArgumentParser, words: list[str]) -> int:
    _check_command(parser, words)
    # By the command's own parser: parse_args refuses words after an option (bpo-14191), and what takes them
    # wherever they are knows no subcommands.
    command = commands_of(parser).get(words[0], parser)
    if command is parser:
        parser.parse_args(words)
    arguments, rest = command.parse_known_intermixed_args(words[1:])
    if rest:
        _refuse(command, rest)
    if hasattr(arguments, "overrides"):
        _sort_out(arguments)
    # A command that always does what it is asked returns nothing.
    return arguments.command(arguments) or 0


def _check_command(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Raise PipelineError naming the nearest where the first word is no command."""
    commands = commands_of(parser)
    if words[0].startswith("--") and words[0] not in options_of(parser):
        _refuse(parser, words[:1])
    if words[0].startswith("-") or words[0] in commands:
        return
    from prefmill.core.errors import PipelineError, nearest

    names = list(commands)
    is_stage = _is_stage(words[0])
    raise PipelineError(
        f"no command '{words[0]}'{'' if is_stage else nearest(words[0], names)}", expected=", ".join(names),
        fix=f"a stage is run with python -m {STAGES}.{words[0]} CONFIG" if is_stage else "see prefmill --help",
    )  # fmt: skip


def _is_stage(name: str) -> bool:
    return (stages_folder() / f"{name}.py").is_file()


def _refuse(parser: argparse.ArgumentParser, words: Sequence[str]) -> NoReturn:
    """As argparse refuses words, with the nearest option."""
    from prefmill.core.errors import nearest

    wrong = next((word.partition("=")[0] for word in words if word.startswith("-") or "=" in word), "")
    # Some commands take the workspace as an option, others as a key.
    keys = ["run=", "workspace="] * any(action.dest == "overrides" for action in parser._actions)
    hint = nearest(wrong, [*options_of(parser), *keys])
    if keys and not hint and wrong.startswith("--"):
        key = wrong.lstrip("-").replace("-", "_")
        stage = "" if _is_stage(key.partition(".")[0]) else "STAGE."
        hint = f"; a key is written without dashes, after its stage: {stage}{key}=VALUE"
    parser.error(f"unrecognized arguments: {' '.join(words)}{hint or _other_place_of_run(parser, words)}")


def _other_place_of_run(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """How this command takes a run's name, which some take alone and others, after a task, as --run."""
    options = options_of(parser)
    takes_alone = any(action.dest == "run" and not action.option_strings for action in parser._actions)
    if "--run" in options and not words[0].startswith("-"):
        return f"; a run is given as --run {words[0]}"
    given = words[0].partition("=")[0] == "--run" and takes_alone
    return f"; a run's name stands alone: {parser.prog} NAME" if given else ""


def _sort_out(arguments: argparse.Namespace) -> None:
    """Put `key=value` and files where they belong, in whatever order they were given."""
    given = [*arguments.overrides]
    for name in ("pipeline", "selector"):
        value = str(getattr(arguments, name, ""))
        if "=" in value and not Path(value).exists():
            place = next((place for place, item in enumerate(given) if "=" not in item), None)
            if place is not None:  # else the file's reader says what is missing
                setattr(arguments, name, type(getattr(arguments, name))(given.pop(place)))
                given.insert(0, value)
    arguments.overrides = given
    selector = getattr(arguments, "selector", "")
    if Path(selector).is_file() and not arguments.pipeline.exists():
        arguments.pipeline, arguments.selector = Path(selector), str(arguments.pipeline)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefmill", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tune language and image models on quality ratings, on a laptop or on Slurm.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"prefmill {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_pipeline_commands(commands)
    add_commands(commands)
    add_data_commands(commands)
    add_housekeeping(commands)

    stages = new_command(commands, "stages", "list the stages: what each reads and writes", _stages, "--json")
    stages.add_argument("--markdown", action="store_true", help="as the table of README.md")

    doctor = new_command(commands, "doctor", "check this machine, with a fix for every shortcoming", _doctor, "--json")
    doctor.add_argument("--workspace", type=Path, help="the folder to check for space and write access")
    doctor.add_argument("--model", help="a hub name or folder to check access to")

    built = "build tiny models of the real architectures, for tests"
    tiny = new_command(commands, "tiny-models", built, _tiny_models)
    tiny.add_argument("folder", type=Path, metavar="DIR", help="where to write them")
    tiny.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")

    init = new_command(commands, "init", "lay down configs, sbatch scripts and a first pipeline in a folder", _init)
    init.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")

    completed = "print the script that completes words in your shell"
    new_command(commands, "completion", completed, _completion).add_argument("shell", choices=SHELLS)
    return parser


def _stages(arguments: argparse.Namespace) -> None:
    from prefmill.core.stage import describe_stages, load_stage, stage_names

    if arguments.json:
        rows = [_stage_row(load_stage(name)) for name in stage_names()]
        print(json.dumps(rows, indent=1))
    else:
        print(describe_stages(arguments.markdown))


def _stage_row(stage: Any) -> dict[str, Any]:
    reads = {name: {"kind": item.kind, "optional": item.optional} for name, item in stage.reads.items()}
    keys = list(stage.config.model_fields)
    return {"name": stage.name, "summary": stage.summary, "reads": reads, "writes": stage.writes, "keys": keys}


def _doctor(arguments: argparse.Namespace) -> int:
    from prefmill.cli.doctor import examine
    from prefmill.core.places import default_workspace

    return examine(arguments.workspace or default_workspace(), arguments.model, arguments.json)


def _tiny_models(arguments: argparse.Namespace) -> None:
    from prefmill.demo.tiny_models import build_all

    for path in build_all(arguments.folder, arguments.seed):
        print(path)


def _init(arguments: argparse.Namespace) -> None:
    from prefmill.cli.init import lay_down

    for line in lay_down(arguments.folder):
        print(line)


def _completion(arguments: argparse.Namespace) -> None:
    from prefmill.cli.completion import script

    print(script(arguments.shell), end="")


if __name__ == "__main__":
    sys.exit(main())
