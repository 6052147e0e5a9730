"""The stage that rates images, in this process or waiting for people in one of its own, for tests of it."""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from image_artifacts import task_for

import stages.rate_images as stage
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.images.rate import PAGE_FILE, answers_file
from prefmill.store.jsonl import read_jsonl

PATIENCE_SECONDS = 30.0


def rate(task: Task, **settings: Any) -> dict[str, Any]:
    """Run the stage here."""
    return stage.run(validate(stage.RateImagesConfig, settings), task)


def ratings(task: Task) -> list[dict[str, str]]:
    """The rows of the finished stage's file."""
    with (task.output / "ratings.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def answers(task: Task) -> list[dict[str, Any]]:
    """Every line of the file of answers: what was answered, and what was taken back."""
    return list(read_jsonl(answers_file(task)))


class Asking:
    """The stage in a process of its own, waiting for people."""

    def __init__(self, task: Task, **settings: Any) -> None:
        self.task = task
        self.ask(**settings)

    def ask(self, **settings: Any) -> None:
        """Begin with these settings."""
        self._settings = settings
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
        shown = self.state(rater)
        seen = {"rater": rater, "number": shown["number"], **(shown["question"] or {})}
        status, _, text = self.request("POST", f"/{action}", seen | body)
        assert status == 200, text
        following: dict[str, Any] = json.loads(text)
        return following

    def state(self, rater: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.request("GET", f"/state?rater={quote(rater)}")[2])
        return shown


@contextlib.contextmanager
def asking(folder: Path, images: Artifact, **settings: Any) -> Iterator[Asking]:
    """The stage while it asks people, killed at the end where it has not ended."""
    people = Asking(task_for(folder / "run" / "rate", "rate_images", images=images), **settings)
    try:
        yield people
    finally:
        people.end()
