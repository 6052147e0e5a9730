"""Pages and messages avoid the words that readers stumbled over."""

from __future__ import annotations

import pytest

from tests.docs import words


def test_pages_and_messages_are_plain() -> None:
    assert words.main() == 0


@pytest.mark.parametrize(
    ("sentence", "fine"),
    [
        ("two seeds a prompt", "two seeds per prompt"),
        ("its review scores higher in 95% of meetings", "it wins 95 % of head-to-head comparisons"),
        ("failed tasks that can be mended", "failed tasks that can be retried"),
        ("against itself as it was before", "with the starting model as reference"),
    ],
)
def test_the_words_of_the_list_are_found(sentence: str, fine: str) -> None:
    assert list(words.found(sentence)) != []
    assert list(words.found(fine)) == []
