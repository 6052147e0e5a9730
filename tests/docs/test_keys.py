"""What completion knows of keys is what the configurations have."""

from __future__ import annotations

from prefmill.cli.completion import KEYS
from tests.docs import keys


def test_completion_knows_every_key() -> None:
    assert KEYS.read_text() == keys.text(), "run: python -m tests.docs.keys"
