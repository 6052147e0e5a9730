"""Generating with vLLM: the draws of `generation`, many requests at a time, each kept as it is finished."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from prefmill.families.causal.generation import (
    Completion,
    Request,
    Sampling,
    as_completion,
    inverse_cdf,
    keep_top_p,
    uniforms,
)
from prefmill.store.journal import Journal
from prefmill.store.missing import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOURNAL = "written.journal"
DRAW = "prefmill_draw"  # of a request's extra_args: [seed, key, sample, max_new_tokens, temperature, top_p]
_Draw = tuple[np.ndarray[Any, np.dtype[np.float64]], float, float, Sequence[int]]


class KeyedDraws(LogitsProcessor):
    """Draws every row's token from its request's own stream, as `generation.KeyedSampler` does for transformers.

    vLLM's own seeded draws follow its version and device; these follow (seed, key, sample) alone. The drawn token is
    left as the only possible one. Rows move between places in the batch: vLLM says so in `update_state`.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Draw] = {}

    def is_argmax_invariant(self) -> bool:
        """A draw is not what greedy decoding would take."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that were removed from, added to and moved within the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, parameters, _, written in batch_update.added:
            self._rows.pop(index, None)
            if draw := (parameters.extra_args or {}).get(DRAW):
                seed, key, sample, count, temperature, top_p = draw
                self._rows[index] = (uniforms(seed, key, sample, count), temperature, top_p, written)
        for first, second, direction in batch_update.moved:
            before, after = self._rows.pop(first, None), self._rows.pop(second, None)
            if before is not None:
                self._rows[second] = before
            if after is not None and direction == MoveDirectionality.SWAP:
                self._rows[first] = after

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [B, V], with everything but the draw at minus infinity in each row that has one."""
        groups: dict[tuple[float, float], list[int]] = {}
        for index, (_, temperature, top_p, _) in self._rows.items():
            groups.setdefault((temperature, top_p), []).append(index)
        for (temperature, top_p), indices in groups.items():
            numbers = [self._rows[index][0][len(self._rows[index][3])] for index in indices]
            uniform = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]
            rows = torch.tensor(indices, device=logits.device)
            probabilities = torch.softmax(logits[rows].double() / temperature, dim=-1)
            chosen = inverse_cdf(keep_top_p(probabilities, top_p), uniform)
            logits[rows] = torch.full_like(logits[rows], -torch.inf).scatter_(1, chosen, 0.0)
        return logits


def generate_with_vllm(
    llm: Any,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    requests: Sequence[Request],
    sampling: Sampling,
    folder: Path,
    progress: Progress = silent,
) -> dict[tuple[str, int], Completion]:
    """A completion for every request, by (key, sample); those in the journal in `folder` are not made again.

    `llm` comes from `open_vllm` with KeyedDraws among its logits_processors. In float32 a completion is that of
    `generation.generate_reviews` but for rounding.
    """
    from tqdm import tqdm

    with Journal(folder / JOURNAL) as journal, tqdm(total=len(requests), desc="generate", unit="review") as bar:
        done: dict[tuple[str, int], Completion] = {}
        for row in (entry.row() for entry in journal.entries()):
            done[row["key"], row["sample"]] = row
        bar.update(len(done))
        left = [request for request in requests if (request.key, request.sample) not in done]
        with closing(_finished(llm.llm_engine, left, end_ids, sampling)) as finished:
            for request, ids in finished:
                row = as_completion(request, ids, end_ids, tokenizer, sampling)
                journal.append(row)
                done[request.key, request.sample] = row
                bar.update()
                progress(len(done), len(requests), "reviews generated")
    return done


def _finished(
    engine: Any, requests: Sequence[Request], end_ids: Sequence[int], sampling: Sampling
) -> Generator[tuple[Request, list[int]]]:
    """Every request with the token ids it got, in the order in which they end."""
    waiting = {str(number): request for number, request in enumerate(requests)}
    try:
        for name, request in waiting.items():
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            engine.add_request(name, prompt, _parameters(request, end_ids, sampling))
        while waiting:
            for output in engine.step():
                if output.finished:
                    yield waiting.pop(output.request_id), list(output.outputs[0].token_ids)
    finally:  # a caller that stops early must leave nothing behind for the next one
        if waiting:
            engine.abort_request(list(waiting))


def _parameters(request: Request, end_ids: Sequence[int], sampling: Sampling) -> SamplingParams:
    """Greedy to vLLM in any case: KeyedDraws leaves one token to take."""
    draw = [sampling.seed, request.key, request.sample, sampling.max_new_tokens, sampling.temperature, sampling.top_p]
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=0.0,
        ignore_eos=True,  # the tokens that end an answer are stated, not vLLM's guess at them
        stop_token_ids=list(end_ids),
        detokenize=False,
        extra_args={DRAW: draw} if sampling.temperature > 0 else None,
    )
