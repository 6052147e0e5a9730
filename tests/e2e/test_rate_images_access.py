"""The page on which people rate lets in nobody without its token, nor another machine or user, and says where it is."""

from __future__ import annotations

import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import make_images, task_for
from rating_pages import PATIENCE_SECONDS, Asking, asking, rate

from prefmill.cli.main import main
from prefmill.core.artifact import Artifact
from prefmill.core.errors import ConfigError
from prefmill.core.graceful_stop import clear_request, request_stop
from prefmill.images.rate import PAGE_FILE


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_images(tmp_path_factory.mktemp("images"), num_prompts=3)


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
        ("POST", "/answer", b"[" * 4000, {}, 400),  # nested deeper than Python reads
        ("POST", "/answer", b"x" * 5000, {}, 413),
        ("POST", "/shutdown", {"rater": "ann"}, {}, 404),
        ("GET", "/state?rater=ann", None, {}, 200),
        ("GET", "/state?rater=Zo%C3%AB%20B.", None, {}, 200),
        ("GET", "/state?rater=%E0%A4%B9%E0%A4%BF%E0%A4%A8", None, {}, 200),
        ("GET", "/state?rater=%EF%BC%9D1", None, {}, 400),  # an equal sign as wide as a letter
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


@pytest.mark.parametrize(
    "fault",
    [
        "Content-Length: many", "Content-Length: \xb2", "Content-Length: -1", "Accept: */*",
        "Content-Length: 16\r\nContent-Length: 16", "Content-Length: 16\r\nTransfer-Encoding: chunked",
        "Content-Length: 16\r\nOrigin: http://[evil", "Content-Length: 16\r\nHost: 127.0.0.1",
        "Content-Length: 16\r\nno colon here",
    ],
)  # fmt: skip
def test_faults_of_headers_are_answered(door: Asking, fault: str) -> None:
    head = [
        f"Host: 127.0.0.1:{door.port}",
        f"Cookie: prefmill_{door.port}={door.token}",
        "Content-Type: application/json",
    ]
    assert _status(door, "POST /answer HTTP/1.1", *head, fault) == 400


@pytest.mark.parametrize("request_line", ["GET http://[evil/state HTTP/1.1", "GET / HTTP/1.1"])
def test_faults_of_addresses_are_answered(door: Asking, request_line: str) -> None:
    host = () if request_line == "GET / HTTP/1.1" else (f"Host: 127.0.0.1:{door.port}",)
    assert _status(door, request_line, *host) == 400


def test_another_programs_cookie_does_not_hide_ours(door: Asking) -> None:
    cookie = f'theme={{"dark": [1, 2]}}; prefmill_{door.port}={door.token}; other="a'
    assert door.request("GET", "/state?rater=ann", Cookie=cookie)[0] == 200


def _status(door: Asking, *lines: str) -> int:
    """The status of a request that no client would send."""
    with socket.create_connection(("127.0.0.1", door.port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall("\r\n".join((*lines, "", '{"rater": "ann"}')).encode("latin-1"))
        return int(connection.recv(4096).split()[1])


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
    # Of this machine, where nobody listens at port 1: what a killed program left.
    (logs / PAGE_FILE).write_text(f"http://127.0.0.1:1/?token=t\nssh -N {socket.gethostname()}\n")
    assert main(["rate", "mine", "--workspace", str(tmp_path)]) == 2


def test_a_stage_that_is_asked_to_stop_closes_its_page(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images) as people:
        people.act("answer", "ann", choice="left")
        request_stop(people.task.logs, 5.0)
        assert people.wait() != 0
        assert not (people.task.logs / PAGE_FILE).exists()
        clear_request(people.task.logs)
        people.start()
        assert people.state("ann")["number"] == 1


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


def test_a_port_that_is_taken_is_named(tmp_path: Path, images: Artifact, door: Asking) -> None:
    task = task_for(tmp_path / "run" / "rate", "rate_images", images=images)
    with pytest.raises(ConfigError, match=rf"cannot open the page's port[\s\S]*rater.port={door.port}"):
        rate(task, rater={"by": "people", "port": door.port})
