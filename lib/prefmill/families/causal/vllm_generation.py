"""Generating with vLLM: every sample by a seed of its own, many at a time, each kept as it is finished."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams

from prefmill.families.causal.generation import Completion, GenerationRequest, Sampling, as_completion, stream_seed
from prefmill.families.causal.vision import ImageReader
from prefmill.store.journal import Journal
from prefmill.store.missing import Progress, silent
from prefmill.store.pictures import open_image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOURNAL = "written.journal"


def generate_with_vllm(
    llm: Any,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    batch_size: int,
    folder: Path,
    progress: Progress = silent,
    reader: ImageReader | None = None,
) -> dict[tuple[str, int], Completion]:
    """A completion for every request, by (key, sample); those in the journal in `folder` are not made again.

    `llm` comes from `open_vllm`, with `image_options` where `reader` reads the images of requests. Draws are vLLM's
    own, seeded by (seed, key, sample): in float32 the order and the neighbours of a request do not change them.
    """
    from tqdm import tqdm

    with Journal(folder / JOURNAL) as journal, tqdm(total=len(requests), desc="generate", unit="review") as bar:
        done: dict[tuple[str, int], Completion] = {}
        for row in (entry.row() for entry in journal.entries()):
            done[row["key"], row["sample"]] = row
        bar.update(len(done))
        left = (
            (request, _prompt(request, reader), _parameters(request, end_ids, sampling))
            for request in requests
            if (request.key, request.sample) not in done
        )
        # Twice what the engine runs at once: a request waits whenever another ends.
        with closing(_finished(llm.llm_engine, left, 2 * batch_size)) as finished:
            for request, ids in finished:
                row = as_completion(request, ids, end_ids, tokenizer, sampling)
                journal.append(row)
                done[request.key, request.sample] = row
                bar.update()
                progress(len(done), len(requests), "reviews generated")
    return done


def _finished(
    engine: Any, asked: Iterator[tuple[GenerationRequest, dict[str, Any], SamplingParams]], num_in_flight: int
) -> Generator[tuple[GenerationRequest, list[int]]]:
    """Every request with the token ids it got, in the order in which they end.

    Images are read when their request's turn comes: those of a whole corpus do not fit the memory.
    """
    waiting: dict[str, GenerationRequest] = {}
    numbered = enumerate(asked)
    try:
        while True:
            for number, (request, prompt, parameters) in islice(numbered, num_in_flight - len(waiting)):
                # LLM.generate gives everything back at the end: a kill would lose it all.
                engine.add_request(str(number), prompt, parameters)
                waiting[str(number)] = request
            if not waiting:
                return
            for output in engine.step():
                if output.finished:
                    request = waiting.pop(output.request_id)
                    assert tuple(output.prompt_token_ids) == request.prompt_ids, "vLLM counts other image tokens"
                    yield request, list(output.outputs[0].token_ids)
    finally:  # a caller that stops early must leave nothing behind for the next one
        if waiting:
            engine.abort_request(list(waiting))


def _prompt(request: GenerationRequest, reader: ImageReader | None) -> dict[str, Any]:
    """vLLM expands an image's token itself, and is given RGB, so that it decodes and rotates nothing in its own way."""
    if not request.images:
        return {"prompt_token_ids": list(request.prompt_ids)}
    assert reader is not None, "requests with images come with their reader"
    images = [open_image(path) for path in request.images]
    return {"prompt_token_ids": reader.collapsed(request.prompt_ids), "multi_modal_data": {"image": images}}


def _parameters(request: GenerationRequest, end_ids: Sequence[int], sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=stream_seed(sampling.seed, request.key, request.sample) >> 65,  # vLLM takes 63 bits on every device
        ignore_eos=True,  # the tokens that end an answer are stated, not vLLM's guess at them
        stop_token_ids=list(end_ids),
        detokenize=False,
    )
