"""People rate images: the page in a real browser, kills and crashes, and answers that are kept through them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, started
from image_artifacts import draw, make_images, task_for
from rating_pages import Asking, answers, asking, ratings

from prefmill.core.artifact import Artifact
from prefmill.images.rate import PAGE_FILE
from prefmill.store.artifacts import read

pytestmark = pytest.mark.timing

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> & </main>"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_images(tmp_path_factory.mktemp("images"), num_prompts=3)


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(chromium, tmp_path_factory.mktemp("profile")) as found:
        yield found


def shows(page: Page, rater: str, number: int) -> None:
    """Wait until the page asks `rater` for the answer after the first `number`, both images on the screen."""
    page.wait(f"document.body.dataset.state === '{rater}/{number}'")


def asked(page: Page) -> tuple[str, str]:
    """The prompt and the dimension."""
    prompt, dimension = page.read("['prompt', 'dimension'].map(name => document.getElementById(name).textContent)")
    return prompt, dimension


@pytest.mark.slow
def test_in_a_browser_by_keyboard_through_reloads_and_crashes(
    tmp_path: Path, images: Artifact, browser: Browser
) -> None:
    """Two raters give every answer; the server is killed twice on the way. Nothing is lost, nothing asked twice."""
    settings = {"rater": {"by": "people", "raters_per_pair": 2}, "dimensions": ["fidelity", "overall"]}
    with asking(tmp_path, images, **settings) as people, browser.tab() as ann, browser.tab() as ben:
        ann.open(people.url)
        ann.wait("!document.getElementById('who').hidden")
        assert "token" not in ann.read("location.href")
        ann.read("document.getElementById('name').value = 'ann'; document.querySelector('form button').click()")
        shows(ann, "ann", 0)
        seen = [asked(ann)]
        for number, key in enumerate(["ArrowLeft", "t", "ArrowRight"], 1):
            ann.press(key)
            shows(ann, "ann", number)
            seen.append(asked(ann))
        assert [row["choice"] for row in answers(people.task)] == ["left", "tie", "right"]
        assert len(set(seen)) == 4
        ann.call("Page.reload")
        ann.wait("document.readyState === 'complete'")
        shows(ann, "ann", 3)
        assert asked(ann) == seen[3]
        ann.press("u")
        shows(ann, "ann", 2)
        assert asked(ann) == seen[2]

        people.kill()
        ann.press("s")
        ann.wait("document.body.dataset.state === 'lost'")
        port = people.port
        people.start()
        assert people.port == port
        shows(ann, "ann", 2)  # the open page goes on by itself
        ann.press("s")
        shows(ann, "ann", 3)

        ben.open(f"{people.url}#ben")
        shows(ben, "ben", 0)
        for number in range(1, 7):
            ben.press("ArrowDown")
            ben.wait(
                f"document.body.dataset.state === 'ben/{number}'"
                if number < 6
                else "document.body.dataset.state === 'done'"
            )
            if number == 4:
                people.kill()
                people.start()
        assert "every pair you are needed for" in ben.read("document.getElementById('message').textContent")
        for number in range(4, 7):
            ann.wait("document.body.dataset.state !== 'lost'")
            shows(ann, "ann", number - 1)
            ann.press("ArrowLeft")
        ann.wait("document.body.dataset.state === 'done'")
        assert people.wait() == 0
        assert [line for line in ann.console() + ben.console() if "ERR_CONNECTION" not in line] == []
        assert {url.split("/")[2] for url in ann.requested() if url.startswith("http")} == {f"127.0.0.1:{port}"}
    rows = ratings(people.task)
    assert Counter(row["rater"] for row in rows) == {"ann": 6, "ben": 6}
    assert {row["choice"] for row in rows if row["rater"] == "ben"} == {"tie"}
    assert len({(row["rater"], row["left"], row["right"], row["dimension"]) for row in rows}) == 12
    assert sorted(row["choice"] for row in rows if row["rater"] == "ann") == ["left"] * 4 + ["skip", "tie"]
    assert not (people.task.logs / PAGE_FILE).exists()


@pytest.mark.slow
def test_a_prompt_with_html_is_shown_not_run(tmp_path: Path, browser: Browser) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    draw(folder / "a.png", 0)
    draw(folder / "b.png", 1)
    row = {"prompt_id": "p", "prompt": HOSTILE}
    lines = [{**row, "file": "a.png"}, {**row, "file": "b.png"}]
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = task_for(tmp_path / "run" / "rate", "rate_images")
    people = Asking(task, images=str(folder))
    try:
        with browser.tab() as page:
            page.open(f"{people.url}#ann")
            shows(page, "ann", 0)
            assert page.read("document.getElementById('prompt').textContent") == HOSTILE
            assert page.read("document.querySelectorAll('#prompt *').length") == 0
            assert page.read("document.title") == "Which image is better?"
            # The control: even markup that got in would not run, as the page's policy refuses it.
            page.read("document.getElementById('prompt').innerHTML = '<img src=x onerror=\"document.title=1\">'")
            time.sleep(0.3)
            assert page.read("document.title") == "Which image is better?"
            assert any("Content Security Policy" in line for line in page.console())
    finally:
        people.end()


@pytest.mark.slow
def test_a_picture_that_is_lost_is_told_and_not_rated(tmp_path: Path, images: Artifact, browser: Browser) -> None:
    copy = Path(shutil.copytree(images.path, tmp_path / "images"))
    with asking(tmp_path, read(copy)) as people, browser.tab() as page:
        for file in copy.rglob("*.png"):
            file.rename(file.with_suffix(".away"))
        page.open(f"{people.url}#ann")
        page.wait("document.body.innerText.includes('is lost')")
        page.press("ArrowLeft")
        assert answers(people.task) == []
        assert ".png" in (people.task.logs / "log").read_text()
        for file in copy.rglob("*.away"):
            file.rename(file.with_suffix(".png"))
        page.open("about:blank")
        page.open(f"{people.url}#ann")
        shows(page, "ann", 0)


@pytest.mark.slow
def test_a_tab_that_is_behind_says_that_its_answer_is_not_kept(
    tmp_path: Path, images: Artifact, browser: Browser
) -> None:
    """Two tabs of one rater, then the way back from one, then a second rater's finish."""
    with asking(tmp_path, images) as people, browser.tab() as first, browser.tab() as second:
        for page in (first, second):
            page.open(f"{people.url}#ann")
            shows(page, "ann", 0)
        first.press("ArrowLeft")
        shows(first, "ann", 1)
        assert first.read("document.getElementById('message').textContent") == ""
        second.press("ArrowRight")
        second.wait("document.body.innerText.includes('That answer is not kept')")
        assert [row["choice"] for row in answers(people.task)] == ["left"]
        second.press("u")
        shows(second, "ann", 0)
        second.press("u")
        second.wait("document.body.innerText.includes('Nothing was taken back')")
        second.read("location.hash = ''; 0")
        second.wait("!document.getElementById('who').hidden")
        second.press("ArrowLeft")  # a key to the form is no answer
        second.read("history.back(); 0")
        second.wait("ready && !document.getElementById('rating').hidden")
        second.press("t")
        shows(second, "ann", 1)
        people.act("finish", "ben")
        second.press("t")
        second.wait("/came too late|somebody finished/.test(document.body.innerText)")
        assert people.wait() == 0
    assert [row["choice"] for row in ratings(people.task)] == ["tie"]


@pytest.mark.slow
def test_a_page_of_other_questions_goes_on_with_those_that_are_asked_now(
    tmp_path: Path, images: Artifact, browser: Browser
) -> None:
    """The program is started again on the same port while the page is open: it had to be reloaded by hand."""
    with asking(tmp_path, images, dimensions=["fidelity"]) as people, browser.tab() as page:
        page.open(f"{people.url}#ann")
        shows(page, "ann", 0)
        people.kill()
        people.ask(dimensions=["style"])
        page.press("ArrowLeft")
        page.wait("document.body.innerText.includes('That answer is not kept')")
        assert asked(page)[1] == "style"
        page.press("ArrowRight")
        shows(page, "ann", 1)
        assert [(row["dimension"], row["choice"]) for row in answers(people.task)] == [("style", "right")]


@pytest.mark.slow
def test_one_movement_of_a_hand_is_one_answer_on_any_keyboard(
    tmp_path: Path, images: Artifact, browser: Browser
) -> None:
    """A double click and a key that bounces answered the next question as well; Cyrillic letters did nothing."""
    with asking(tmp_path, images) as people, browser.tab() as page:
        page.open(f"{people.url}#ann")
        shows(page, "ann", 0)
        page.click("#right", times=2)
        shows(page, "ann", 1)
        page.click("#finish", times=2)
        page.wait("document.getElementById('message').textContent.includes('once more')")
        for letter, place in (("\u0435", "KeyT"), ("\u03c3", "KeyS")):
            before = len(answers(people.task))
            page.press(letter, place)
            shows(page, "ann", before + 1)
        page.read("for (const at of [0, 1]) setTimeout(() => document.dispatchEvent(new KeyboardEvent('keydown', "
                  "{key: 'a', code: 'KeyA'})), at * 40); 0")  # fmt: skip
        shows(page, "ann", 4)
        time.sleep(0.2)  # the second is on its way yet where an answer takes less than 40 ms
        # Of a key held on a button the browser makes a click at each repeat.
        page.read("document.getElementById('right').focus()")
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for is_repeat in (False, True, True, True):
            page.call("Input.dispatchKeyEvent", type="keyDown", autoRepeat=is_repeat, **enter)
            time.sleep(0.15)
        shows(page, "ann", 5)
        time.sleep(0.3)
        assert [row["choice"] for row in answers(people.task)] == ["right", "tie", "skip", "left", "right"]


@pytest.mark.slow
def test_a_connection_that_hangs_is_told_and_nothing_is_lost_or_doubled(
    tmp_path: Path, images: Artifact, browser: Browser
) -> None:
    """As a tunnel of a laptop that slept: no key did anything, for ever and without a word."""
    with asking(tmp_path, images) as people, browser.tab() as page:
        page.open(f"{people.url}#ann")
        shows(page, "ann", 0)
        page.read("AbortSignal.timeout = (timeout => () => timeout.call(AbortSignal, 500))(AbortSignal.timeout); 0")
        os.kill(people.process, signal.SIGSTOP)
        page.press("ArrowLeft")
        page.wait("document.body.dataset.state === 'lost'")
        os.kill(people.process, signal.SIGCONT)
        shows(page, "ann", 1)  # it had come through
        page.press("t")
        shows(page, "ann", 2)
        assert [row["choice"] for row in answers(people.task)] == ["left", "tie"]


@pytest.mark.slow
def test_without_the_token_a_browser_is_refused(tmp_path: Path, images: Artifact, browser: Browser) -> None:
    with asking(tmp_path, images) as people, browser.tab() as page:
        for url in (f"http://127.0.0.1:{people.port}/", f"http://127.0.0.1:{people.port}/?token=wrong"):
            page.open(url)
            page.wait("document.body !== null && document.body.innerText.includes('token')")
            assert page.read("document.querySelectorAll('img, form').length") == 0
