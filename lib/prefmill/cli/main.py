"""The `prefmill` command. Nothing here imports torch: `--help` and `status` answer at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefmill.cli.data import add_data_commands
from prefmill.cli.guard import guarded
from prefmill.cli.housekeeping import add_housekeeping
from prefmill.cli.runs import add_commands

EXAMPLES = """examples:
  prefmill run configs/pipelines/demo.yaml                  the whole pipeline on this machine
  prefmill run configs/pipelines/demo.yaml dpo.beta=0.2     again: only what depends on that key
  prefmill run configs/pipelines/demo.yaml --only dpo       one stage, or one task as dpo:clean
  prefmill submit configs/pipelines/demo.yaml --cluster configs/clusters/h100.yaml     the same as Slurm arrays
  prefmill plan configs/pipelines/demo.yaml                 what would run, and why
  prefmill why configs/pipelines/demo.yaml dpo:clean        the keys and inputs that make it stale
  prefmill status --watch                                   the newest run, task by task
  prefmill logs -f dpo                                      what its tasks print
  prefmill advance                                          mend what has failed on the cluster; safe at any time
  prefmill rerun dpo:clean                                  submit it again, whatever was decided
  prefmill doctor                                           what this machine lacks, and the fix
  prefmill tiny-models models/                              tiny models of the real architectures
  python -m stages.dpo configs/dpo/demo.yaml run=mine task=clean inputs.datasets=data/demo/build_datasets/all
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 a bug, 2 something the user can mend."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") for item in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that follow an option, which argparse does not take for what they are
        arguments.overrides = [*arguments.overrides, *rest]
    return guarded(lambda: arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefmill", description="From judgements to preference-tuned models, on a laptop or on Slurm.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _pipeline_command(commands, "run", "run a pipeline on this machine, doing only what is not up to date", _run)
    run.add_argument("--only", metavar="STAGE[:TASK]", help="limit the work to this stage or task")
    run.add_argument("--force", action="store_true", help="remake what is selected even if it is up to date")
    run.add_argument("--jobs", type=_positive, metavar="N", help="tasks at once (default: one per GPU, or one)")
    submit = _pipeline_command(commands, "submit", "submit to Slurm what is not complete or queued", _submit)
    submit.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="a file of configs/clusters/")
    submit.add_argument("--only", metavar="STAGE[:TASK]", help="limit the work to this stage or task")
    submit.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    _pipeline_command(commands, "plan", "show every task and whether it would run", _plan)
    _pipeline_command(commands, "why", "explain the state of a stage or task", _why, selects=True)

    add_commands(commands)
    add_data_commands(commands)
    add_housekeeping(commands)

    stages = commands.add_parser("stages", help="list the stages: what each reads and writes")
    stages.add_argument("--markdown", action="store_true", help="as the table of README.md")
    stages.set_defaults(command=_stages)

    doctor = commands.add_parser("doctor", help="check this machine and say how to mend what is missing")
    doctor.add_argument("--workspace", type=Path, help="the folder to check for space and write access")
    doctor.add_argument("--model", help="a hub name or folder to check access to")
    doctor.set_defaults(command=_doctor)

    tiny = commands.add_parser("tiny-models", help="build tiny models of the real architectures, for tests")
    tiny.add_argument("folder", type=Path, metavar="DIR", help="where to write them")
    tiny.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    tiny.set_defaults(command=_tiny_models)
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _pipeline_command(
    commands: Any, name: str, summary: str, command: Callable[..., int], selects: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("pipeline", type=Path, help="a file of configs/pipelines/")
    if selects:
        parser.add_argument("selector", metavar="STAGE[:TASK]", help="which stage or task")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="run=NAME, workspace=DIR or STAGE.KEY=VALUE")
    parser.set_defaults(command=command)
    return parser


def _load_plan(arguments: argparse.Namespace) -> Any:
    from prefmill.pipeline.plan import make_plan, read_pipeline

    return make_plan(read_pipeline(arguments.pipeline, arguments.overrides), arguments.pipeline)


def _run(arguments: argparse.Namespace) -> int:
    from prefmill.pipeline.local import run_plan

    plan, say = _load_plan(arguments), partial(print, flush=True)
    return run_plan(plan, arguments.only, arguments.force, say, arguments.jobs)


def _submit(arguments: argparse.Namespace) -> int:
    from prefmill.pipeline.plan import make_plan, read_pipeline
    from prefmill.slurm.cluster import read_cluster
    from prefmill.slurm.estimate import check_requests
    from prefmill.slurm.submit import submit

    pipeline = read_pipeline(arguments.pipeline, arguments.overrides)
    plan = make_plan(pipeline, arguments.pipeline)
    cluster = read_cluster(arguments.cluster)
    if not arguments.dry_run:  # one may print scripts for another site
        check_requests(pipeline, plan, cluster)
    submit(pipeline, plan, arguments.pipeline, cluster, arguments.only, arguments.dry_run)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from prefmill.pipeline.state import inspect

    plan = _load_plan(arguments)
    states = inspect(plan)
    print(f"run {plan.run} in {plan.workspace}")
    for task in plan.tasks:
        state = states[task.key]
        print(f"  {task.key:<28} {state.freshness:<9} {'; '.join(state.reasons)}")
    return 0


def _why(arguments: argparse.Namespace) -> int:
    from prefmill.pipeline.state import inspect
    from prefmill.slurm.status import explain

    plan = _load_plan(arguments)
    states, by_key = inspect(plan), {task.key: task for task in plan.tasks}
    for task in plan.select(arguments.selector):
        pending = [task.key]
        while pending:
            key = pending.pop(0)
            state = states[key]
            known = explain(plan.workspace, plan.run, key, by_key[key].logs) if state.freshness != "complete" else []
            print(f"{key}: {state.freshness}", *state.reasons, *known, sep="\n  ")
            pending += [other for other in state.waiting_for if other not in pending]
    return 0


def _stages(arguments: argparse.Namespace) -> int:
    from prefmill.core.stage import describe_stages

    print(describe_stages(arguments.markdown))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from prefmill.cli.doctor import examine

    return examine(arguments.workspace or _workspace(), arguments.model)


def _tiny_models(arguments: argparse.Namespace) -> int:
    from prefmill.demo.tiny_models import build_all

    for path in build_all(arguments.folder, arguments.seed):
        print(path)
    return 0


def _workspace() -> Path:
    from prefmill.pipeline.plan import default_workspace

    return default_workspace()


if __name__ == "__main__":
    sys.exit(main())
