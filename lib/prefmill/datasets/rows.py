"""The rows of the datasets, in the chat forms that LLaMA-Factory and `datasets` read."""

from __future__ import annotations

from typing import Any, NamedTuple

from prefmill.checklist.scored import ScoredReview
from prefmill.core.records import Modality, Paper
from prefmill.datasets.pairs import ReviewPair
from prefmill.reviews.prompt import Message, review_completion, review_images, review_messages
from prefmill.reviews.scale import Scale, scale_of

IMAGES = "images"
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


class PaperPrompt(NamedTuple):
    """A paper's prompt, made once for all of its rows; `images` are relative to the artifact, None for text."""

    paper_id: str
    messages: list[Message]
    images: list[str] | None
    scale: Scale


def make_prompt(paper: Paper, modality: Modality) -> PaperPrompt | None:
    """The prompt of `paper`, or None when the modality needs images that it does not have."""
    images = review_images(paper, modality)
    if modality != "clean" and not images:
        return None
    paths = None if modality == "clean" else [f"{IMAGES}/{path}" for path in images]
    return PaperPrompt(paper["paper_id"], review_messages(paper, modality), paths, scale_of(paper))


def sft_row(prompt: PaperPrompt, scored: ScoredReview) -> dict[str, Any]:
    """A review to imitate: `messages` in the OpenAI form, the last one the assistant's."""
    answer = {"role": "assistant", "content": review_completion(scored.review, prompt.scale)}
    row = {
        "id": scored.review["review_id"],
        "paper_id": prompt.paper_id,
        "messages": [*prompt.messages, answer],
    }
    return _with_images(row, prompt)


def dpo_row(prompt: PaperPrompt, pair: ReviewPair) -> dict[str, Any]:
    """A preference in the ShareGPT form; `group` names the paper, so that its pairs can share one prompt."""
    row = {
        "id": pair.pair_id,
        "group": prompt.paper_id,
        "conversations": [{"from": _SPEAKERS[turn["role"]], "value": turn["content"]} for turn in prompt.messages],
        "chosen": {"from": "gpt", "value": review_completion(pair.chosen.review, prompt.scale)},
        "rejected": {"from": "gpt", "value": review_completion(pair.rejected.review, prompt.scale)},
        "chosen_id": pair.chosen.review["review_id"],
        "rejected_id": pair.rejected.review["review_id"],
        # Floats even where they are whole: `datasets` takes a column's type from the first rows.
        "rating_diff": float(pair.rating_diff),
        "checkmark_diff": float(pair.checkmark_diff),
    }
    return _with_images(row, prompt)


def _with_images(row: dict[str, Any], prompt: PaperPrompt) -> dict[str, Any]:
    return row if prompt.images is None else {**row, "images": prompt.images}
