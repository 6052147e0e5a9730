"""The commands of `prefmill` before a run on a cluster (estimate, rehearse) and while it is under way."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prefmill.cli.pipelines import OF_RUN, PLANNED, at_least, load_plan, new_command, run_of
from prefmill.core.terminal import Say


def add_commands(commands: Any) -> None:
    """Add every command of this module to the parser's commands."""
    status = new_command(commands, "status", "show a run, task by task", _status, *OF_RUN, "--json")
    status.add_argument("--watch", action="store_true", help="refresh until the run ends")
    status.add_argument("--every", type=_seconds, default=10.0, metavar="SECONDS", help="with --watch (default: 10)")

    new_command(commands, "verify", "hash every finished output of a run again", _verify, *OF_RUN)

    selects = ("--workspace", "selector", "--run")
    logs = new_command(commands, "logs", "print the end of the logs of a stage or task", _logs, *selects)
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing new lines")
    logs.add_argument("-n", "--lines", type=at_least(0), default=10, help="lines of each log (default: 10)")

    repaired = "resubmit failed tasks that can be retried (safe to run anytime)"
    new_command(commands, "advance", repaired, _advance, *OF_RUN)
    new_command(commands, "rerun", "submit a stage or task again", _rerun, *selects)
    ended = "end the jobs of a run, a stage or a task"
    cancel = new_command(commands, "cancel", ended, _cancel, "--workspace", "--run")
    cancel.add_argument("selector", nargs="?", metavar="STAGE[:TASK]", help="default: everything")

    estimate = new_command(
        commands, "estimate", "check memory and limits before you queue", _estimate, *PLANNED, "--json"
    )
    estimate.add_argument("--cluster", type=Path, metavar="FILE", help="a file of configs/clusters/")
    estimate.add_argument(
        "--measure", action="store_true", help="run slices of scoring and training here and forecast their hours"
    )
    estimate.add_argument("--only", metavar="STAGE[:TASK]", help="with --measure: this stage or task")
    estimate.add_argument("--gpu-memory", type=float, metavar="GB", help="of a GPU, where Slurm does not name its type")
    drilled = "the whole pipeline on the cluster, tiny, with a fire drill"
    new_command(commands, "rehearse", drilled, _rehearse, *PLANNED, "--cluster")


def _seconds(text: str) -> float:
    if text.replace(".", "", 1).isdecimal():
        return float(text)
    raise argparse.ArgumentTypeError(f"a time in seconds, 0 or more, not '{text}'")


def _status(arguments: argparse.Namespace) -> int:
    from prefmill.slurm.status import show_status, status_json, watch_status

    workspace, run = run_of(arguments)
    if arguments.json:
        return status_json(workspace, run)
    return watch_status(workspace, run, arguments.every) if arguments.watch else show_status(workspace, run)


def _verify(arguments: argparse.Namespace) -> int:
    from prefmill.pipeline.runs import verify_run

    return verify_run(*run_of(arguments))


def _logs(arguments: argparse.Namespace) -> None:
    from prefmill.slurm.logs import show_logs

    show_logs(*run_of(arguments), arguments.selector, arguments.lines, arguments.follow)


def _advance(arguments: argparse.Namespace) -> None:
    from prefmill.slurm.advance import advance

    advance(*run_of(arguments))


def _rerun(arguments: argparse.Namespace) -> None:
    from prefmill.slurm.rerun import rerun

    rerun(*run_of(arguments), arguments.selector)


def _cancel(arguments: argparse.Namespace) -> None:
    from prefmill.slurm.rerun import cancel

    cancel(*run_of(arguments), arguments.selector)


def _estimate(arguments: argparse.Namespace) -> int:
    from prefmill.core.errors import PipelineError

    lines: list[str] = []
    pipeline, plan = load_plan(arguments)
    # With --json nothing may be printed before the JSON.
    say = lines.append if arguments.json else print
    try:
        _check_and_forecast(arguments, pipeline, plan, say)
    except PipelineError as error:
        # That a plan cannot start is the answer that was asked for: a script gets it as JSON too.
        if not arguments.json:
            raise
        print(json.dumps({"starts": False, "lines": lines, "error": str(error)}, indent=1))
        return 2
    if arguments.json:
        print(json.dumps({"starts": True, "lines": lines, "error": None}, indent=1))
    return 0


def _check_and_forecast(arguments: argparse.Namespace, pipeline: Any, plan: Any, say: Say) -> None:
    from prefmill.slurm.cluster import read_cluster, resources_for
    from prefmill.slurm.estimate import estimate, estimate_here
    from prefmill.slurm.forecast import forecast

    resources = {}
    if arguments.cluster is not None:
        cluster = read_cluster(arguments.cluster)
        estimate(pipeline, plan, cluster, arguments.gpu_memory, say)
        resources = {name: resources_for(cluster, name, item.resources) for name, item in pipeline.stages.items()}
    elif not arguments.measure:
        estimate_here(plan, arguments.gpu_memory, say)
    if arguments.measure:
        forecast(plan, resources, say, (lambda _: None) if arguments.json else print, arguments.only)


def _rehearse(arguments: argparse.Namespace) -> int:
    from prefmill.slurm.cluster import read_cluster
    from prefmill.slurm.rehearse import rehearse

    return rehearse(*load_plan(arguments), arguments.pipeline, read_cluster(arguments.cluster))
