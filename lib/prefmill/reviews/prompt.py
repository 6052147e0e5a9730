"""The prompt that asks a model for a review, and the completion that answers it: one form for all stages."""

from __future__ import annotations

import re
from typing import Literal, TypedDict

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER, Modality, Paper, Review
from prefmill.reviews.scale import COMMON_SCALE, Scale, rescaled, scale_of

MODALITIES: tuple[Modality, ...] = ("clean", "clean_images", "vision")

_INSTRUCTION = 'Review this paper. End with a line "Rating: N", N from {:g} to {:g}.'
_INSTRUCTED = re.compile(r'"Rating: N", N from (\S+) to (\S+)\.(?=\s|$)')
_RATING_LINE = re.compile(r"Rating:\s*(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?\.?")
_TITLE_LINE = re.compile(r"^Title: (.+)$", re.MULTILINE)
_ABSTRACT = re.compile(r"\n\nAbstract: (.*?)(?:\n\n(?:Paper|Figures|Pages): |\Z)", re.DOTALL)
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
    # `:g` writes 10.0 as 10, as venues and reviewers do.
    instruction = _INSTRUCTION.format(*scale_of(paper))
    parts = [instruction, f"Title: {neutralise(paper['title'])}", f"Abstract: {neutralise(paper['abstract'])}"]
    if modality != "vision" and paper["text"].strip():
        parts.append(f"Paper: {neutralise(paper['text'])}")
    if modality != "clean":
        label = "Figures" if modality == "clean_images" else "Pages"
        parts.append(f"{label}: {IMAGE_MARKER * len(_require_images(paper, modality))}")
    return [{"role": "user", "content": "\n\n".join(parts)}]


def title_and_abstract(prompt: str) -> tuple[str | None, str | None]:
    """The title and the abstract in a prompt made by `review_messages`; None for what another text lacks."""
    # The first match: a paper's text may have such a line too, and comes after the title.
    title, abstract = (pattern.search(prompt) for pattern in (_TITLE_LINE, _ABSTRACT))
    return title and title[1], abstract and abstract[1]


def asked_scale(prompt: str) -> Scale:
    """The scale that a prompt made by `review_messages` names; the common one in any other text."""
    match = _INSTRUCTED.search(prompt)
    return (float(match[1]), float(match[2])) if match else COMMON_SCALE


def review_images(paper: Paper, modality: Modality) -> list[str]:
    """The images that go with the prompt, in the order of its markers, relative to the corpus."""
    return {"clean": [], "clean_images": paper["figures"], "vision": paper["pages"]}[modality]


def review_completion(review: Review, scale: Scale) -> str:
    """What the model is to answer: the review, then a last line `Rating: N`, N on the `scale` that the prompt names."""
    rating = rescaled(review["rating"], scale_of(review), scale)
    return f"{neutralise(review['text'])}\nRating: {rating:g}"


def split_completion(text: str, scale: Scale) -> tuple[str, float | None]:
    """A completion as review text and rating within `scale`; None, and the text whole, when no last line gives one."""
    body, _, last = text.strip().rpartition("\n")
    match = _RATING_LINE.fullmatch(last.strip())
    # Whoever writes 7/10 where 1 to 5 was asked for has not answered on the prompt's scale.
    rating = float(match[1]) if match and float(match[2] or scale[1]) == scale[1] else None
    if rating is None or not scale[0] <= rating <= scale[1]:
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
