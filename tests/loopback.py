"""A server on the loopback for tests of what talks to a completions server: it counts, and answers what it is told."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Loopback:
    """`asked` and `answered` count requests for completions by their prompts; `authorizations` are the headers seen.

    `respond(method, path, headers, body)` makes a reply; where it returns None the connection ends without one.
    """

    respond: Callable[[str, str, dict[str, str], bytes], Reply | None]
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    authorizations: set[str | None] = field(default_factory=set)
    after_answer: Callable[[], None] = lambda: None
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(respond: Callable[[str, str, dict[str, str], bytes], Reply | None]) -> Iterator[Loopback]:
    """Serve `respond` on a free port of the loopback."""
    loopback = Loopback(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a header and its body in two parts waited 40 ms for each other

        def do_GET(self) -> None:
            self._answer(b"")

        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes) -> None:
            name = key(body) if self.path.endswith("/completions") else None
            with loopback.lock:
                loopback.authorizations.add(self.headers["Authorization"])
                loopback.asked.update([name] if name else [])
            reply = loopback.respond(self.command, self.path, dict(self.headers), body)
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = reply
            with loopback.lock:
                loopback.answered.update([name] if name and status == 200 else [])
            self.send_response(status)
            for header, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            loopback.after_answer()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    loopback.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield loopback
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def key(body: bytes) -> str:
    """A name for a request's prompts."""
    asked = json.loads(body)
    return hashlib.sha256(json.dumps(asked.get("prompt", asked.get("messages"))[0]).encode()).hexdigest()[:12]


def forward(url: str) -> Callable[[str, str, dict[str, str], bytes], Reply | None]:
    """Hand every request to the server at `url`, and end the connection where that one does."""

    def respond(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply | None:
        kept = {name: value for name, value in headers.items() if name in ("Authorization", "Content-Type")}
        request = urllib.request.Request(url + path.removeprefix("/v1"), body or None, kept, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, {}, response.read()
        except urllib.error.HTTPError as error:
            return error.code, {}, error.read()
        except OSError:
            return None

    return respond
