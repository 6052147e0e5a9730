"""The documentation: messages it explains are messages the code prints, links lead somewhere, keys are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefmill.core.stage import load_stage, stage_names
from tests.conftest import REPOSITORY
from tests.docs import messages

PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
_PLACEHOLDER = re.compile(r"\b[A-Z]+\b|…|\.\.\.|\d+|'[^']*'|<[^>]*>|\{[^}]*\}")


def source() -> str:
    """The code's text with the seams of literals written over several lines taken out."""
    text = "\n".join(path.read_text() for folder in ("lib", "stages") for path in (REPOSITORY / folder).rglob("*.py"))
    return re.sub(r'"\s*\n?\s*f?"', "", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_explained_messages_are_those_of_the_code(page: Path) -> None:
    code = source()
    for table in re.findall(r"^\| message \|.*?(?=\n\n|\Z)", page.read_text(), re.MULTILINE | re.DOTALL):
        for row in table.splitlines()[2:]:
            for message in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
                pieces = [piece.strip(" ,:;.") for piece in _PLACEHOLDER.split(message)]
                told = [piece for piece in pieces if len(piece) > 3] or [message]
                assert [piece for piece in told if piece not in code] == [], f"{page.name}: {message}"


def test_the_page_of_messages_is_the_codes_and_each_has_a_remedy() -> None:
    assert messages.PAGE.read_text() == messages.page(), "run: python -m tests.docs.messages"
    assert [line for line in messages.page().splitlines() if line.endswith("|  |")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("name", stage_names())
def test_a_stages_page_lists_its_keys(name: str) -> None:
    """Every key of the configuration is on the page, or on that of a stage it refers to."""
    pages, text = [name], ""
    for other in pages:  # grows as it is read: a page it refers to may refer to a third
        page = (REPOSITORY / "docs" / "stages" / f"{other}.md").read_text()
        pages += [found for found in re.findall(r"\]\((\w+)\.md\)", page) if found not in pages]
        text += page
    assert [key for key in load_stage(name).config.model_fields if f"`{key}" not in text] == []
