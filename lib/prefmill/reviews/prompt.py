"""The prompt that asks a model for a review, and the completion that answers it: one form for all stages."""

from __future__ import annotations

import re
from typing import Literal, TypedDict

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER, Modality, Paper, Review

MODALITIES: tuple[Modality, ...] = ("clean", "clean_images", "vision")
MAX_RATING = 10

_INSTRUCTION = f'Review this paper. End with a line "Rating: N", N from 1 to {MAX_RATING}.'
_RATING_LINE = re.compile(rf"Rating:\s*(\d{{1,2}}(?:\.\d+)?)(?:\s*/\s*{MAX_RATING})?\.?")
_TITLE_LINE = re.compile(r"^Title: (.+)$", re.MULTILINE)
# What tokenizers and dataset loaders take for more than text. A space after the first character ends that, and
# as nothing is deleted, no marker can form from the pieces around another.
_MARKERS = re.compile(
    r"(?:<(?=[|｜][^<>|｜\n]{1,64}[|｜]>"
    r"|/?(?:image|video|audio|s|pad|unk|bos|eos|cls|sep|mask|start_of_turn|end_of_turn|think|tool_call)>"
    r"|<SYS>|</SYS>)"
    r"|\[(?=/?INST\]|(?:CLS|SEP|PAD|UNK|MASK|BOS|EOS)\]))",
    re.IGNORECASE,
)


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


def review_messages(paper: Paper, modality: Modality) -> list[Message]:
    """The chat that asks for a review of `paper`; it holds one `<image>` for each of `review_images`.

    `clean` gives title, abstract and text; `clean_images` its figures too; `vision` title, abstract and page images.
    Raises InputError when an image modality meets a paper without images.
    """
    parts = [_INSTRUCTION, f"Title: {neutralise(paper['title'])}", f"Abstract: {neutralise(paper['abstract'])}"]
    if modality != "vision" and paper["text"].strip():
        parts.append(f"Paper: {neutralise(paper['text'])}")
    if modality != "clean":
        label = "Figures" if modality == "clean_images" else "Pages"
        parts.append(f"{label}: {IMAGE_MARKER * len(_require_images(paper, modality))}")
    return [{"role": "user", "content": "\n\n".join(parts)}]


def prompt_title(prompt: str) -> str | None:
    """The title in a prompt made by `review_messages`; None in any other text."""
    match = _TITLE_LINE.search(prompt)
    return match[1] if match else None


def review_images(paper: Paper, modality: Modality) -> list[str]:
    """The images that go with the prompt, in the order of its markers, relative to the corpus."""
    return {"clean": [], "clean_images": paper["figures"], "vision": paper["pages"]}[modality]


def review_completion(review: Review) -> str:
    """What the model is to answer: the review, then a last line `Rating: N`."""
    return f"{neutralise(review['text'])}\nRating: {review['rating']:g}"


def split_completion(text: str) -> tuple[str, float | None]:
    """A completion as review text and rating, 1 to 10; None, and the text whole, when no last line gives one."""
    body, _, last = text.strip().rpartition("\n")
    match = _RATING_LINE.fullmatch(last.strip())
    rating = float(match[1]) if match else None
    if rating is None or not 1 <= rating <= MAX_RATING:
        return text.strip(), None
    return body.strip(), rating


def neutralise(text: str) -> str:
    """`text` stripped, with a space put into everything that would be read as a chat or image marker."""
    return _MARKERS.sub(r"\g<0> ", text.strip())


def _require_images(paper: Paper, modality: Modality) -> list[str]:
    images = review_images(paper, modality)
    if not images:
        raise InputError(
            f"paper {paper['paper_id']} has no images for the modality '{modality}'",
            expected="figures for clean_images, page images for vision",
            fix="ingest the papers' PDFs or figures, or leave this modality out of the configuration",
        )
    return images
