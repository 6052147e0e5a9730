"""Rows are read as `json.loads` reads them, whatever they hold."""

from __future__ import annotations

import json
import math
import random
import struct

import numpy as np
import pytest

from prefmill.store.jsonl import parse_json, to_json


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}', "123456789012345678901234567890", "-0", "-0.0", "1.0", "1e5", "1e400", "5e-324", "NaN",
        "-Infinity", '"\\ud83d\\ude00"', '"\\ud800"', "\ufeff[1]", '"é\u2028"', "[[[[]]]]", "[" * 400 + "]" * 400,
    ],
)  # fmt: skip
def test_what_is_sound_or_suffered_comes_out_the_same(text: str) -> None:
    found, expected = parse_json(text.encode()), json.loads(text.encode())
    assert repr(found) == repr(expected)
    assert type(found) is type(expected)


@pytest.mark.parametrize("text", [b"01", b"[1,]", b'"\x01"', b"\xff", b"", b"{'a': 1}", b"1 2", b'"\\x"'])
def test_what_is_not_json_is_refused_in_the_same_words(text: bytes) -> None:
    with pytest.raises(ValueError) as expected:  # noqa: PT011 - whichever it is
        json.loads(text)
    with pytest.raises(type(expected.value)) as found:
        parse_json(text)
    assert str(found.value) == str(expected.value)


def test_numbers_keep_every_bit() -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        (number,) = struct.unpack("<d", struct.pack("<Q", draw.getrandbits(64)))
        if math.isfinite(number):
            assert parse_json(repr(number).encode()) == number
            assert json.loads(to_json(number)) == number


@pytest.mark.parametrize(
    "row",
    [
        {"a": [1, -0.0, 1.5, True, None, (2, 3)], "b": {"c": "é\u2028\x00\"\\\n"}, "d": 10**30},
        "NaN", {"Infinity": "-Infinity"}, "half \ud83d of a pair",
    ],
)  # fmt: skip
def test_rows_are_written_as_json_dumps_writes_them(row: object) -> None:
    assert to_json(row) == json.dumps(row, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("row", [math.nan, {"a": {"b": [math.inf]}}, {"NaN": -math.inf}])
def test_numbers_that_are_none_are_refused(row: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(row)


@pytest.mark.parametrize("row", [object(), {"a": np.float32(1)}])
def test_what_is_no_row_is_refused(row: object) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_json(row)
