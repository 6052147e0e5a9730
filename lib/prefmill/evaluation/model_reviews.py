"""A model's reviews of the held-out papers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import InputError
from prefmill.core.precision import Precision
from prefmill.core.records import Modality, Paper
from prefmill.distributed.devices import device_type
from prefmill.distributed.isolation import in_own_process
from prefmill.evaluation.generators import TransformersGeneration, VllmGeneration
from prefmill.evaluation.rows import Generation
from prefmill.families.causal.chat import end_token_ids
from prefmill.families.causal.generation import (
    Completion,
    GenerationRequest,
    Sampling,
    encode_prompts,
    generate_reviews,
    max_prompt_tokens,
    require_fitting,
)
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import load_config, load_model, load_tokenizer, stated_generation
from prefmill.families.causal.templates import ChatTemplate
from prefmill.families.causal.vision import ImageReader, with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.families.causal.vision_parts import require_both_ways
from prefmill.families.causal.vllm_loading import image_options, on_cpu, open_vllm, require_vllm
from prefmill.families.causal.whole import require_embedded
from prefmill.reviews.prompt import review_images, review_messages, split_completion
from prefmill.reviews.scale import COMMON_SCALE, rescaled, scale_of
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.missing import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
WRITTEN = "written.jsonl"


@dataclass(frozen=True)
class ModelSource:
    """Where the model is, a folder or a hub name, and how to load it."""

    name_or_path: str
    precision: Precision
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    template: ChatTemplate | None = None
    today: date | None = None  # for a template that reads the clock

    @property
    def origin(self) -> dict[str, Any]:
        """What says which files of the hub are meant."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class Writing:
    """How the model is to write; papers whose prompt has more than `max_prompt_tokens` are left out.

    `images` is the folder that papers name their images in, `limits` bounds their pixels.
    """

    modality: Modality
    images: Path
    limits: ImageLimits
    samples_per_paper: int
    max_prompt_tokens: int | None
    batch_size: int
    sampling: Sampling
    generation: TransformersGeneration | VllmGeneration


def write_reviews(
    source: ModelSource, papers: Mapping[str, Paper], writing: Writing, folder: Path, progress: Progress = silent
) -> list[Generation]:
    """The model's reviews, sorted by paper and sample; what is finished is kept in `folder` to resume from.

    They are written in a process of their own: whatever scores them finds the GPU free. Raises InputError when a
    prompt does not fit the model and no limit leaves it out, or when none is left; ConfigError without vLLM where it
    is asked for.
    """
    path = folder / WRITTEN
    if not path.is_file():
        if isinstance(writing.generation, VllmGeneration):
            require_vllm()
        in_own_process(folder, _write, source, papers, writing, folder, progress)
    return list(read_jsonl(path))


def _write(
    source: ModelSource, papers: Mapping[str, Paper], writing: Writing, folder: Path, progress: Progress
) -> None:
    tokenizer = load_tokenizer(
        source.name_or_path, template=source.template, today=source.today, **source.origin
    )  # fmt: skip
    reader = _reader(source, tokenizer, writing) if writing.modality != "clean" else None
    writing.limits.tell_unread_without(reader is not None)
    chats = {key: _chat(paper, writing) for key, paper in papers.items()}
    requests = _within(encode_prompts(tokenizer, chats, writing.samples_per_paper, reader), writing.max_prompt_tokens)
    shown = load_config(source.name_or_path, **source.origin).get_text_config()
    used = [[tokenizer.pad_token_id], *(request.prompt_ids for request in requests)]
    require_embedded(used, tokenizer, shown.vocab_size, source.name_or_path)
    if isinstance(writing.generation, VllmGeneration):
        completions = _with_vllm(source, tokenizer, requests, writing, writing.generation, reader, folder, progress)
    else:
        completions = _with_transformers(source, tokenizer, requests, writing, reader, folder, progress)
    if empty := sum(not row["text"].strip() for row in completions.values()):
        _log.warning(
            "%d of %d reviews are empty: a model that thinks first may need more max_new_tokens, or "
            "chat_template_kwargs={enable_thinking: false} where its template knows that", empty, len(completions)
        )  # fmt: skip
    # Engines finish in any order: sorted, the file has the same bytes after a kill.
    ordered = sorted(completions.values(), key=lambda row: (row["key"], row["sample"]))
    write_jsonl(folder / WRITTEN, [_as_generation(row, papers[row["key"]]) for row in ordered])


def _chat(paper: Paper, writing: Writing) -> list[dict[str, Any]]:
    messages = [dict(message) for message in review_messages(paper, writing.modality)]
    return with_images(messages, [str(writing.images / name) for name in review_images(paper, writing.modality)])


def _reader(source: ModelSource, tokenizer: PreTrainedTokenizerBase, writing: Writing) -> ImageReader:
    reader = open_reader(source.name_or_path, tokenizer, writing.limits, **source.origin)
    if reader is None:
        raise InputError(
            "this model cannot be shown images", where=source.name_or_path, got=writing.modality,
            fix="evaluate a vision-language model such as Qwen2.5-VL, or use modality: clean",
        )  # fmt: skip
    return reader


def _with_transformers(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    writing: Writing,
    reader: ImageReader | None,
    folder: Path,
    progress: Progress,
) -> dict[tuple[str, int], Completion]:
    attention = source.attn_implementation
    model = load_model(
        source.name_or_path, precision=source.precision, attn_implementation=attention, **source.origin
    ).to(device_type())
    if reader is not None:
        require_both_ways(model)
    require_fitting(requests, max_prompt_tokens(model.config, writing.sampling.max_new_tokens))
    return generate_reviews(
        model, tokenizer, requests, writing.sampling, writing.batch_size, folder, progress, reader=reader
    )


def _with_vllm(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    writing: Writing,
    generation: VllmGeneration,
    reader: ImageReader | None,
    folder: Path,
    progress: Progress,
) -> dict[tuple[str, int], Completion]:
    """vLLM is told of no longer texts than there will be: its cache must have room for one of the longest."""
    from transformers import GenerationConfig

    config = load_config(source.name_or_path, **source.origin)
    sampling = writing.sampling
    require_fitting(requests, max_prompt_tokens(config, sampling.max_new_tokens))
    llm = open_vllm(
        source.name_or_path,
        precision=source.precision,
        tensor_parallel_size=generation.tensor_parallel_size,
        kv_cache_gb=generation.kv_cache_gb,
        enforce_eager=generation.enforce_eager,
        max_model_len=max(len(request.prompt_ids) for request in requests) + sampling.max_new_tokens,
        max_num_seqs=writing.batch_size,
        generation_config="vllm",  # the model's own defaults are set aside
        enable_chunked_prefill=False if on_cpu() else None,  # a seeded prompt in pieces ends its CPU runner
        **(image_options(reader, requests) if reader else {}),
        **source.origin,
    )
    from prefmill.families.causal.vllm_generation import (
        generate_with_vllm,  # vLLM's settings must stand before its import
    )

    stated = stated_generation(source.name_or_path, source.revision) or GenerationConfig.from_model_config(config)
    return generate_with_vllm(
        llm, tokenizer, end_token_ids(stated, tokenizer), requests, sampling, writing.batch_size, folder, progress,
        reader=reader,
    )  # fmt: skip


def _within(requests: Sequence[GenerationRequest], limit: int | None) -> list[GenerationRequest]:
    kept = [request for request in requests if limit is None or len(request.prompt_ids) <= limit]
    if not kept:
        raise InputError(
            "every paper's prompt is longer than the limit", got=min(len(item.prompt_ids) for item in requests),
            expected=f"at most {limit} tokens", fix="raise max_prompt_tokens, or use a model with a longer context",
        )  # fmt: skip
    return kept


def _as_generation(completion: Completion, paper: Paper) -> Generation:
    scale = scale_of(paper)
    text, rating = split_completion(completion["text"], scale)
    return {
        "paper_id": completion["key"],
        "sample": completion["sample"],
        "text": text,
        "rating": None if rating is None else rescaled(rating, scale, COMMON_SCALE),
        "decision": paper["decision"],
        "truncated": completion["truncated"],
        "num_tokens": completion["num_tokens"],
    }
