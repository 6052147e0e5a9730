"""A model's reviews of the held-out papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmill.blocks import Progress, silent
from prefmill.causal.generation import (
    Completion,
    Request,
    Sampling,
    encode_prompts,
    generate_reviews,
    max_prompt_tokens,
    require_fitting,
)
from prefmill.causal.loading import Precision, load_model, load_tokenizer
from prefmill.errors import InputError
from prefmill.evaluation.rows import Generation
from prefmill.records import Modality, Paper
from prefmill.reviews.prompt import review_messages, split_completion


@dataclass(frozen=True)
class ModelSource:
    """Where the model is, a folder or a hub name, and how to load it."""

    name_or_path: str
    precision: Precision
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None


@dataclass(frozen=True)
class Writing:
    """How the model is to write; papers whose prompt has more than `max_prompt_tokens` are left out."""

    modality: Modality
    samples_per_paper: int
    max_prompt_tokens: int | None
    batch_size: int
    sampling: Sampling


def write_reviews(
    source: ModelSource,
    papers: Mapping[str, Paper],
    writing: Writing,
    folder: Path,
    progress: Progress = silent,
) -> list[Generation]:
    """The model's reviews, sorted by paper and sample; batches are kept in `folder` to resume from.

    Raises InputError when a prompt does not fit the model and no limit leaves it out, or when none is left.
    """
    tokenizer = load_tokenizer(
        source.name_or_path, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    chats: dict[str, Sequence[Mapping[str, Any]]] = {
        key: [dict(message) for message in review_messages(paper, writing.modality)] for key, paper in papers.items()
    }
    requests = _within(encode_prompts(tokenizer, chats, writing.samples_per_paper), writing.max_prompt_tokens)
    model = load_model(
        source.name_or_path,
        precision=source.precision,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        attn_implementation=source.attn_implementation,
    ).to(_device())
    require_fitting(requests, max_prompt_tokens(model, writing.sampling.max_new_tokens))
    completions = generate_reviews(model, tokenizer, requests, writing.sampling, writing.batch_size, folder, progress)
    ordered = sorted(completions.values(), key=lambda row: (row["key"], row["sample"]))
    return [_as_generation(row, papers[row["key"]]) for row in ordered]


def _within(requests: Sequence[Request], limit: int | None) -> list[Request]:
    kept = [request for request in requests if limit is None or len(request.prompt_ids) <= limit]
    if not kept:
        raise InputError(
            "every paper's prompt is longer than the limit", got=min(len(item.prompt_ids) for item in requests),
            expected=f"at most {limit} tokens", fix="raise max_prompt_tokens, or use a model with a longer context",
        )  # fmt: skip
    return kept


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _as_generation(completion: Completion, paper: Paper) -> Generation:
    text, rating = split_completion(completion["text"])
    return {
        "paper_id": completion["key"],
        "sample": completion["sample"],
        "text": text,
        "rating": rating,
        "decision": paper["decision"],
        "truncated": completion["truncated"],
        "num_tokens": completion["num_tokens"],
    }
