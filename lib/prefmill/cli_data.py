"""The commands of `prefmill` about data: import, pair, pairs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_data_commands(commands: Any) -> None:
    """Add every command of this module to the parser's commands."""
    imports = commands.add_parser("import", help="turn another tool's configuration into prefmill's")
    imports.add_argument("tool", choices=["llamafactory"], help="whose configuration it is")
    imports.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the file to import")
    imports.add_argument("--output", type=Path, help="where to write (default: configs/dpo/<name of the file>)")
    imports.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that file is run with (default: 1)")
    imports.set_defaults(command=_import)


def _import(arguments: argparse.Namespace) -> int:
    import yaml

    from prefmill.artifacts import write_atomic
    from prefmill.config import validate
    from prefmill.doors.llamafactory import import_config
    from prefmill.stage import load_stage

    imported = import_config(arguments.config, arguments.gpus)
    validate(load_stage("dpo").config, imported.config, where=arguments.config)
    output = arguments.output or Path("configs") / "dpo" / f"{arguments.config.stem}.yaml"
    header = f"# Imported from LLaMA-Factory's {arguments.config.name}.\n"
    notes = "".join(f"# {note}.\n" for note in imported.notes)
    write_atomic(output, header + notes + yaml.safe_dump(imported.config, sort_keys=False))
    print(f"wrote {output}", *imported.notes, f"next: python -m stages.dpo {output} run=NAME", sep="\n  ")
    return 0
