"""What stands between an engine and its judge: proxies that answer in its name, answers that never end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest

from prefmill.checklist.engine import ChatConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist
from prefmill.core.errors import PrefmillError
from tests.loopback import serving

PAPER: Any = {"paper_id": "p0", "title": "Sparse masks", "abstract": "We study masks.", "text": ""}
REVIEW: Any = {"review_id": "r0", "paper_id": "p0", "text": "Fine."}


def ask(monkeypatch: pytest.MonkeyPatch, url: str, **settings: Any) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    engine = open_engine(ChatConfig(model_name_or_path="judge", num_retries=0, **settings), load_checklist())
    list(engine.score([(PAPER, [REVIEW])]))


@pytest.mark.parametrize(("status", "message"), [(403, "refuses the key"), (407, "at this address"), (502, "answer")])
def test_a_proxy_that_answers_for_the_server_is_named(
    monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    with serving(lambda *_: (status, {"Retry-After": "0"}, b"<html>")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        found = rf"{message}[\s\S]*the proxy in HTTP_PROXY.*NO_PROXY=judge.cluster goes past"
        with pytest.raises(PrefmillError, match=found):
            ask(monkeypatch, "http://judge.cluster:8000/v1")


@pytest.mark.timing
def test_an_answer_that_drips_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx's limit begins again with every byte: such a request had no end."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            with server.accept()[0] as client, contextlib.suppress(OSError):
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n")
                for _ in range(60):
                    client.sendall(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(PrefmillError, match=r"TimeoutError \(attempt 1\)"):
            ask(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout_seconds=0.5)
        thread.join()
