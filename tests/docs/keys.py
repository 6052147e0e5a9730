"""Every stage's keys, for shell completion: `python -m tests.docs.keys` writes them from the configurations."""

from __future__ import annotations

import json

from prefmill.cli.completion import KEYS
from prefmill.core.stage import load_stage, stage_names


def text() -> str:
    """The content of the file."""
    return json.dumps({name: list(load_stage(name).config.model_fields) for name in stage_names()}, indent=1) + "\n"


if __name__ == "__main__":
    KEYS.write_text(text())
