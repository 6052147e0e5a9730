"""The commands of `prefmill` about all runs of a workspace: runs, compare, rm, gc, restore."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from prefmill.cli.pipelines import new_command, workspace_of
from prefmill.core.figures import columns

if TYPE_CHECKING:
    from prefmill.report.run_comparison import RunComparison


def add_housekeeping(commands: Any) -> None:
    """Add every command of this module to the parser's commands."""
    shown = ("--workspace", "--json")
    new_command(commands, "runs", "list the runs: state, age, size and headline", _runs, *shown)
    compared = "compare runs: keys that differ, metrics with paired intervals"
    compare = new_command(commands, "compare", compared, _compare, *shown)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="the runs' names; differences are to the first")
    compare.add_argument("--output", type=Path, metavar="FILE", help="the page (default: data/compare/RUN-RUN.html)")
    remove = new_command(commands, "rm", "delete runs with all their outputs and logs", _remove, "--workspace")
    remove.add_argument("runs", nargs="+", metavar="RUN", help="the runs' names")
    collected = "delete caches, superseded outputs and intermediate checkpoints"
    collect = new_command(commands, "gc", collected, _collect, "--workspace")
    collect.add_argument("runs", nargs="*", metavar="RUN", help="the runs' names (default: all, and the caches)")
    for command in (remove, collect):
        command.add_argument("--yes", action="store_true", help="delete; without it only the list is printed")
        gone = "do not ask Slurm what is queued: the runs' cluster is gone"
        command.add_argument("--without-slurm", action="store_true", help=gone)
    restored = "bring back the output that a rerun superseded"
    new_command(commands, "restore", restored, _restore, "--workspace", "selector", "--run")


def _named_runs(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The workspace, and each run named once, by its own name."""
    from prefmill.pipeline.run_record import own_name

    workspace = workspace_of(arguments)
    _tell_closed(workspace)
    return workspace, list(dict.fromkeys(own_name(workspace, run) for run in arguments.runs))


def _tell_closed(workspace: Path) -> None:
    from prefmill.pipeline.run_record import closed_runs

    if closed := closed_runs(workspace):
        print(f"not readable for you: {', '.join(closed)} (they may use the caches: gc keeps those)", file=sys.stderr)


def _runs(arguments: argparse.Namespace) -> None:
    from prefmill.core.places import LATEST
    from prefmill.pipeline.run_record import no_such_run
    from prefmill.pipeline.runs import list_runs

    workspace, now = workspace_of(arguments), time.time()
    found = list_runs(workspace)
    _tell_closed(workspace)
    if arguments.json:
        print(json.dumps([asdict(run) for run in found], indent=1))
        return
    if not found:
        print(no_such_run(workspace, LATEST))
        return
    rows = [
        (run.name, run.state, f"{run.done}/{run.total}", age(now - run.changed), size(run.size), cut(run.headline))
        for run in found
    ]
    print_table(("RUN", "STATE", "TASKS", "AGE", "SIZE", "HEADLINE"), rows)


def _compare(arguments: argparse.Namespace) -> None:
    from prefmill.core.errors import PipelineError
    from prefmill.core.files import write_atomic
    from prefmill.core.places import COMPARISONS
    from prefmill.core.statistics import Resampling
    from prefmill.pipeline.run_record import run_tasks
    from prefmill.report.run_comparison import compare_runs, comparison_page, finished_outputs

    workspace, runs = _named_runs(arguments)
    if len(runs) < 2:
        raise PipelineError(f"nothing to compare {runs[0]} with", fix="name two runs or more: prefmill compare RUN RUN")
    outputs = {run: finished_outputs(run_tasks(workspace, run)) for run in runs}
    found = compare_runs(outputs, Resampling(2000, 0, 0.95))
    if arguments.json:
        print(json.dumps(asdict(found), indent=1))
        return
    _print_comparison(found)
    page = arguments.output or workspace / "data" / COMPARISONS / f"{'-'.join(found.runs)}.html"
    write_atomic(page, comparison_page(found))
    print(page)


def _print_comparison(found: RunComparison) -> None:
    from prefmill.report.run_comparison import show

    for heading, lines in (("KEY", found.keys), ("METRIC", found.metrics)):
        rows = [(line.task, line.name, *map(show, line.values)) for line in lines]
        print_table(("TASK", heading, *found.runs), rows) if rows else print(f"no {heading.lower()} differs")
        print()
    if paired := [(line.task, line.measure, line.run, str(line)) for line in found.paired]:
        print_table(("TASK", "PAIRED BY PAPER", "RUN", f"DIFFERENCE TO {found.runs[0]} (95% INTERVAL)"), paired)
    elif not found.notes:
        print("nothing to pair by paper: no task evaluated reviews in both")
    for note in found.notes:
        print(f"not paired: {note}")


def _remove(arguments: argparse.Namespace) -> None:
    from prefmill.core.errors import PipelineError
    from prefmill.pipeline.runs import point_latest_away, remove_run

    workspace, runs = _named_runs(arguments)
    if queued := _queued(arguments, workspace, runs):
        raise PipelineError(
            f"jobs of run {queued[0]} are queued or running", fix=f"end them: prefmill cancel --run {queued[0]}"
        )
    # All names are looked up before anything is deleted: one wrong name deletes nothing.
    found = [item for run in runs for item in remove_run(workspace, run)]
    if _deleted(found, workspace, arguments.yes):
        for run in runs:
            point_latest_away(workspace, run)


def _collect(arguments: argparse.Namespace) -> None:
    from prefmill.pipeline.run_record import run_names, run_tasks
    from prefmill.pipeline.runs import removable

    workspace, runs = _named_runs(arguments)
    for run in runs:
        run_tasks(workspace, run)  # refuses a name that is no run's
    queued = _queued(arguments, workspace, run_names(workspace))
    _deleted(removable(workspace, runs or run_names(workspace), queued), workspace, arguments.yes)


def _queued(arguments: argparse.Namespace, workspace: Path, runs: Sequence[str]) -> list[str]:
    """Those of `runs` that have jobs in Slurm's queue; raises PipelineError where it does not say."""
    from prefmill.core.errors import PipelineError
    from prefmill.slurm.sightings import live_elements
    from prefmill.slurm.submission import submissions

    if arguments.without_slurm or shutil.which("squeue") is None:  # a copy of what a cluster made
        return []
    found = {run: live_elements(submissions(workspace, run)) for run in runs}
    if silent := [run for run, live in found.items() if live is None]:
        raise PipelineError(
            f"Slurm does not say what is queued of run {silent[0]}",
            fix="try again when `squeue` answers; where that cluster is gone for good, add --without-slurm",
        )  # fmt: skip
    return [run for run, live in found.items() if live]


def _deleted(found: Sequence[Any], workspace: Path, sure: bool) -> bool:
    """List what there is to delete and, where the user is `sure`, delete it."""
    from prefmill.pipeline.runs import remove

    if not found:
        print("nothing to delete")
        return sure
    rows = [(size(item.size), item.reason, str(item.path.relative_to(workspace))) for item in found]
    print_table(("SIZE", "REASON", "PATH"), rows)
    total = size(sum(item.size for item in found))
    if sure:
        remove(found)
    print(f"deleted {total}" if sure else f"nothing was deleted; with --yes this frees {total}")
    return sure


def _restore(arguments: argparse.Namespace) -> None:
    from prefmill.pipeline.run_record import run_tasks, select_tasks
    from prefmill.pipeline.runs import restore

    workspace = workspace_of(arguments)
    for task in select_tasks(run_tasks(workspace, arguments.run), arguments.selector):
        restore(Path(task["output"]), Path(task["logs"]))
        print(f"{task['key']} restored: {task['output']}")


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under their heads; nothing but the heads where there are no rows."""
    print(*columns([heads, *rows]), sep="\n")


def cut(text: str, width: int = 90) -> str:
    """The beginning of `text`, as much as fits beside a table's other columns."""
    return shorten(text, width, placeholder=" …")


def size(num_bytes: float) -> str:
    """Bytes for people, in steps of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def age(seconds: float) -> str:
    """Time passed for people: minutes, hours or days; none where a clock was set back since."""
    if seconds < 7200:
        return f"{max(0.0, seconds) / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d"
