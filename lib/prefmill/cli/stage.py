"""`python -m stages.STAGE`: one stage by hand, through the same worker as a pipeline."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from prefmill.cli.console import Console, add_verbosity
from prefmill.cli.guard import guarded
from prefmill.core.aliases import ALIASES
from prefmill.core.config import StrictConfig, former_names
from prefmill.core.places import STAGES
from prefmill.core.stage import Stage
from prefmill.distributed.devices import is_launched


def main(stage: Stage[Any]) -> NoReturn:
    """`python -m stages.<stage> CONFIG [key=value ...]`: run one stage by hand or from a job script."""
    sys.exit(run_stage(stage.name, sys.argv[1:]))


def run_stage(stage: str, argv: Sequence[str]) -> int:
    """`python -m stages.<stage> [CONFIG] [key=value ...]`: one stage through the same worker as a pipeline.

    `run=`, `task=`, `workspace=`, `array.KEY=` and `inputs.NAME=` say where and what; other keys are the stage's.
    Inside a Slurm array, without `task=`, the element is SLURM_ARRAY_TASK_ID.
    """
    from prefmill.core.stage import load_stage

    parser = argparse.ArgumentParser(
        prog=f"python -m {STAGES}.{stage}", description=load_stage(stage).summary, epilog=_stage_help(stage),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", help="YAML file with the stage's keys")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="laid over the file")
    parser.add_argument("--force", action="store_true", help="run even if the output is up to date")
    add_verbosity(parser)
    # parse_args would refuse key=value after an option (bpo-14191).
    arguments = parser.parse_intermixed_args(as_keys(argv, parser))
    return guarded(lambda: _run_stage(stage, arguments))


def as_keys(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The flags of other trainers as prefmill's form: `--config FILE --beta 0.1` is `FILE beta=0.1`.

    A flag without a value is true. The flags that `parser` has stay as they are.
    """
    own = {option for action in parser._actions for option in action.option_strings}
    config: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        flag, has_value, value = words.pop(0).partition("=")
        if not flag.startswith("--") or flag in own:
            rest.append(flag + has_value + value)
            continue
        if not has_value:
            # A word with `=` in it is a key of ours, and the flag before it has no value.
            value = words.pop(0) if words and _is_value(words[0]) else "true"
        key = flag.removeprefix("--").replace("-", "_")
        if key in ("config", "config_file"):
            config.append(value)
        elif key == "local_rank" and is_launched():
            continue  # DeepSpeed's launcher gives it as LOCAL_RANK too
        else:
            rest.append(f"{key}={value}")
    return [*config, *rest]


def _is_value(word: str) -> bool:
    """Whether `word` belongs to the flag before it; `-0.5` does."""
    is_number = re.fullmatch(r"-[\d.]+(e[-+]?\d+)?", word) is not None
    return is_number or not (word.startswith("-") or "=" in word)


def _run_stage(stage: str, arguments: argparse.Namespace) -> int:
    from prefmill.cli.headlines import describe
    from prefmill.core.stage import load_stage
    from prefmill.distributed.launchers import is_one_of_ranks, leave_ranks, refuse_copies
    from prefmill.pipeline.launched import run_launched
    from prefmill.pipeline.local import RunOptions, run_plan
    from prefmill.pipeline.manual_submission import element, stage_plan

    if load_stage(stage).trains:  # other stages may run several tasks side by side under srun
        refuse_copies(os.environ)
    config = [arguments.config] if arguments.config else []
    plan, name = stage_plan(stage, [*config, *arguments.overrides])
    only = f"{stage}:{name}" if name else None
    if only is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        only = element(plan.tasks, os.environ).key
    if is_one_of_ranks(os.environ):
        run_launched(plan, only, arguments.force)
        return 0
    leave_ranks(os.environ)
    say = Console(arguments, plan.workspace / "logs" / plan.run)
    code = run_plan(plan, only, arguments.force, say, RunOptions(describe=describe))
    for task in plan.select(only) if only else plan.tasks:
        if code == 0:
            print(task.output)
    return code


def other_names(config: type[StrictConfig]) -> dict[str, list[str]]:
    """Of keys that older files and other tools call otherwise, those names."""
    found: dict[str, list[str]] = {}
    own: dict[str, str] = getattr(config, "OTHER_NAMES", {})
    former = {old: new for new, old in former_names(config).items()}
    for other, name in {**ALIASES, **former, **own}.items():
        # Where a stage has a key of that name itself, as evaluate has batch_size, it stands for no other.
        if name in config.model_fields and other not in config.model_fields:
            found.setdefault(name, []).append(other)
    return found


def _stage_help(name: str) -> str:
    from prefmill.cli.keys import keys_of
    from prefmill.core.stage import load_stage

    stage = load_stage(name)
    lines = ["keys:"]
    others = other_names(stage.config)
    for key in keys_of(stage.config):
        lines.append(f"  {key.name:<32} {key.type}, default {key.default}")
        lines += textwrap.wrap(key.description, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [f"      also: {', '.join(others[key.name])}"] if key.name in others else []
    lines += ["", "inputs:"]
    for name_of_input, reads in stage.reads.items():
        lines.append(f"  inputs.{name_of_input:<25} {reads.kind}{' (optional)' if reads.optional else ''}")
    return "\n".join([*lines, "", "example:", f"  python -m {STAGES}.{name} configs/{name}/demo.yaml run=mine"])
