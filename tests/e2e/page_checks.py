"""What a page does in a real browser: messages, fetches, widths, faults of accessibility."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from browser import started

PHONE_SCREENS = 15


def browse(chromium: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open `page` in a real browser and wait until it is quiet."""
    profile = page.parent / "profile"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=3000",
        f"--user-data-dir={profile}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def opens_cleanly(chromium: str, folder: Path, html: str, width: int) -> None:
    """No message on the console, nothing fetched, nothing wider than a window of `width`."""
    page, log, shot = (folder / name for name in ("page.html", "net.json", "page.png"))
    page.write_text(html)
    done = browse(chromium, page, f"--window-size={width},2000", f"--log-net-log={log}", f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert requested(log) == set()
    assert shot.stat().st_size > 20_000
    with started(chromium, folder / "tabs") as browser, browser.tab() as tab:
        tab.resize(width, 844)
        tab.open(page.as_uri())
        tab.wait("document.readyState == 'complete'")
        assert tab.accessibility_faults() == []
        assert tab.printed_pages() <= tab.read("document.querySelectorAll('.verdict').length")  # a sheet a verdict
        if width < 500:
            assert tab.read("document.documentElement.scrollHeight") <= PHONE_SCREENS * 844
    # An outer page, which may run scripts, measures the report in a frame: it must not be wider than the window.
    assert inner_width(chromium, folder, html, width) <= width


def requested(log: Path) -> set[str]:
    """Every address that the page had fetched; what the browser asks for itself has no origin as its initiator."""
    starts = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    return {start["url"] for start in starts if start.get("initiator", "not an origin") != "not an origin"}


def inner_width(chromium: str, folder: Path, html: str, width: int) -> int:
    framed = folder / "framed.html"
    escaped = html.replace("&", "&amp;").replace('"', "&quot;")
    framed.write_text(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escaped}"></iframe><script>onload = () => '
        "{ document.title = frames[0].document.documentElement.scrollWidth }</script>"
    )
    done = browse(chromium, framed, "--dump-dom", "--window-size=1600,1000")
    found = re.search(r"<title>(\d+)</title>", done.stdout)
    assert found, done.stdout[:300]
    return int(found[1])
