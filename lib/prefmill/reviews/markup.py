"""HTML in texts, found, and read as plain text where a source says so; people's names and addresses in rows."""

from __future__ import annotations

import html
import re
from html.entities import html5
from typing import Any

_BLOCKS = "p|br|div|li|ul|ol|blockquote|tr|h[1-6]"
# Whole tags with whole attributes: "a < b and c > d" is none.
_TAG = re.compile(
    rf"""</?(?:({_BLOCKS})|b|i|u|em|strong|span|a|sub|sup)(?:\s+[\w-]+=(?:"[^"]*"|'[^']*'))*\s*/?>""", re.IGNORECASE
)
_ENTITY = re.compile(r"&(#\d{1,6}|#[xX][0-9a-fA-F]{1,5}|\w+);")
_BLANK = re.compile(r"[ \t]*\n\s*")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
_OF_PERSON = re.compile(  # fields that say who wrote or reviewed
    r"(?i)e-?mail|(?<!for )(?<!to )author|signature|readers|writers|member|orcid|affiliation|\b(user|reviewer)\b"
    r"|(^|\.)name\b|(reviewer|user|first|last|sur|given|family|full|middle)[ _-]?name"
)
_FIELD = re.compile(  # a name and its text or list, in which API 2 of OpenReview wraps them
    r"""((["'])([^"'\n]{1,99})\2\s*:\s*(?:\{\s*["']value["']\s*:\s*)?)"""
    r"""("(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|\[[^\]]*\]?)"""
)


def holds_html(text: str) -> bool:
    """Whether there are tags or entities of HTML in `text`."""
    return ("<" in text and _TAG.search(text) is not None) or ("&" in text and _holds_entity(text))


def _holds_entity(text: str) -> bool:
    return any(name.startswith("#") or f"{name};" in html5 for name in _ENTITY.findall(text))


def without_html(value: Any) -> Any:
    """`value`, and what is in it, with plain text in place of HTML: a line for every block."""
    if isinstance(value, dict):
        return {name: without_html(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_html(inner) for inner in value]
    if not isinstance(value, str) or not holds_html(value):
        return value
    # Tags first: an entity may spell a tag that is meant to be read.
    text = html.unescape(_TAG.sub(lambda tag: "\n" if tag[1] else "", value)).replace("\xa0", " ")
    return _BLANK.sub("\n", text).strip()


def without_people(row: str) -> str:
    """The text of a row with *** for e-mail addresses and in fields that say who wrote or reviewed."""
    # By their look, as most faulty rows cannot be decoded.
    row = _FIELD.sub(lambda field: f"{field[1]}***" if _OF_PERSON.search(field[3]) else field[0], row)
    return _EMAIL.sub("***", row)
