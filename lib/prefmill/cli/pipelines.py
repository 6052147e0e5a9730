"""The commands of `prefmill` that take a pipeline: run, submit, plan, why."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefmill.cli.console import Console, add_verbosity
from prefmill.core.terminal import paint_states, say_on

Command = Callable[[argparse.Namespace], int | None]
_NEWEST = {"default": "latest", "help": "the run's name (default: the newest)"}
_COMMON: dict[str, dict[str, Any]] = {  # what several commands take, in the same words
    "--workspace": {"type": Path, "help": "the folder that holds logs/ (default: the repository)"},
    "run": {"nargs": "?", **_NEWEST},
    "--run": _NEWEST,
    "selector": {"metavar": "STAGE[:TASK]", "help": "which stage or task"},
    "pipeline": {"type": Path, "help": "a file of configs/pipelines/"},
    # With a default argparse does not call it required where another argument is missing.
    "overrides": {
        "nargs": "*", "default": [], "metavar": "key=value", "help": "run=NAME, workspace=DIR or STAGE.KEY=VALUE",
    },
    "--cluster": {"type": Path, "required": True, "metavar": "FILE", "help": "a file of configs/clusters/"},
    "--only": {"metavar": "STAGE[:TASK]", "help": "limit the work to this stage or task"},
    "--json": {"action": "store_true", "help": "print JSON"},
}  # fmt: skip
PLANNED, OF_RUN = ("pipeline", "overrides"), ("--workspace", "run")


def add_pipeline_commands(commands: Any) -> None:
    """Add every command of this module to the parser's commands."""
    run = new_command(commands, "run", "run a pipeline on this machine: only what changed", _run, *PLANNED, "--only")
    run.add_argument("--force", action="store_true", help="remake the selected tasks even if they are up to date")
    run.add_argument(
        "--jobs", type=at_least(1), metavar="N",
        help="tasks at once (default: one per GPU, or one); on CPUs each takes every core: OMP_NUM_THREADS shares them",
    )  # fmt: skip
    run.add_argument("--dry-run", action="store_true", help="print which tasks would run, and why; run nothing")
    run.add_argument(
        "--keep-going", action=argparse.BooleanOptionalAction, default=True,
        help="after a failure run the tasks that do not need the failed one (default), or start nothing more",
    )  # fmt: skip
    add_verbosity(run)
    summary = "submit to Slurm the tasks that are not complete or queued"
    submit = new_command(commands, "submit", summary, _submit, *PLANNED, "--cluster", "--only")
    submit.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    new_command(commands, "plan", "show every task and whether it would run", _plan, *PLANNED, "--json")
    summary = "explain the state of a stage or task"
    new_command(commands, "why", summary, _why, "pipeline", "selector", "overrides", "--json")


def new_command(commands: Any, name: str, summary: str, command: Command, *takes: str) -> argparse.ArgumentParser:
    """The parser of a command of `commands`, with those of the common arguments that it takes."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=command)
    for argument in takes:
        parser.add_argument(argument, **_COMMON[argument])
    return parser


def load_plan(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The pipeline and its plan."""
    from prefmill.pipeline.checked_plan import plan_to_run
    from prefmill.pipeline.plan import read_pipeline

    pipeline = read_pipeline(arguments.pipeline, arguments.overrides)
    return pipeline, plan_to_run(pipeline, arguments.pipeline)


def workspace_of(arguments: argparse.Namespace) -> Path:
    """The folder that holds the runs."""
    from prefmill.core.places import default_workspace

    workspace: Path = (arguments.workspace or default_workspace()).absolute()
    return workspace


def run_of(arguments: argparse.Namespace) -> tuple[Path, str]:
    """The workspace and the run's own name, where `latest` was given."""
    from prefmill.pipeline.run_record import own_name

    workspace = workspace_of(arguments)
    # Followed once: another run may be the newest before a long command has ended.
    return workspace, own_name(workspace, arguments.run)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number, `least` or more."""

    def number(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"a whole number, {least} or more, not '{text}'")

    return number


def _run(arguments: argparse.Namespace) -> int:
    from prefmill.cli.headlines import describe
    from prefmill.distributed.launchers import leave_ranks, refuse_copies
    from prefmill.pipeline.checked_plan import require_here
    from prefmill.pipeline.local import RunOptions, run_plan
    from prefmill.slurm.sightings import live_elements
    from prefmill.slurm.submission import submissions

    refuse_copies(os.environ)
    leave_ranks(os.environ)
    _, plan = load_plan(arguments)
    if arguments.dry_run:
        return _show_plan(plan, arguments.only, arguments.force)
    require_here(plan, _selected(plan, arguments.only))
    say = Console(arguments, plan.workspace / "logs" / plan.run)
    if live := live_elements(submissions(plan.workspace, plan.run)):
        say(f"! {len(live)} jobs of this run are queued or running, and make what this command finds unmade: "
            f"`prefmill cancel --run {plan.run}` ends them")  # fmt: skip
    options = RunOptions(arguments.jobs, arguments.keep_going, describe)
    return run_plan(plan, arguments.only, arguments.force, say, options)


def _submit(arguments: argparse.Namespace) -> None:
    from prefmill.slurm.cluster import read_cluster
    from prefmill.slurm.policy import check_requests, read_offer

    with ThreadPoolExecutor(1) as pool:  # Slurm answers while the plan is made
        offer = None if arguments.dry_run else pool.submit(read_offer)  # a dry run may be for another site
        from prefmill.slurm.submit import submit

        pipeline, plan = load_plan(arguments)
        cluster = read_cluster(arguments.cluster)
    if offer is not None:
        check_requests(pipeline, plan, cluster, offer.result())
    _tell_not_here(plan, arguments.only)
    submit(pipeline, plan, arguments.pipeline, cluster, arguments.only, arguments.dry_run)


def _plan(arguments: argparse.Namespace) -> int:
    return _show_plan(load_plan(arguments)[1], as_json=arguments.json)


def _show_plan(plan: Any, only: str | None = None, force: bool = False, as_json: bool = False) -> int:
    from prefmill.pipeline.state import inspect

    # Of all tasks, where only some are shown too: a task's state follows from those it reads from.
    states, tasks = inspect(plan), _selected(plan, only)
    if as_json:
        rows = [{"task": task.key, "output": str(task.output), **asdict(states[task.key])} for task in tasks]
        print(json.dumps({"run": plan.run, "workspace": str(plan.workspace), "tasks": rows}, indent=1))
        return 0
    print(f"run {plan.run} in {plan.workspace}")
    for task in tasks:
        state = states[task.key]
        forced = ("remade as asked (--force)",) if force and state.freshness == "complete" else state.reasons
        print(paint_states(f"  {task.key:<28} {state.freshness:<9} {'; '.join(forced)}"))
    _tell_not_here(plan, only)
    return 0


def _selected(plan: Any, only: str | None) -> Any:
    return plan.select(only) if only else plan.tasks


def _tell_not_here(plan: Any, only: str | None) -> None:
    """Name what tasks are to read and this machine lacks; the disks of compute nodes may have it."""
    from prefmill.pipeline.checked_plan import closed, not_here

    for key, path in not_here(plan, _selected(plan, only)):
        say_on(f"! {key} is to read {path}{closed(path) or ', which is not on this machine'}")


def _why(arguments: argparse.Namespace) -> None:
    from prefmill.pipeline.state import inspect

    _, plan = load_plan(arguments)
    states = inspect(plan)
    pending = [task.key for task in plan.select(arguments.selector)]
    told: dict[str, Any] = {}
    while pending:
        key = pending.pop(0)
        told[key] = {**asdict(states[key]), "last_attempt": _last_attempt(plan, key, states[key])}
        pending += [other for other in states[key].waiting_for if other not in [*pending, *told]]
    if arguments.json:
        print(json.dumps(told, indent=1))
        return
    for key, state in told.items():
        print(paint_states(f"{key}: {state['freshness']}"), *state["reasons"], *state["last_attempt"], sep="\n  ")


def _last_attempt(plan: Any, key: str, state: Any) -> list[str]:
    """What is known of the last attempt at a task that is not complete."""
    from prefmill.slurm.status import explain

    (task,) = plan.select(key)
    return explain(plan.workspace, plan.run, key, task.logs) if state.freshness != "complete" else []
