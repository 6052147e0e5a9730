"""Numbers that YAML 1.1 reads in base 60 or 8: `12:00:00` is 43200 to it, and `010` is 8."""

from __future__ import annotations

import re

from prefmill.core.errors import ConfigError

_ODD = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")

_MAYBE = re.compile(r"\b0[\d_]|\d:\d")


def require_plain_numbers(text: str, where: object) -> None:
    """Raise ConfigError for such a number in YAML, unless it is in quotes; yaml.YAMLError for what is no YAML."""
    import yaml

    if not _MAYBE.search(text):  # nearly no file has one: it is parsed no second time
        return
    for event in yaml.parse(text):
        if isinstance(event, yaml.ScalarEvent) and event.style is None and _ODD.fullmatch(event.value):
            raise ConfigError(
                "a number that YAML reads in base 60 or 8", where=where,
                got=f"{event.value}, which it takes for {yaml.safe_load(event.value)}", expected="a decimal number",
                fix=f"write that number, or '{event.value}' in quotes where it is a text",
            )  # fmt: skip
