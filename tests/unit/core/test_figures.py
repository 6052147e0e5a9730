"""Numbers are written in one way, by one function."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import prefmill
from prefmill.core.figures import bounds, figure, with_interval


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (1.234, "+.2f", "+1.23"), (-1.2, "+.2f", "−1.20"), (0.001, "+.2f", "0.00"), (-0.001, "+.2f", "0.00"),
        (-0.001, ".2f", "0.00"), (0.636, ".0%", "64%"), (-0.001, ".0%", "0%"),
        (100.0, "+.0f", "+100"), (None, ".2f", "–"),
    ],
)  # fmt: skip
def test_a_number_has_a_true_minus_and_a_zero_no_sign(value: float | None, form: str, expected: str) -> None:
    assert figure(value, form) == expected


def test_an_interval_stands_in_parentheses_where_there_is_one() -> None:
    found = {"value": 0.636, "low": 0.61, "high": 0.67}
    assert with_interval(found, ".0%") == "64% (61% to 67%)"
    assert bounds({"low": -0.5, "high": 1}, "+.1f") == "−0.5 to +1.0"
    assert with_interval({"value": 2, "low": None, "high": None}) == "2.00"
    assert with_interval(None) == "–"


def test_no_other_place_writes_bounds() -> None:
    own = re.compile(
        r"""(low|high)['"]\]:[+.]|\{(low|high):[+.]|(low|high)\) \| replace|" to "\.join|\{high\}|interval \{"""
    )
    files = [path for kind in ("*.py", "*.jinja") for path in Path(prefmill.__file__).parent.rglob(kind)]
    assert len(files) > 300
    assert [path.name for path in files if own.search(path.read_text())] == ["figures.py"]
