"""The prompt and completion: what each modality holds, the round trip, and that no text becomes a marker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER, Paper, Review
from prefmill.reviews.prompt import (
    neutralise,
    review_completion,
    review_images,
    review_messages,
    split_completion,
    title_and_abstract,
)
from prefmill.reviews.scale import COMMON_SCALE

MARKERS = [
    "<image>", "<IMAGE>", "<video>", "<audio>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>",
    "<|vision start|>", "<｜User｜>", "<s>", "</s>", "<start_of_turn>", "</think>", "[INST]", "[/INST]", "<<SYS>>",
]  # fmt: skip


def paper(**changes: object) -> Paper:
    row = {
        "paper_id": "p1", "title": "A title", "abstract": "An abstract.", "text": "The body.", "decision": "accepted",
        "venue": "v", "split": "train", "pages": ["pages/p1/000.png"] * 3, "figures": ["figures/p1/a.png"] * 2,
    }  # fmt: skip
    return row | changes  # type: ignore[return-value]


def review(text: str, rating: float) -> Review:
    row = {"review_id": "r", "paper_id": "p1", "text": text, "rating": rating}
    return row | {"confidence": None, "venue": "v", "sub_scores": {}}  # type: ignore[return-value]


def prompt(modality: str, **changes: object) -> str:
    (message,) = review_messages(paper(**changes), modality)  # type: ignore[arg-type]
    assert message["role"] == "user"
    return message["content"]


def test_clean_has_title_abstract_and_text_and_no_marker() -> None:
    text = prompt("clean")
    assert "A title" in text
    assert "An abstract." in text
    assert "The body." in text
    assert IMAGE_MARKER not in text


@pytest.mark.parametrize("modality", ["clean", "clean_images", "vision"])
def test_title_is_found_in_every_prompt(modality: str) -> None:
    abstract = "x\nTitle: another\n\nMore."
    assert title_and_abstract(prompt(modality, abstract=abstract)) == ("A title", abstract)
    assert title_and_abstract(prompt(modality, abstract="")) == ("A title", "")
    assert title_and_abstract("no title here") == (None, None)


def test_clean_without_paper_text_names_no_empty_section() -> None:
    assert "Paper:" not in prompt("clean", text=" \n")


def test_clean_images_adds_a_marker_for_each_figure() -> None:
    assert prompt("clean_images").startswith(prompt("clean"))
    assert prompt("clean_images").count(IMAGE_MARKER) == 2 == len(review_images(paper(), "clean_images"))


def test_vision_gives_pages_instead_of_text() -> None:
    text = prompt("vision")
    assert text.count(IMAGE_MARKER) == 3 == len(review_images(paper(), "vision"))
    assert "The body." not in text
    assert "A title" in text
    assert "An abstract." in text


@pytest.mark.parametrize(("modality", "column"), [("clean_images", "figures"), ("vision", "pages")])
def test_image_modality_without_images_is_an_error(modality: str, column: str) -> None:
    with pytest.raises(InputError, match="p1 has no images"):
        prompt(modality, **{column: []})


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_in_the_data_stay_text(marker: str) -> None:
    for column in ("title", "abstract", "text"):
        assert marker not in prompt("clean", **{column: f"before {marker} after"})
    assert marker not in review_completion(review(f"I like {marker}{marker}.", 6), COMMON_SCALE)


@given(st.lists(st.sampled_from([*MARKERS, "<", ">", "|", "x", " ", "[", "\n"]), max_size=12))
def test_no_marker_forms_from_the_pieces_of_others(pieces: list[str]) -> None:
    text = neutralise("".join(pieces)).casefold()
    assert not [marker for marker in MARKERS if marker.casefold() in text]
    assert neutralise(text) == text


def test_maths_is_left_alone() -> None:
    text = "if a < b and |x| > 0, P(a<|b|) [1] <x, y> {s} holds"
    assert neutralise(text) == text


@pytest.mark.parametrize("rating", [1, 6.0, 5.5, 10])
def test_completion_and_split_are_inverse(rating: float) -> None:
    completion = review_completion(review("Good.\n\nRating: 3 was my first thought.\n", rating), COMMON_SCALE)
    assert completion.splitlines()[-1] == f"Rating: {rating:g}"
    assert split_completion(completion, COMMON_SCALE) == ("Good.\n\nRating: 3 was my first thought.", rating)


@pytest.mark.parametrize("text", ["No rating", "Rating: many", "Rating: 11", "Rating: 0", "x\nRating: 6\nmore", ""])
def test_split_without_a_rating_keeps_the_text(text: str) -> None:
    assert split_completion(text, COMMON_SCALE) == (text, None)


def test_split_accepts_what_models_write() -> None:
    assert split_completion("Fine.\n\nRating: 7/10\n ", COMMON_SCALE) == ("Fine.", 7.0)
    assert split_completion("Rating: 7", COMMON_SCALE) == ("", 7.0)
