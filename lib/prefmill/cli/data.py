"""The commands of `prefmill` about data: import, pair, pairs, rate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prefmill.cli.pipelines import OF_RUN, new_command, run_of


def add_data_commands(commands: Any) -> None:
    """Add every command of this module to the parser's commands."""
    imports = new_command(commands, "import", "turn another tool's configuration into prefmill's", _import)
    imports.add_argument("tool", choices=["llamafactory"], help="whose configuration it is")
    imports.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="the file to import")
    imports.add_argument("--output", type=Path, help="where to write (default: configs/<stage>/<name of the file>)")
    imports.add_argument("--keys", action="store_true", help="say what becomes of every key, and import nothing")
    imports.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that file is run with (default: 1)")

    pair = new_command(commands, "pair", "what a run knows of a pair: texts, checklist, margins", _pair, "--workspace")
    pair.add_argument("pair_id", metavar="ID", help="CHOSEN_ID:REJECTED_ID, as in the dpo datasets")
    pair.add_argument("run", nargs="?", default="latest", help="the run's name (default: the newest)")
    wrong = "the pairs of a preference training, or those that look wrong"
    pairs = new_command(commands, "pairs", wrong, _pairs, *OF_RUN)
    pairs.add_argument("--suspect", action="store_true", help="never learned, forgotten, explained by length alone")
    pairs.add_argument("--export", type=Path, metavar="FILE", help="write suspects as an exclude file")
    new_command(commands, "rate", "the address of the page on which a run's images are rated", _rate, *OF_RUN)
    for command in (pair, pairs):
        command.add_argument("--task", help="TASK or STAGE:TASK, where a run trains on preferences more than once")


def _import(arguments: argparse.Namespace) -> None:
    import yaml

    from prefmill.core.config import validate
    from prefmill.core.errors import ConfigError
    from prefmill.core.files import write_atomic
    from prefmill.core.places import STAGES
    from prefmill.core.stage import load_stage
    from prefmill.integrations.llamafactory import import_config
    from prefmill.integrations.llamafactory_keys import describe_keys

    if arguments.keys:
        print(*describe_keys(), sep="\n")
        return
    if arguments.config is None:
        raise ConfigError("no file to import", fix="name one, or give --keys")
    imported = import_config(arguments.config, arguments.gpus)
    # Before it is written: a file that the stage would refuse is not left behind.
    validate(load_stage(imported.stage).config, imported.config, where=arguments.config)
    output = arguments.output or Path("configs") / imported.stage / f"{arguments.config.stem}.yaml"
    header = f"# Imported from LLaMA-Factory's {arguments.config.name}.\n"
    notes = "".join(f"# {note}.\n" for note in imported.notes)
    write_atomic(output, header + notes + yaml.safe_dump(imported.config, sort_keys=False))
    then = f"next: python -m {STAGES}.{imported.stage} {output} run=NAME"
    print(f"wrote {output}", *imported.notes, then, sep="\n  ")


def _pair(arguments: argparse.Namespace) -> None:
    from prefmill.pairs.forensics import margins_logs, read_histories
    from prefmill.report.pair_report import tell

    logs, run = _run_logs(arguments)
    # A run that has trained on no preferences still has texts and scores to show.
    trained = any(logs.glob("*/*/margins"))
    histories = read_histories(margins_logs(logs, arguments.task)) if trained else {}
    print(tell(logs.parents[1], run, arguments.pair_id, histories))


def _pairs(arguments: argparse.Namespace) -> None:
    from prefmill.pairs.forensics import length_effect, margins_logs, read_histories, suspects, write_exclude

    logs, _ = _run_logs(arguments)
    histories = read_histories(margins_logs(logs, arguments.task))
    effect = length_effect(histories.values())
    found = suspects(histories)
    learned = sum(item.last > 0 for item in histories.values())
    print(
        f"{len(histories):,} pairs, {learned:,} with a last margin above 0, {len(found):,} suspect; "
        f"length predicts a margin of {effect.slope:.4g} per token (correlation {effect.correlation:.2f})"
    )
    if not any(len(item.sightings) > 1 for item in histories.values()):
        print("every pair was seen once: whether one is learned shows from the second epoch on")
    reasons = {item.history.pair_id: ", ".join(item.reasons) for item in found}
    listed = [item.history for item in found] if arguments.suspect else list(histories.values())
    for history in listed:
        margins = " ".join(f"{sighting.margin:8.3f}" for sighting in history.sightings)
        print(f"{history.pair_id}  {margins}  {reasons.get(history.pair_id, '')}".rstrip())
    if arguments.export:
        write_exclude(arguments.export, found)
        print(f"wrote {arguments.export}: give it to build_datasets as exclude")


def _rate(arguments: argparse.Namespace) -> None:
    from prefmill.images.rate import open_pages

    logs, _ = _run_logs(arguments)
    for lines in open_pages(logs):
        print(lines, end="")


def _run_logs(arguments: argparse.Namespace) -> tuple[Path, str]:
    """The folder of a run's logs, and its name."""
    from prefmill.pipeline.run_record import no_such_run

    workspace, run = run_of(arguments)
    logs = workspace / "logs" / run
    if not logs.is_dir():
        raise no_such_run(workspace, run)
    return logs, run
