"""The rating page under load: many raters at once, and its server killed with -9 in between and started again.

    python -m benchmarks.rating_load [--raters 50] [--answers 10000] [--kills 3] [--pause SECONDS]

Each rater keeps a connection as a browser does, fetches the pictures ahead and answers at random after a short
`--pause`. Whoever loses the server asks it, once it is back, how many answers it has, as the page does. Counted at the
end: answers that `ratings.csv` lacks, has twice or has about another pair than was shown. The time of an answer is that
from sending it to holding the next question. The last line is for machines; exit status 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from prefmill.images.rate import PAGE_FILE

RATERS_PER_PAIR = 5
BOUND_SECONDS = 0.1
_PATIENCE_SECONDS = 120.0
Given = tuple[str, str, str]  # rater, prompt, choice


class Server:
    """The stage, waiting for people, in a process that can be killed."""

    def __init__(self, workspace: Path, images: Path) -> None:
        self._page = workspace / "logs/load/rate_images/all" / PAGE_FILE
        settings = [f"images={images}", f"rater={{by: people, raters_per_pair: {RATERS_PER_PAIR}}}"]
        self._command = [
            sys.executable, "-m", "stages.rate_images", *settings, "dimensions=[overall]", "run=load",
            f"workspace={workspace}",
        ]  # fmt: skip
        self._log = workspace / "server.log"
        self.start()

    def start(self) -> float:
        """Start it, or its successor; the seconds until its page is announced."""
        self._page.unlink(missing_ok=True)  # what a killed one left
        began = time.monotonic()
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        while not self._page.is_file():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < began + _PATIENCE_SECONDS, self._log.read_text()
            time.sleep(0.01)
        url = urlsplit(self._page.read_text().splitlines()[0])
        self.port, self.token = int(url.port or 0), url.query.removeprefix("token=")
        return time.monotonic() - began

    def kill(self) -> None:
        """As a crash does, with whatever it had started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def has_finished(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() == 0

    def wait(self) -> None:
        """Until it has ended by itself."""
        assert self._process.wait(_PATIENCE_SECONDS) == 0, self._log.read_text()


class Rater:
    """A browser with somebody before it; `given` are the answers whose arrival the server has told of."""

    def __init__(self, name: str, server: Server, pause: float) -> None:
        self.name, self.given, self.seconds = name, list[Given](), list[float]()
        self._server, self._pause, self._random = server, pause, random.Random(name)
        self._seen: set[str] = set()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def rate(self) -> None:
        """Answer until nothing is asked any more."""
        shown = await self._state()
        while shown["question"]:
            await self._look(shown)
            await asyncio.sleep(self._pause * 2 * self._random.random())
            shown = await self._answer(shown)

    async def _answer(self, shown: dict[str, Any]) -> dict[str, Any]:
        question, choice = shown["question"], self._random.choice(("left", "right", "tie", "skip"))
        body = {"rater": self.name, "number": shown["number"], **question, "choice": choice}
        began = time.monotonic()
        try:
            following = json.loads(await self._request("POST", "/answer", json.dumps(body).encode()))
            self.seconds.append(time.monotonic() - began)
        except (OSError, EOFError):
            following = await self._state()
        if following["number"] > shown["number"]:
            self.given.append((self.name, question["prompt"], choice))
        return following

    async def _look(self, shown: dict[str, Any]) -> None:
        question = shown["question"]
        for address in {question["left"], question["right"], *shown["ahead"]} - self._seen:
            try:
                await self._request("GET", address)
                self._seen.add(address)
            except (OSError, EOFError):
                return  # the answer will find out

    async def _state(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                state: dict[str, Any] = json.loads(await self._request("GET", f"/state?rater={self.name}"))
                return state
            except (OSError, EOFError):
                if self._server.has_finished:  # the last answer closes the page for everybody
                    return {"question": None, "number": -1}
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)

    async def _request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The body of a reply; raises OSError or EOFError when the server is gone."""
        port = self._server.port
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: prefmill_{port}={self._server.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            self._streams = self._streams or await asyncio.open_connection("127.0.0.1", port)
            reader, writer = self._streams
            writer.write(head.encode() + body)
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines if line)
            content = await reader.readexactly(int(headers["Content-Length"]))
        except (OSError, EOFError):
            self._streams = None
            raise
        assert " 200 " in status, (status, content)
        return content


def main(argv: Sequence[str] | None = None) -> int:
    """Rate everything, print the times and what was lost or doubled; 0 where all is within its bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.25, help="a rater's mean seconds before an answer")
    arguments = parser.parse_args(argv)
    workspace = Path(tempfile.mkdtemp(prefix="rating_load"))
    try:
        draw_pairs(workspace / "images", arguments.answers // RATERS_PER_PAIR)
        server = Server(workspace, workspace / "images")
        try:
            return asyncio.run(_measure(server, workspace, arguments))
        finally:
            server.kill()
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def draw_pairs(folder: Path, count: int) -> None:
    """`count` prompts with two pictures each."""
    folder.mkdir(parents=True)
    lines = ["prompt,file"]
    for index in range(count):
        for side in (0, 1):
            name = f"{index:05}-{side}.png"
            Image.new("RGB", (64, 64), (index % 256, index // 256, 255 * side)).save(folder / name)
            lines.append(f"prompt {index:05},{name}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")


async def _measure(server: Server, workspace: Path, arguments: argparse.Namespace) -> int:
    raters = [Rater(f"rater{index:02}", server, arguments.pause) for index in range(arguments.raters)]
    began = time.monotonic()
    working = asyncio.gather(*(rater.rate() for rater in raters))
    restarts = []
    for number in range(1, arguments.kills + 1):
        while sum(len(rater.given) for rater in raters) < arguments.answers * number / (arguments.kills + 1):
            await asyncio.sleep(0.01)
        server.kill()
        restarts.append(await asyncio.to_thread(server.start))
    await working
    elapsed = time.monotonic() - began
    server.wait()
    return _report(arguments, raters, _kept(workspace), elapsed, restarts)


def _kept(workspace: Path) -> Counter[Given]:
    data = workspace / "data/load/rate_images/all"
    images = [json.loads(line) for line in (data / "images.jsonl").read_text().splitlines()]
    prompts = {row["prompt_id"]: row["prompt"] for row in images}
    with (data / "ratings.csv").open(newline="") as stream:
        return Counter((row["rater"], prompts[row["prompt_id"]], row["choice"]) for row in csv.DictReader(stream))


def _report(
    arguments: argparse.Namespace,
    raters: Sequence[Rater],
    kept: Counter[Given],
    elapsed: float,
    restarts: Sequence[float],
) -> int:
    given = Counter(answer for rater in raters for answer in rater.given)
    asked = Counter((rater, prompt) for rater, prompt, _ in kept.elements())
    lost, doubled, foreign = (given - kept).total(), sum(n - 1 for n in asked.values()), (kept - given).total()
    seconds = sorted(second for rater in raters for second in rater.seconds)
    cuts = statistics.quantiles(seconds, n=100)
    print(f"# python -m benchmarks.rating_load: {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{len(raters)} raters at once, {arguments.pause:g} s of thought; {kept.total()} answers in {elapsed:.0f} s")
    print(f"the server was killed {len(restarts)} times; back after {', '.join(f'{s:.1f}' for s in restarts)} s")
    print(f"lost {lost}, doubled {doubled}, about another pair than was shown {foreign}")
    print("an answer and its next question, in ms: median {:.1f}, p95 {:.1f}, p99 {:.1f}, longest {:.1f}".format(
        *(1000 * value for value in (cuts[49], cuts[94], cuts[98], seconds[-1]))
    ))  # fmt: skip
    is_good = not lost and not doubled and not foreign and cuts[94] < BOUND_SECONDS
    print(f"no answer lost or doubled, p95 under {1000 * BOUND_SECONDS:.0f} ms: {'yes' if is_good else 'NO'}")
    print(json.dumps({"answers": kept.total(), "lost": lost, "doubled": doubled, "p95_ms": round(1000 * cuts[94], 2)}))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
