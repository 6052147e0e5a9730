"""Evidence from a model: what it is asked to quote, and whether the quote stands in the review."""

from __future__ import annotations

import json

MAX_CHARACTERS = 300
MIN_CHARACTERS = 8  # "the" stands in every review
SCHEMA = {
    "type": "object",
    "properties": {"quote": {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS}},
    "required": ["quote"],
    "additionalProperties": False,
}
OPENING = '{"quote": "'  # of an answer of this schema
REQUEST = (
    "\nThe answer is yes. Copy the passage of the review that shows it, word for word and in at most "
    f"{MAX_CHARACTERS} characters, as JSON: {OPENING}..."
    '"}'
)
_JSON = json.JSONDecoder(strict=False)  # grammars let control characters through, tabs among them
_PLAIN = str.maketrans("‘’“”–—\u00a0", "''\"\"-- ")


def verified_quote(answer: str, review: str) -> str | None:
    """The passage of `review` that `answer`, JSON of the schema, quotes; None where it quotes nothing that is there.

    Spaces, capitals, and the kinds of quotation marks and dashes need not agree; words must. What is returned is the
    review's own text.
    """
    try:
        # raw_decode, as a model may write on behind the JSON.
        content, _ = _JSON.raw_decode(answer.strip())
    except ValueError:
        return None
    quote = content.get("quote") if isinstance(content, dict) else None
    return find_passage(quote, review) if isinstance(quote, str) else None


def find_passage(quote: str, review: str) -> str | None:
    """The first passage of `review` with the words of `quote`, at word boundaries; None where there is none."""
    wanted = _plain(quote.strip().strip("\"'“”‘’").strip())[0].strip(" .…")
    if not MIN_CHARACTERS <= len(wanted) <= MAX_CHARACTERS:
        return None
    text, places = _plain(review)
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not (_in_a_word(text, start) or _in_a_word(text, end)):
            return review[places[start] : places[end - 1] + 1]
        start = text.find(wanted, start + 1)
    return None


def is_closed(answer: str) -> bool:
    """Whether `answer` holds a whole JSON value."""
    try:
        _JSON.raw_decode(answer.strip())
    except ValueError:
        return False
    return True


def _plain(text: str) -> tuple[str, list[int]]:
    """`text` in lower case, with plain marks and single spaces, and where in `text` each character stands."""
    letters: list[str] = []
    places = []
    # One character for one, here and below, so that places stay those of `text`.
    for place, letter in enumerate(text.translate(_PLAIN)):
        if letter.isspace():
            if letters and letters[-1] == " ":
                continue
            letter = " "
        lowered = letter.lower()
        letters.append(lowered if len(lowered) == 1 else letter)
        places.append(place)
    return "".join(letters), places


def _in_a_word(text: str, place: int) -> bool:
    """Whether a cut at `place` goes through a word."""
    return 0 < place < len(text) and text[place - 1].isalnum() and text[place].isalnum()
