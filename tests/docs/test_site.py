"""The documentation as a site: no link leads nowhere, its drawings are the code's, and anybody can read it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.docs import diagrams
from tests.e2e.browser import Browser, started

PAGES = ("index.html", "stages/dpo.html", "messages.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--no-directory-urls", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["flow", "library"])
def test_the_drawings_are_the_codes(name: str) -> None:
    path = diagrams.FOLDER / {"flow": "flow.svg", "library": "layers.svg"}[name]
    assert path.read_text() == getattr(diagrams, name)(), "run: python -m tests.docs.diagrams"


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    """The control: the same settings over a page with a wrong link."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](nowhere.md)\n")
    settings = (REPOSITORY / "mkdocs.yml").read_text().split("nav:")[0].replace("hooks: [docs/site_links.py]\n", "")
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_read_by_anybody_and_asks_nobody_else(chromium: str, site: Path, tmp_path: Path, width: int) -> None:
    with started(chromium, tmp_path) as browser:
        for name in PAGES:
            _check(browser, site / name, width)


def _check(browser: Browser, page: Path, width: int) -> None:
    with browser.tab() as tab:
        tab.resize(width, 844)
        tab.open(page.as_uri())
        tab.wait("document.readyState == 'complete' && document.querySelector('h1') != null")
        assert tab.accessibility_faults() == []
        assert tab.read("document.documentElement.scrollWidth") <= width
        assert {address for address in tab.requested() if not address.startswith(("file:", "data:", "about:"))} == set()
