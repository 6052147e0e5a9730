"""rate_images: programs, the page in a real browser, kills and crashes, tokens, hostile prompts, and bad input."""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import os
import shutil
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, started
from image_artifacts import bomb, draw, make_images, publish_as, task_for

import stages.rate_images as stage
from prefmill.artifacts import Artifact, payload
from prefmill.cli import main
from prefmill.config import validate
from prefmill.errors import ConfigError, InputError
from prefmill.images.rate import PAGE_FILE, answers_file
from prefmill.images.rows import DIMENSIONS
from prefmill.records import read_jsonl
from prefmill.stage import Task

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> & </main>"
PATIENCE_SECONDS = 30.0


def rate(task: Task, **settings: Any) -> dict[str, Any]:
    return stage.run(validate(stage.RateImagesConfig, settings), task)


def ratings(task: Task) -> list[dict[str, str]]:
    with (task.output / "ratings.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def contents(task: Task) -> dict[str, bytes]:
    return {path.relative_to(task.output).as_posix(): path.read_bytes() for path in payload(task.output)}


def answers(task: Task) -> list[dict[str, Any]]:
    return list(read_jsonl(answers_file(task)))


# A program rates.


def test_sharpness_prefers_what_is_not_blurred_wherever_it_stands(tmp_path: Path) -> None:
    task = task_for(tmp_path / "x" / "t", "rate_images", images=make_images(tmp_path / "images", num_prompts=20))
    metrics = rate(task, rater={"by": "sharpness"})
    rows = ratings(task)
    assert len(rows) == 20 * len(DIMENSIONS) == metrics["num_ratings"]
    for row in rows:
        assert row["rater"] == "sharpness"
        assert row[row["choice"]] == f"{row['prompt_id']}/0"
    assert 20 < Counter(row["choice"] for row in rows)["left"] < 100  # sides are drawn
    assert sorted(contents(task)) == sorted(
        [f"images/p{n:02}/{seed}.png" for n in range(20) for seed in (0, 1)]
        + ["images.jsonl", "quarantine.jsonl", "ratings.csv", "summary.json"]
    )
    before = contents(task)
    rate(task, rater={"by": "sharpness"})
    assert contents(task) == before


def test_a_program_resumes_behind_the_blocks_it_has_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefmill.images.rate as rate_module
    import prefmill.images.rating as rating_module

    monkeypatch.setattr(rating_module, "_BLOCK", 4)
    scored: list[int] = []
    real = rate_module.sharpness

    def dying(prompts: Any, paths: Any) -> Any:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(paths))
        return real(prompts, paths)

    task = task_for(tmp_path / "x" / "t", "rate_images", images=make_images(tmp_path / "images", num_prompts=6))
    monkeypatch.setattr(rate_module, "sharpness", dying)
    with pytest.raises(KeyboardInterrupt):
        rate(task, rater={"by": "sharpness"})
    scored.append(0)  # let the rest through
    rate(task, rater={"by": "sharpness"})
    assert scored == [4, 4, 0, 4]


def test_a_reward_model_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    import prefmill.reward.scoring as scoring

    def score_images(folder: Path, prompts: list[str], paths: list[Path]) -> Any:
        assert folder == reward.path
        assert all(prompt.startswith("coloured bars") for prompt in prompts)
        return np.array(
            [[1.0, 0.0, 0.2, 0.0, 0.0] if path.stem == "1" else [0.0] * 5 for path in paths], dtype=np.float32
        )

    monkeypatch.setattr(scoring, "score_images", score_images)
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text("{}")
    reward = publish_as(tmp_path / "reward", "reward_model")
    images = make_images(tmp_path / "images")
    task = task_for(tmp_path / "x" / "t", "rate_images", images=images, reward=reward)
    rate(task, rater={"by": "reward", "tie_margin": 0.21})
    found = {
        (row["dimension"], row["choice"] if row["choice"] == "tie" else row[row["choice"]][-1]) for row in ratings(task)
    }
    assert found == {
        ("spatial", "1"), ("iconographic", "tie"), ("style", "tie"), ("fidelity", "tie"), ("material", "tie"),
        ("overall", "1"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no reward model to rate with"):
        rate(task_for(tmp_path / "x" / "u", "rate_images", images=images), rater={"by": "reward"})


def test_many_images_a_prompt_give_every_pair_or_as_many_as_asked(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", num_prompts=3, num_seeds=4)
    for most, count in ((None, 6), (2, 2)):
        task = task_for(tmp_path / f"x{most}" / "t", "rate_images", images=images)
        assert rate(task, rater={"by": "sharpness"}, max_pairs_per_prompt=most)["num_pairs"] == 3 * count


def test_own_images_are_checked_and_copied(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    draw(folder / "a.png", 0)
    draw(folder / "b.jpg", 0, blur=3)
    draw(folder / "c.png", 1)
    (folder / "d.png").write_bytes((folder / "c.png").read_bytes()[:70])
    bomb(folder / "e.png")
    shutil.copy(folder / "c.png", folder / "again.png")
    names = ("a.png", "b.jpg", "c.png", "d.png", "e.png", "none.png", "again.png")
    (folder / "images.csv").write_text("prompt,file\n" + "".join(f"x,{name}\n" for name in names))
    task = task_for(tmp_path / "x" / "t", "rate_images")
    # Of four that can be shown, nobody is asked to tell an image from itself.
    assert rate(task, rater={"by": "sharpness"}, images=str(folder))["num_pairs"] == 5
    reasons = [row["reason"] for row in read_jsonl(task.output / "quarantine.jsonl")]
    assert reasons == ["damaged image", "image too large to decode", "missing image"]
    rows = list(read_jsonl(task.output / "images.jsonl"))
    assert [Path(row["file"]).name for row in rows] == ["a.png", "again.png", "b.jpg", "c.png"]
    assert not (task.output / rows[0]["file"]).samefile(folder / "a.png")


def test_what_cannot_be_rated_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images to rate"):
        rate(task_for(tmp_path / "x" / "a", "rate_images"), rater={"by": "sharpness"})
    images = make_images(tmp_path / "images", num_seeds=1)
    with pytest.raises(ConfigError, match="images from two places"):
        rate(task_for(tmp_path / "x" / "b", "rate_images", images=images), images=str(tmp_path))
    with pytest.raises(InputError, match=r"no two images of one prompt[\s\S]*4 images of 4 prompts"):
        rate(task_for(tmp_path / "x" / "c", "rate_images", images=images), rater={"by": "sharpness"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rater": {"by": "nobody"}}, "rater"),
        ({"dimensions": ["taste"]}, "dimensions"),
        ({"dimensions": []}, "dimensions"),
        ({"rater": {"by": "people", "raters_per_pair": 0}}, "raters_per_pair"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.RateImagesConfig, settings)


# People rate.


class Asking:
    """The stage in a process of its own, waiting for people."""

    def __init__(self, task: Task, **settings: Any) -> None:
        self.task, self._settings = task, settings
        self.start()

    def start(self) -> None:
        (self.task.logs / PAGE_FILE).unlink(missing_ok=True)  # what a killed one left
        self.process = os.fork()
        if self.process == 0:
            with contextlib.suppress(BaseException):
                os.dup2(os.open(self.task.logs / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
                rate(self.task, **self._settings)
                os._exit(0)
            os._exit(1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.task.logs / PAGE_FILE).is_file():
            assert time.monotonic() < deadline, (self.task.logs / "log").read_text()
            time.sleep(0.02)
        self.url = (self.task.logs / PAGE_FILE).read_text().splitlines()[0]
        self.port = int(self.url.split(":")[2].split("/")[0])
        self.token = self.url.split("token=")[1]

    def kill(self) -> None:
        """As a crash does."""
        os.kill(self.process, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.process = 0
        return code

    def end(self) -> None:
        """For good, where a test has not."""
        if self.process:
            self.kill()

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request with the right cookie unless another is given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        given = {"Cookie": f"prefmill_{self.port}={self.token}", "Content-Type": "application/json"}
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(
            method, path, sent, {**given, **{key.replace("_", "-"): value for key, value in headers.items()}}
        )
        reply = connection.getresponse()
        result = reply.status, dict(reply.getheaders()), reply.read()
        connection.close()
        return result

    def act(self, action: str, rater: str, **body: Any) -> dict[str, Any]:
        """What the page shows after an action."""
        number = self.state(rater)["number"]
        status, _, text = self.request("POST", f"/{action}", {"rater": rater, "number": number, **body})
        assert status == 200, text
        shown: dict[str, Any] = json.loads(text)
        return shown

    def state(self, rater: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.request("GET", f"/state?rater={rater}")[2])
        return shown


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_images(tmp_path_factory.mktemp("images"), num_prompts=3)


@contextlib.contextmanager
def asking(folder: Path, images: Artifact, **settings: Any) -> Iterator[Asking]:
    people = Asking(task_for(folder / "run" / "rate", "rate_images", images=images), **settings)
    try:
        yield people
    finally:
        people.end()


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
def test_without_the_token_a_browser_is_refused(tmp_path: Path, images: Artifact, browser: Browser) -> None:
    with asking(tmp_path, images) as people, browser.tab() as page:
        for url in (f"http://127.0.0.1:{people.port}/", f"http://127.0.0.1:{people.port}/?token=wrong"):
            page.open(url)
            page.wait("document.body !== null && document.body.innerText.includes('token')")
            assert page.read("document.querySelectorAll('img, form').length") == 0


def test_finishing_early_takes_what_there_is_and_a_rerun_goes_on(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        task = people.task
        status, _, text = people.request("POST", "/finish", {"rater": "ann", "number": 0})
        assert (status, text) == (400, b"Nothing is rated yet: there is nothing to finish.")
        people.act("answer", "ann", choice="left")
        assert people.act("finish", "ann")["closed"]
        assert people.wait() == 0
    assert len(ratings(task)) == 1
    kept = answers_file(task).read_bytes()
    for path in payload(task.output):
        path.unlink()
    rate(task, dimensions=["overall"])  # killed before it had published: finished all the same
    assert len(ratings(task)) == 1
    (task.work / "finished").unlink()  # as the worker does with the whole folder, here for --force
    (task.work / "server.json").unlink()
    with asking(tmp_path, images, dimensions=["overall"]) as again:
        assert again.state("ann")["number"] == 1
        assert again.token != people.token
        again.act("answer", "ann", choice="tie")
        assert again.act("answer", "ann", choice="tie")["closed"]
        assert again.wait() == 0
    assert answers_file(task).read_bytes().startswith(kept)
    assert len(ratings(task)) == 3


def test_answers_about_images_that_have_changed_do_not_count_but_stay(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        people.act("answer", "ann", choice="left")
    other = make_images(tmp_path / "other", num_prompts=3)
    rows = list(read_jsonl(other.path / "images.jsonl"))
    for row in rows:
        draw(other.path / row["file"], 77 + row["seed"])
    changed = publish_as(other.path, "generated_images")
    with asking(tmp_path, changed, dimensions=["overall"]) as people:
        assert people.state("ann")["done"] == 0
        for _ in range(3):
            people.act("answer", "ann", choice="right")
        assert people.wait() == 0
    assert len(ratings(people.task)) == 3
    assert len(answers(people.task)) == 4


def test_a_torn_answer_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images) as people:
        for _ in range(3):
            people.act("answer", "ann", choice="left")
        people.kill()
        path = answers_file(people.task)
        whole = path.read_bytes()
        for torn in (whole[:-5], whole + b'{"rater": "a', whole + b"\0" * 50):
            path.write_bytes(torn)
            people.start()
            number = 2 if torn == whole[:-5] else 3
            assert people.state("ann")["number"] == number
            people.act("answer", "ann", choice="tie")
            people.kill()
            people.start()
            assert people.state("ann")["number"] == number + 1
            people.kill()
        lines = whole.splitlines(keepends=True)
        path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(InputError, match=r"unreadable answer[\s\S]*all.jsonl:2"):
        rate(people.task)
    assert path.read_bytes().endswith(lines[2])


def test_a_page_that_is_behind_changes_nothing(tmp_path: Path, images: Artifact) -> None:
    """A second tab, or a request sent twice because its reply was lost."""
    with asking(tmp_path, images) as people:
        for _ in range(2):
            body = {"rater": "ann", "number": 0, "choice": "left"}
            status, _, text = people.request("POST", "/answer", body)
            assert (status, json.loads(text)["number"]) == (200, 1)
        assert people.act("undo", "ann")["number"] == 0
        assert people.act("undo", "ann")["number"] == 0
        assert [row.get("choice") for row in answers(people.task)] == ["left", None]


def test_two_raters_share_the_pairs_when_one_is_enough(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        first = people.state("ann")["question"]["prompt"]
        people.act("answer", "ann", choice="left")
        assert people.state("ben")["total"] == 2
        prompts = [first]
        while not (shown := people.state("ben"))["closed"]:
            prompts.append(shown["question"]["prompt"])
            if people.act("answer", "ben", choice="right")["closed"]:
                break
        assert len(set(prompts)) == 3
        assert people.wait() == 0


def test_sides_are_drawn_for_each_rater_and_stay(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images) as people:
        shown = {}
        for rater in "abcdefghijklmnop":
            question = people.state(rater)["question"]
            assert people.state(rater)["question"] == question
            shown.setdefault(question["prompt"], set()).add((question["left"], question["right"]))
        assert len(shown) == 3  # everybody has an order of their own
        assert any(len(sides) == 2 for sides in shown.values())
        name = question["left"].removeprefix("/image/")
        assert len(name) == 24
        assert not any(part in json.dumps(shown, default=list) for part in ("seed", ".png", "p00"))


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/", None, {"Cookie": ""}, 403),
        ("GET", "/", None, {"Cookie": "prefmill_{port}=wrong"}, 403),
        ("GET", "/?token=", None, {"Cookie": ""}, 403),
        ("GET", "/?token=%ff%fe", None, {}, 403),
        ("GET", "/state?rater=ann", None, {"Cookie": ""}, 403),
        ("GET", "/image/00", None, {"Cookie": ""}, 403),
        ("GET", "/image/../../etc/passwd", None, {}, 404),
        ("GET", "/", None, {"Host": "evil.example:80"}, 403),
        ("POST", "/answer", {"rater": "ann"}, {"Cookie": ""}, 403),
        ("POST", "/answer", {"rater": "ann"}, {"Origin": "http://evil.example"}, 403),
        ("POST", "/answer", {"rater": "ann"}, {"Content_Type": "text/plain"}, 415),
        ("POST", "/answer", {"rater": "=1+1", "number": 0}, {}, 400),
        ("POST", "/answer", {"rater": "ann", "number": 0, "choice": "both"}, {}, 400),
        ("POST", "/answer", b"not json", {}, 400),
        ("POST", "/answer", b"[]", {}, 400),
        ("POST", "/answer", b"x" * 5000, {}, 413),
        ("POST", "/shutdown", {"rater": "ann"}, {}, 404),
        ("GET", "/state?rater=ann", None, {}, 200),
        ("GET", "/", None, {}, 200),
    ],
)
def test_what_is_let_in(door: Asking, method: str, path: str, body: Any, headers: dict[str, str], status: int) -> None:
    given = {key: value.replace("{port}", str(door.port)) for key, value in headers.items()}
    found, sent, text = door.request(method, path, body, **given)
    assert found == status, text
    assert "default-src 'none'" in sent["Content-Security-Policy"]
    assert door.token.encode() not in text
    if path == "/" and status == 200:
        assert "unsafe-inline" not in sent["Content-Security-Policy"]
        assert (sent["Referrer-Policy"], sent["X-Content-Type-Options"]) == ("no-referrer", "nosniff")


@pytest.fixture(scope="module")
def door(images: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    with asking(tmp_path_factory.mktemp("door"), images) as people:
        yield people


def test_the_command_line_shows_the_address(
    tmp_path: Path, images: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs" / "mine" / "rate_images" / "all"
    logs.mkdir(parents=True)
    assert main(["rate", "mine", "--workspace", str(tmp_path)]) == 2
    assert "no page is open in this run" in capsys.readouterr().err
    (logs / PAGE_FILE).write_text("http://127.0.0.1:1/?token=t\nssh -N\n")
    assert main(["rate", "mine", "--workspace", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "http://127.0.0.1:1/?token=t\nssh -N\n"


def test_only_this_machine_and_this_user_get_at_it(door: Asking) -> None:
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1].split(":") for row in sockets if row[3] == "0A"]
    assert [address for address, port in listening if int(port, 16) == door.port] == ["0100007F"]
    for path in (door.task.logs / PAGE_FILE, door.task.work / "server.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert door.token not in (door.task.logs / "log").read_text()
    status, sent, _ = door.request("GET", f"/?token={door.token}", Cookie="")
    assert (status, sent["Location"]) == (303, "/")
    assert all(word in sent["Set-Cookie"] for word in ("HttpOnly", "SameSite=Strict"))


def test_a_full_disk_is_said_and_leaves_no_half_answer(tmp_path: Path, images: Artifact) -> None:
    from prefmill.images.answers import AnswerBook, Session
    from prefmill.images.collection import check_images
    from prefmill.images.own import image_of_row
    from prefmill.images.rating import plan_matchups
    from prefmill.images.rating_server import RatingServer, RefusalError

    sources = [image_of_row(images.path, row, "x") for row in read_jsonl(images.path / "images.jsonl")]
    good = check_images(sources, _quarantine())
    book = AnswerBook(tmp_path / "answers.jsonl")
    session = Session(book, plan_matchups(good.values(), None, 0), DIMENSIONS, 1, 0)
    with RatingServer(session, good, "t") as server:
        server.act("answer", "ann", {"number": 0, "choice": "left"})
        before = (tmp_path / "answers.jsonl").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prefmill.images.answers.os.fsync", _full)
            with pytest.raises(RefusalError, match="could not be kept: No space left"):
                server.act("answer", "ann", {"number": 1, "choice": "left"})
        assert (tmp_path / "answers.jsonl").read_bytes() == before
        assert server.act("answer", "ann", {"number": 1, "choice": "tie"})["number"] == 2
    book.close()


def _quarantine() -> Any:
    from prefmill.images.collection import Quarantine

    return Quarantine()


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_port_that_is_taken_is_named(tmp_path: Path, images: Artifact, door: Asking) -> None:
    task = task_for(tmp_path / "run" / "rate", "rate_images", images=images)
    with pytest.raises(ConfigError, match=rf"cannot open the page's port[\s\S]*rater.port={door.port}"):
        rate(task, rater={"by": "people", "port": door.port})
