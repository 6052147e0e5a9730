"""Splits: stable under growth, one title one split, shares as asked, an outside test set obeyed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.reviews.rows import RowError
from prefmill.reviews.splits import SplitConfig, read_test_set, split_of, title_key

DEFAULT = SplitConfig()
KNOWN = {"Paper 0": "train", "Paper 1": "test", "Paper 2": "dev", "Paper 17": "val"}


def config(**values: Any) -> SplitConfig:
    return validate(SplitConfig, values)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Deep Nets: A Study", "deep nets -- a study"),
        ("Café  learning", "CAFE\u0301 LEARNING"),
        ("Straße", "STRASSE"),
        ("Ａ ＢＣ", "a bc"),
    ],
)
def test_spellings_of_one_title_have_one_key(one: str, other: str) -> None:
    assert title_key(one) == title_key(other)


def test_different_titles_have_different_keys_and_none_is_refused() -> None:
    assert title_key("Deep nets 1") != title_key("Deep nets 2")
    assert title_key("深度学习") == "深度学习"
    with pytest.raises(RowError, match="without letters"):
        title_key("--- ?!")


@given(st.text())
def test_a_key_is_its_own_key(title: str) -> None:
    try:
        key = title_key(title)
    except RowError:
        return
    assert title_key(key) == key


def test_known_splits_never_change() -> None:
    """Moving a paper between splits would let a model be tested on what it was trained on."""
    found = {title: split_of(title_key(title), DEFAULT) for title in KNOWN}
    assert found == KNOWN


def test_shares_are_as_asked() -> None:
    counts = Counter(split_of(f"title {index}", DEFAULT) for index in range(20_000))
    for name in ("train", "val", "dev", "test"):
        assert abs(counts[name] / 20_000 - getattr(DEFAULT, name)) < 0.01


def test_another_seed_is_another_split() -> None:
    titles = [f"title {index}" for index in range(200)]
    assert [split_of(t, DEFAULT) for t in titles] != [split_of(t, config(seed=1)) for t in titles]


def test_a_share_of_zero_gets_no_paper() -> None:
    splits = config(train=1.0, val=0.0, dev=0.0, test=0.0)
    assert {split_of(f"title {index}", splits) for index in range(1000)} == {"train"}


def test_shares_that_do_not_sum_to_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is 1\.1; make it 1"):
        config(test=0.2)
    with pytest.raises(ConfigError, match="set test to 0"):
        config(test_set=str(tmp_path))


def listing(path: Path, content: bytes, **values: Any) -> SplitConfig:
    path.write_bytes(content)
    return config(test=0.0, train=0.865, test_set=str(path), **values)


def find(identifier: str, key: str) -> str | None:
    return {"p1": "p1", "alias": "p1"}.get(identifier) or {"deep nets": "p2"}.get(key)


def test_a_test_set_lists_ids_or_titles(tmp_path: Path) -> None:
    splits = listing(tmp_path / "t.txt", b"p1\n\nalias\nDeep  Nets!\n")
    assert read_test_set(splits, find) == {"p1", "p2"}
    assert read_test_set(DEFAULT, find) == frozenset()


def test_a_test_paper_that_is_not_there_is_an_error_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    with pytest.raises(InputError, match="1 entries of the test set") as caught:
        read_test_set(listing(path, b"p1\nunknown\n"), find)
    assert f"{path}:2" in str(caught.value)
    assert "require_test_papers" in str(caught.value)
    assert read_test_set(listing(path, b"p1\nunknown\n", require_test_papers=False), find) == {"p1"}


@pytest.mark.parametrize("content", [b"", b"unknown\n"])
def test_a_test_set_that_matches_nothing_is_always_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="match no ingested paper"):
        read_test_set(listing(tmp_path / "t.txt", content, require_test_papers=False), find)


def test_a_test_set_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    with pytest.raises(InputError, match="invalid UTF-8") as caught:
        read_test_set(listing(path, b"p1\n\xe9\n"), find)
    assert f"{path}:2" in str(caught.value)
