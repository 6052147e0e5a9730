"""A real Chromium, driven over its DevTools protocol: pages are opened, keys pressed, what is shown is read."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PATIENCE_SECONDS = 120.0  # a browser on a machine with other work


class Page:
    """A tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a DevTools command."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE_SECONDS))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, url: str) -> None:
        """Go to `url`."""
        self.call("Page.navigate", url=url)

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true in the page."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(AssertionError):  # between two pages there is nothing to ask
                if self.read(expression):
                    return
            assert time.monotonic() < deadline, f"{expression}: {self.read('document.body.innerText')}"
            time.sleep(0.02)

    def press(self, key: str, place: str = "") -> None:
        """A key, down and up; `place` is its code on the keyboard, where that matters."""
        text = {"text": key} if len(key) == 1 else {}
        code = {"ArrowLeft": 37, "ArrowDown": 40, "ArrowRight": 39, "Backspace": 8}.get(key, ord(key[0].upper()))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=place, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        time.sleep(0.1)  # as a hand: what comes faster a page may take for a key that bounces

    def click(self, selector: str, times: int = 1) -> None:
        """A mouse on the middle of an element, `times` in a row as in a double click."""
        box = self.read(f"{_element(selector)}.getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left"}
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, clickCount=count, **at)
            time.sleep(0.12)

    def tap(self, selector: str) -> None:
        """A finger on the middle of an element, which must be on the screen and not under another one."""
        box = self.read(f"{_element(selector)}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        assert self.read(f"{_element(selector)}.contains(document.elementFromPoint({x}, {y}))"), selector
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def resize(self, width: int, height: int) -> None:
        """Show the page as in a window of this size; below 500 pixels as on a phone, with touch."""
        phone = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def accessibility_faults(self) -> list[str]:
        """What axe-core calls serious or critical: rule, element and the rule's own words."""
        source = files("axe_core_python") / "axe.min.js"
        self.read(source.read_text() + "; 0")
        found = self.read("axe.run().then(result => JSON.stringify(result.violations))")
        return [
            f"{rule['id']}: {node['html'][:120]} ({node['failureSummary']})"
            for rule in json.loads(found)
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]

    def printed_pages(self) -> int:
        """How many sheets the page takes on paper."""
        document = self.call("Page.printToPDF", preferCSSPageSize=True)["data"]
        return len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(document)))

    def console(self) -> list[str]:
        """What the page complained of: errors, and what its policy refused."""
        found = []
        for event in self.events:
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(str(event["params"]["entry"]["text"]))
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
        return found

    def requested(self) -> set[str]:
        """Every address that was asked for."""
        return {
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        }


def _element(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"


@contextlib.contextmanager
def started(program: str, profile: Path) -> Iterator[Browser]:
    """A browser of its own, ended at the end."""
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-extensions", "--disable-background-networking", "--disable-component-update",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1200,800", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Browser(profile)
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


class Browser:
    """Opens tabs."""

    def __init__(self, profile: Path) -> None:
        path = profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not path.is_file() or len(path.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        self._base = f"http://127.0.0.1:{path.read_text().splitlines()[0]}"

    @contextlib.contextmanager
    def tab(self) -> Iterator[Page]:
        """A new tab, closed at the end."""
        request = urllib.request.Request(f"{self._base}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as reply:
            target = json.loads(reply.read())
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Page(socket)
        urllib.request.urlopen(f"{self._base}/json/close/{target['id']}", timeout=PATIENCE_SECONDS).close()
