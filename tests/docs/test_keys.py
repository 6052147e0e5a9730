"""Pages and completion know the keys that configurations have, and each key is described."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefmill.cli.completion import KEYS
from prefmill.core.aliases import ALIASES, REFUSED
from prefmill.core.stage import load_stage, stage_names
from tests.conftest import REPOSITORY
from tests.docs import keys

RUN = "run: python -m tests.docs.keys"


def test_completion_knows_every_key() -> None:
    assert KEYS.read_text() == keys.completion(), RUN


@pytest.mark.parametrize("name", stage_names())
def test_every_key_is_described_on_its_stages_page(name: str) -> None:
    fields = load_stage(name).config.model_fields
    assert [key for key, field in fields.items() if not field.description] == []
    text = keys.page(name).read_text()
    assert len(keys.BLOCK.findall(text)) == 1
    assert text == keys.filled(text, name), RUN


def test_help_has_the_descriptions() -> None:
    command = [sys.executable, "-m", "stages.sft", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    joined = " ".join(text.split())
    for key, field in load_stage("sft").config.model_fields.items():
        assert key in text
        assert " ".join(str(field.description).split()) in joined, key


def test_the_page_for_users_of_older_scripts_has_every_alias() -> None:
    text = (REPOSITORY / "docs" / "coming-from-your-scripts.md").read_text()
    missing = [f"| `{alias}` | `{key}` |" for alias, key in ALIASES.items()]
    missing += [f"| `{key}` | {instead} |" for key, instead in REFUSED.items()]
    assert [row for row in missing if row not in text] == []
