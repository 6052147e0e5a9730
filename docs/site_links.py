"""A hook of the documentation's site: links to files outside docs/ become their path in the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+|[\w/]+/)(?:#[^)]*)?\)")  # out of docs/, or a whole folder


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text, with what the site does not have named instead of linked."""
    folder = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(lambda found: _named(found, folder), markdown)


def _named(found: re.Match[str], folder: str) -> str:
    place = posixpath.normpath(posixpath.join("docs", folder, found[2]))
    if place.startswith("docs/") and not found[2].endswith("/"):
        return found[0]
    text = found[1].strip("`")
    return f"`{place}`" if text in place else f"{text} (`{place}`)"
