"""The rating page for everybody: on a phone by touch alone, by keyboard, and without a serious finding of axe-core."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from browser import Page, started
from image_artifacts import make_images, publish_as
from rating_pages import Asking, answers, asking

from prefmill.store.jsonl import read_jsonl, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timing]
_SIZES = {1280: 800, 390: 844, 640: 360}  # the last: a window at 200 %


@pytest.mark.parametrize("width", _SIZES)
def test_anybody_can_use_it(chromium: str, tmp_path: Path, width: int) -> None:
    images = make_images(tmp_path / "images", num_prompts=3)
    with (
        started(chromium, tmp_path / "profile") as browser,
        asking(tmp_path, images, dimensions=["overall"]) as people,
        browser.tab() as page,
    ):
        page.resize(width, _SIZES[width])
        page.open(people.url)
        page.wait("!document.getElementById('who').hidden")
        assert page.accessibility_faults() == []
        page.read("document.getElementById('name').value = 'ann'")
        _activate(page, "#who button", width)
        page.wait("document.body.dataset.state === 'ann/0'")
        assert page.accessibility_faults() == []
        assert page.read("document.documentElement.scrollWidth") <= width
        boxes = [
            page.read(f"(({{top, bottom, left}}) => [top, bottom, left])({_box(side)})") for side in ("left", "right")
        ]
        assert max(bottom for _, bottom, _ in boxes) <= _SIZES[width]  # both whole on the first screen
        if width == 390:  # one above the other
            assert boxes[0][2] == boxes[1][2]
            assert boxes[0][1] <= boxes[1][0]
            heights = page.read("[...document.querySelectorAll('footer button')].map(button => button.offsetHeight)")
            assert min(heights) >= 44
        else:
            assert boxes[0][0] == boxes[1][0]
        _answers_all(page, people, width)
        assert page.accessibility_faults() == []
        assert page.console() == []
        assert {url.split("/")[2] for url in page.requested() if url.startswith("http")} == {f"127.0.0.1:{people.port}"}
        assert people.wait() == 0


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (360, 640)])
def test_a_long_prompt_leaves_both_pictures_whole(chromium: str, tmp_path: Path, width: int, height: int) -> None:
    """Of the lower picture a fifth lay under the buttons: people rated what they did not see."""
    make_images(tmp_path / "images", num_prompts=2)
    rows = list(read_jsonl(tmp_path / "images" / "images.jsonl"))
    write_jsonl(
        tmp_path / "images" / "images.jsonl", [{**row, "prompt": f"{row['prompt']}, in detail" * 40} for row in rows]
    )
    images = publish_as(tmp_path / "images", "generated_images")
    with (
        started(chromium, tmp_path / "profile") as browser,
        asking(tmp_path, images, dimensions=["overall"]) as people,
        browser.tab() as page,
    ):
        page.resize(width, height)
        page.open(people.url)
        page.wait("!document.getElementById('who').hidden")
        page.read("location.hash = 'ann'")
        page.wait("document.body.dataset.state === 'ann/0'")
        upper, lower = (page.read(f"{_box(side)}.bottom") for side in ("left", "right"))
        assert max(upper, lower) <= page.read("document.querySelector('footer').getBoundingClientRect().top")
        assert width > 500 or upper <= page.read(f"{_box('right')}.top")
        assert page.read(f"{_box('left')}.height") > 0.25 * height
        # All of the prompt can be read, by keyboard too.
        assert page.read("(({scrollHeight, clientHeight}) => scrollHeight > clientHeight)(document.all.prompt)")
        page.read("document.all.prompt.focus()")
        page.press("ArrowDown")
        page.wait("document.all.prompt.scrollTop > 0")
        assert not answers(people.task)
        assert page.accessibility_faults() == []


def _answers_all(page: Page, people: Asking, width: int) -> None:
    """The picture itself, each button, undo, and finish asked for twice."""
    steps = [("#right", 1), ("footer [data-choice=tie]", 2), ("#undo", 1), ("footer [data-choice=skip]", 2)]
    for selector, number in steps:
        _activate(page, selector, width)
        page.wait(f"document.body.dataset.state === 'ann/{number}'")
    _activate(page, "#finish", width)
    page.wait("document.getElementById('message').textContent.includes('once more')")
    assert [row.get("choice") for row in answers(people.task)] == ["right", "tie", None, "skip"]
    time.sleep(0.6)  # a hand that has read this: at once it is a double tap, whose second half is not meant
    _activate(page, "#finish", width)
    page.wait("document.body.dataset.state === 'done'")


def _activate(page: Page, selector: str, width: int) -> None:
    """With a finger on a phone, with the tabulator's focus and the space bar elsewhere."""
    if width == 390:
        page.tap(selector)
        return
    page.read(f"document.querySelector('{selector}').focus()")
    assert page.read(f"document.activeElement === document.querySelector('{selector}')")
    page.press(" ")


def _box(side: str) -> str:
    return f"document.getElementById('{side}-image').getBoundingClientRect()"
