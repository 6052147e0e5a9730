"""Rows are read as `json.loads` reads them, whatever they hold."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.core.errors import InputError
from prefmill.store.jsonl import parse_json, read_jsonl, to_json


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "\\": 1", "b": {"a": ":"}}',
        "123456789012345678901234567890", "-0", "-0.0", "1.0", "1e5", "1e400", "5e-324", "NaN",
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


@pytest.mark.parametrize(
    "text",
    [
        b'{"id":1,"id":2}', b'{"id" : 1,\t"id"\n: 2}', b'{"a": ": \\": x", "id": null, "id": null}',
        b'{"id": 1, "\\u0069d": 2}',
        b'{"a": [{"b": {}}, {"id": [1], "c": {"d": ":"}, "id": 1}]}',
        b'\xef\xbb\xbf{"id":1,"id":1}', b'[[{"id":1,"id":1}]]',
    ],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused_by_name(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^the key 'id' stands there twice$"):
        parse_json(text)


JSON = st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(JSON, st.sampled_from([(",", ":"), (", ", ": "), (",", "  : ")]), st.booleans())
def test_keys_that_stand_once_are_taken(value: object, separators: tuple[str, str], ascii_only: bool) -> None:
    text = json.dumps(value, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert parse_json(text) == value


def test_a_file_with_a_key_twice_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ratings.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 1, "id": 2}\n')
    with pytest.raises(InputError, match=r"ratings\.jsonl:2\n.*the key 'id' stands there twice"):
        list(read_jsonl(path))


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
