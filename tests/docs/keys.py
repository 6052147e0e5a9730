"""Every stage's keys as its configuration has them: `python -m tests.docs.keys` writes pages and shell completion."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from prefmill.cli.completion import KEYS
from prefmill.cli.stage import Key, keys_of
from prefmill.core.stage import load_stage, stage_names
from tests.conftest import REPOSITORY

BLOCK = re.compile(r"<!-- keys -->\n.*?<!-- end -->", re.DOTALL)
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|"
_RUNTIME = "These change how a task runs and not its content; changing them reruns nothing:"


def completion() -> str:
    """The file that shell completion reads."""
    return json.dumps({name: list(load_stage(name).config.model_fields) for name in stage_names()}, indent=1) + "\n"


def page(name: str) -> Path:
    """The page of a stage."""
    return REPOSITORY / "docs" / "stages" / f"{name}.md"


def filled(text: str, name: str) -> str:
    """The text of a stage's page with the tables of its keys."""
    return BLOCK.sub(lambda _: f"<!-- keys -->\n{tables(name)}\n<!-- end -->", text)


def tables(name: str) -> str:
    """The keys that decide a stage's content, then those that do not."""
    found = list(keys_of(load_stage(name).config))
    content, runtime = ([key for key in found if key.is_runtime is wanted] for wanted in (False, True))
    return "\n\n".join([*([_table(content)] if content else []), *([_RUNTIME, _table(runtime)] if runtime else [])])


def _table(keys: list[Key]) -> str:
    cells = [(f"`{key.name}`", *map(_cell, (key.type, key.default, key.description))) for key in keys]
    return "\n".join([_HEAD, *(f"| {' | '.join(row)} |" for row in cells)])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "or").replace("<", "&lt;")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    KEYS.write_text(completion())
    for stage in stage_names():
        page(stage).write_text(filled(page(stage).read_text(), stage))
