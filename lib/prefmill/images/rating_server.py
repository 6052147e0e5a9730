"""The web page on which people rate: a small server on the loopback interface, behind a token."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args
from urllib.parse import SplitResult, parse_qs, urlsplit

from prefmill.core.errors import InputError
from prefmill.images.answers import Choice, Session, ShownPair
from prefmill.images.collection import GoodImage
from prefmill.store.pictures import shown_bytes

HOST = "127.0.0.1"
_PAGE = Path(__file__).with_name("rating_page.html")
_LONGEST_NAME = 40
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_LARGEST_BODY = 4_096
_ONCE = ("Host", "Content-Length", "Content-Type", "Origin")


class RefusalError(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(why)


class RatingServer(ThreadingHTTPServer):
    """Serves a session's questions; `finished` is set when every pair has its raters, or somebody pressed finish."""

    # A browser keeps its connection open: waiting for its thread would keep the server from closing.
    daemon_threads = True
    # Python queues 5: of 50 browsers that come back at once, the others would wait a second to be let in.
    request_queue_size = 256

    def __init__(
        self, session: Session, images: Mapping[str, GoodImage], token: str, port: int = 0,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.session, self.token, self._on_answer = session, token, on_answer
        # Each request has its own thread, and a session is not made for that.
        self.lock = threading.Lock()
        self.finished = threading.Event()
        self.was_asked_to_finish = False
        self._images = {_name(token, image): image for image in images.values()}
        super().__init__((HOST, port), _Handler)
        if session.is_complete:
            self.finished.set()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address to open, with the token."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    def image(self, name: str) -> GoodImage:
        """The image of that name."""
        if name not in self._images:
            raise RefusalError(HTTPStatus.NOT_FOUND, "no such image: reload this page")
        return self._images[name]

    def state(self, rater: str) -> dict[str, Any]:
        """What the page of `rater` shows; under the lock."""
        rater = self.session.known_as(rater)
        asked = self.session.question(rater)
        done, total = self.session.progress(rater)
        shown: dict[str, Any] = {"number": self.session.number(rater), "done": done, "total": total, "question": None}
        if asked is None or self.finished.is_set():
            return {**shown, "closed": self.finished.is_set(), "ahead": []}
        following = self.session.after(rater)
        ahead = [] if following is None else [following.first, following.second]
        shown["question"] = {
            "prompt": asked.left.source.prompt, "dimension": asked.dimension,
            "left": self._address(asked.left), "right": self._address(asked.right),
        }  # fmt: skip
        return {**shown, "closed": False, "ahead": [self._address(image) for image in ahead]}

    def act(self, action: str, rater: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a page asks for and say what it shows next; a page that is behind is brought up to date and told."""
        with self.lock:
            rater = self.session.known_as(rater)
            before = self.session.number(rater)
            if current := body.get("number") == before and not self.finished.is_set():
                try:
                    self._do(action, rater, body)
                except OSError as error:
                    why = f"The answer could not be kept: {error.strerror}. Fix that, then answer again."
                    raise RefusalError(HTTPStatus.INSUFFICIENT_STORAGE, why) from error
            kept = current and (action == "finish" or self.session.number(rater) != before)
            return {**self.state(rater), "kept": kept}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle is no error; anything else is reported."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _do(self, action: str, rater: str, body: Mapping[str, Any]) -> None:
        if action == "answer":
            if body.get("choice") not in get_args(Choice):
                raise RefusalError(HTTPStatus.BAD_REQUEST, "no such choice")
            self.session.answer(rater, self._shown(body), body["choice"])
        elif action == "undo":
            self.session.undo(rater)
        else:
            if not self.session.ratings():
                raise RefusalError(HTTPStatus.BAD_REQUEST, "Nothing is rated yet: there is nothing to finish.")
            self.was_asked_to_finish = True
        self._on_answer()
        if self.was_asked_to_finish or self.session.is_complete:
            self.finished.set()

    def _shown(self, body: Mapping[str, Any]) -> ShownPair:
        """The question that a page says it showed; raises RefusalError for images or a dimension unknown here."""
        left, right = (self.image(str(body.get(side)).removeprefix("/image/")) for side in ("left", "right"))
        dimension = body.get("dimension")
        if dimension not in self.session.dimensions:
            raise RefusalError(HTTPStatus.NOT_FOUND, "no such dimension: reload this page")
        return ShownPair(left, right, dimension)

    def _address(self, image: GoodImage) -> str:
        return f"/image/{_name(self.token, image)}"


class _Handler(BaseHTTPRequestHandler):
    """Lets requests through that carry the token and come from a page of this server."""

    protocol_version = "HTTP/1.1"
    # Python's own value names its version to anybody who asks.
    server_version, sys_version = "prefmill", ""
    # HTTP/1.1 keeps connections open: a silent one would hold its thread for ever.
    timeout = 30
    # Head and body leave as one packet: apart, the second waits for the first to be acknowledged.
    wbufsize = -1
    server: RatingServer

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold the token."""

    def _get(self) -> None:
        url = _parsed(self.path)
        query = parse_qs(url.query)
        if "token" in query:
            self._enter(query["token"][0])
            return
        self._require_token()
        if url.path == "/":
            self._page()
        elif url.path == "/state":
            rater = _rater(query.get("rater", [""])[0])
            with self.server.lock:
                state = self.server.state(rater)
            self._reply(HTTPStatus.OK, json.dumps(state).encode(), "application/json")
        elif url.path.startswith("/image/"):
            image = self.server.image(url.path.removeprefix("/image/"))
            try:
                content, kind = shown_bytes(image.source.path)
            except InputError as error:  # deleted or written over since the page began
                print(error, file=sys.stderr, flush=True)
                # Without its name, which may tell the rater what made it.
                why = "A picture of this pair is lost. The log of the program names it: put it back, then reload."
                raise RefusalError(HTTPStatus.GONE, why) from error
            self._reply(HTTPStatus.OK, content, kind, cache="private, max-age=3600")
        else:
            raise RefusalError(HTTPStatus.NOT_FOUND, "no such page")

    def _post(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise RefusalError(HTTPStatus.BAD_REQUEST, "Content-Length is not a number")
        if int(length) > _LARGEST_BODY:
            raise RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too long")
        # Read before the token is checked: closing with bytes unread resets the connection, and the reply may be lost.
        raw = self.rfile.read(int(length))
        self._require_token()
        origin = self.headers.get("Origin")
        # A page of another site can send a request here: its browser says where that came from.
        if origin is not None and _parsed(origin).netloc != self.headers.get("Host"):
            raise RefusalError(HTTPStatus.FORBIDDEN, "from another page")
        # A form of another site cannot send JSON, and a script there must ask first (CORS), which nothing here allows.
        if self.headers.get_content_type() != "application/json":
            raise RefusalError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is expected")
        action = self.path.removeprefix("/")
        if action not in ("answer", "undo", "finish"):
            raise RefusalError(HTTPStatus.NOT_FOUND, "no such page")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise RefusalError(HTTPStatus.BAD_REQUEST, "not JSON") from None
        if not isinstance(body, dict):
            raise RefusalError(HTTPStatus.BAD_REQUEST, "not an object")
        state = self.server.act(action, _rater(body.get("rater")), body)
        self._reply(HTTPStatus.OK, json.dumps(state).encode(), "application/json")

    def _guarded(self, handle: Callable[[], None]) -> None:
        try:
            self._require_sound_headers()
            self._require_loopback()
            handle()
        except RefusalError as refusal:
            self.close_connection = True
            self._reply(refusal.status, refusal.why.encode(), "text/plain; charset=utf-8")

    def _require_sound_headers(self) -> None:
        """Headers that two programs could read in two ways are not read at all."""
        counts = {name: len(self.headers.get_all(name, [])) for name in _ONCE}
        if (
            self.headers.defects
            or counts["Host"] != 1
            or max(counts.values()) > 1
            or "Transfer-Encoding" in self.headers
        ):
            raise RefusalError(HTTPStatus.BAD_REQUEST, "the request's headers cannot be read")

    def _require_loopback(self) -> None:
        """A name that an attacker's page had resolved to this machine is not let in."""
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if host not in _LOOPBACK:
            raise RefusalError(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1")

    @property
    def _cookie(self) -> str:
        # The port is in the name: browsers share cookies among all ports of a host.
        return f"prefmill_{self.server.port}"

    def _enter(self, token: str) -> None:
        """Exchange the token in the address for a cookie, so that it stands in no history or referrer."""
        self._require_equal(token)
        cookie = f"{self._cookie}={token}; HttpOnly; SameSite=Strict; Path=/"
        self._reply(HTTPStatus.SEE_OTHER, b"", "text/plain", more={"Location": "/", "Set-Cookie": cookie})

    def _require_token(self) -> None:
        # Not by SimpleCookie: it reads nothing beside a cookie that it dislikes, such as another local program's.
        found = re.search(rf"(?:^|;)\s*{self._cookie}=([^;]*)", self.headers.get("Cookie", ""))
        self._require_equal(found[1].strip() if found else "")

    def _require_equal(self, token: str) -> None:
        # In constant time, and as bytes: compare_digest raises TypeError for text that is not ASCII.
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise RefusalError(HTTPStatus.FORBIDDEN, "open the address with the token that was printed")

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = _PAGE.read_text("utf-8").replace("{{nonce}}", nonce).encode()
        self._reply(HTTPStatus.OK, page, "text/html; charset=utf-8", policy)

    def _reply(
        self, status: HTTPStatus, body: bytes, kind: str, policy: str = "default-src 'none'", cache: str = "no-store",
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": policy,
            # The images are files of users: without it a browser may take one for a page and run it.
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": cache,
        }  # fmt: skip
        for name, value in {**headers, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _name(token: str, image: GoodImage) -> str:
    """An image's name on the page: tells nothing of its seed or model, and is another one for another picture."""
    content = f"{image.source.image_id}\0{image.sha256}"
    return hmac.new(token.encode(), content.encode(), hashlib.sha256).hexdigest()[:24]


def _parsed(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "not an address") from None


def _rater(name: object) -> str:
    """A rater's name; it comes into a table that people open, so nothing in it may act there."""
    given = unicodedata.normalize("NFC", " ".join(name.split())) if isinstance(name, str) else ""
    # Marks are parts of letters in many scripts, and no letters to Python.
    fits = all(sign.isalnum() or sign in " ._-" or unicodedata.category(sign)[0] == "M" for sign in given)
    if not (fits and given[:1].isalnum() and len(given) <= _LONGEST_NAME):
        raise RefusalError(HTTPStatus.BAD_REQUEST, "A name begins with a letter or digit; then also . _ - and spaces.")
    return given
