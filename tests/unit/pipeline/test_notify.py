"""A webhook is told once, and its address appears nowhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from prefmill.slurm.cluster import ClusterFile
from prefmill.slurm.notify import announce

OUTCOME = {"run": "r", "submission": 1, "state": "stopped", "tasks": 3, "open": 1, "stopped": ["sft:clean"]}


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address, and what was posted to it; 500 for a path that ends with `broken`."""
    posted: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path.endswith("broken") else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", posted
    server.shutdown()
    server.server_close()


@pytest.mark.timing
def test_it_is_told_once_and_again_when_the_outcome_differs(
    hook: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, posted = hook
    cluster = ClusterFile(webhook="HOOK")
    assert announce(tmp_path, ClusterFile(), OUTCOME) is None
    assert "neither a secret nor in the environment" in str(announce(tmp_path, cluster, OUTCOME))
    monkeypatch.setenv("HOOK", address + "/broken")
    said = announce(tmp_path, cluster, OUTCOME)
    assert said == "the webhook in HOOK was not reached (HTTP 500)"
    monkeypatch.setenv("HOOK", address)
    assert announce(tmp_path, cluster, OUTCOME) == "told the webhook in HOOK"
    assert announce(tmp_path, cluster, OUTCOME) is None
    announce(tmp_path, cluster, OUTCOME | {"state": "complete", "stopped": []})
    assert [row["state"] for row in posted] == ["stopped", "stopped", "complete"]
    assert posted[1]["text"] == "prefmill run r: stopped; stopped: sft:clean"
    assert "secret-path" not in "".join(path.read_text() for path in tmp_path.iterdir())
