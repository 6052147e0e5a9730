"""`python -m stages.STAGE`: one stage by hand, through the same worker as a pipeline."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from prefmill.cli.console import Console, add_verbosity, guarded
from prefmill.core.aliases import ALIASES
from prefmill.core.config import StrictConfig, former_names
from prefmill.core.places import STAGES
from prefmill.core.stage import Stage
from prefmill.distributed.devices import is_launched

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
_LONGEST_TYPE = 60


@dataclass(frozen=True)
class Key:
    """One key; `is_runtime` where it changes how a task runs and not its content."""

    name: str
    type: str
    default: str
    description: str
    is_runtime: bool


def keys_of(config: type[StrictConfig]) -> Iterator[Key]:
    """Every key at the top of a configuration, in its order."""
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        is_runtime = isinstance(extra, dict) and extra.get("identity") is False
        yield Key(name, type_of(field), default_of(field), field.description or "", is_runtime)


def type_of(field: FieldInfo) -> str:
    """A field's type in words, with its bounds."""
    # list[int].__name__ is `list` alone: a type with arguments is shown as it is written.
    plain = not hasattr(field.annotation, "__args__")
    text = getattr(field.annotation, "__name__", "") if plain else str(field.annotation)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("ExternalPath", "path").replace("Path", "path")
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), text)
    text = re.sub(r"Union\[(.*)\]", lambda found: found[1].replace(", ", " or "), text)
    text = text.replace(" | None", "").replace(" or NoneType", "").replace(" | ", " or ")
    # pydantic keeps each bound as an object with one attribute, named after the bound.
    bounds = [(sign, getattr(item, kind, None)) for item in field.metadata for kind, sign in _SIGNS.items()]
    limits = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return ", ".join([text if len(text) < _LONGEST_TYPE else "mapping", *limits])


def default_of(field: FieldInfo) -> str:
    """A field's default as one would write it; `required` where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "its defaults" if hasattr(value, "model_dump") else json.dumps(value, default=str).strip('"')


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
    needed = [f" inputs.{key}=FOLDER" for key, reads in stage.reads.items() if not reads.optional or reads.instead_of]
    example = f"  python -m {STAGES}.{name} configs/{name}/demo.yaml run=mine{''.join(needed)}"
    return "\n".join([*lines, "", "example:", example])
