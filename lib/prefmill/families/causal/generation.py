"""Generating with a causal language model so that a sample depends on its own key, not on its batch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.chat import end_token_ids, image_paths, prompt_text
from prefmill.families.causal.positions import position_border
from prefmill.families.causal.thoughts import said
from prefmill.families.causal.token_ids import token_ids
from prefmill.families.causal.vision_parts import sees_both_ways
from prefmill.store.missing import Progress, in_batches, kept_rows, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from prefmill.families.causal.vision import ImageReader


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens; `temperature` 0 takes the likeliest, `top_p` keeps the smallest set of that mass."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class GenerationRequest:
    """One sample to generate: `key` (here a paper) and `sample` name its random stream; the prompt as token ids.

    `images` are the files of its images, in the order of their tokens.
    """

    key: str
    sample: int
    prompt_ids: tuple[int, ...]
    images: tuple[str, ...] = ()


class Completion(TypedDict):
    """What came out, without the end token and a thought; `truncated` when the token limit came first."""

    key: str
    sample: int
    text: str
    num_tokens: int
    truncated: bool


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    chats: Mapping[str, Sequence[Mapping[str, Any]]],
    num_samples: int,
    reader: ImageReader | None = None,
) -> list[GenerationRequest]:
    """The requests for `num_samples` answers to each chat, by the tokenizer's chat template.

    Chats with images need the model's `reader`; see `vision.with_images`.
    """
    requests = []
    for key, messages in chats.items():
        if reader is not None:
            ids, images = tuple(reader.encode_prompt(messages)), tuple(image_paths(messages))
        else:
            ids, images = tuple(token_ids(tokenizer, prompt_text(tokenizer, messages))), ()
        requests += [GenerationRequest(key, sample, ids, images) for sample in range(num_samples)]
    return requests


def max_prompt_tokens(config: PreTrainedConfig, max_new_tokens: int) -> int | None:
    """The longest prompt that leaves room for the answer; None where the model states no limit."""
    # The configuration of a model with a vision part has this limit in its text part.
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if context <= max_new_tokens:
        raise ConfigError(
            "max_new_tokens leaves no room for a prompt", got=max_new_tokens,
            expected=f"less than the model's context of {context} tokens", fix="lower max_new_tokens",
        )  # fmt: skip
    return int(context) - max_new_tokens


def plan_batches(
    requests: Sequence[GenerationRequest], batch_size: int, border: int | None = None, num_new: int = 0
) -> list[Sequence[GenerationRequest]]:
    """Batches of similar prompt length, the longest first (a batch too large for memory fails at once).

    Where a model has other positions beyond `border` tokens, prompts that pass it, prompts that do not within
    `num_new` more tokens, and prompts of each length that do on the way are apart.

    Deterministic: an interrupted run plans the same batches again.
    """

    def side(request: GenerationRequest) -> int:
        length = len(request.prompt_ids)
        if border is None or length + num_new <= border:
            return 0
        return length if length <= border else -1

    ordered = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.key, request.sample))
    alike = [list(group) for _, group in groupby(ordered, side)]
    return [batch for group in alike for batch in in_batches(group, batch_size)]


def generate_reviews(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    batch_size: int,
    folder: Path,
    progress: Progress = silent,
    reader: ImageReader | None = None,
) -> dict[tuple[str, int], Completion]:
    """A completion for every request, by (key, sample); finished batches are kept in `folder` to resume from.

    `reader` reads the images of requests that have any. In float32 a completion does not depend on the batch size but
    for rounding; at a lower precision padding moves logits by enough to change a token now and then.
    """

    def generate(batch: Sequence[GenerationRequest]) -> list[Completion]:
        return generate_batch(model, tokenizer, batch, sampling, reader)

    planned = plan_batches(requests, batch_size, position_border(model.config), sampling.max_new_tokens)
    rows = kept_rows(folder, "generated", planned, generate, progress, "reviews generated")
    return {(row["key"], row["sample"]): row for row in rows}


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[GenerationRequest],
    sampling: Sampling,
    reader: ImageReader | None = None,
) -> list[Completion]:
    """The completions of one left-padded batch, in its order."""
    import torch

    end_ids = end_token_ids(model.generation_config, tokenizer)
    length = max(len(request.prompt_ids) for request in batch)
    assert tokenizer.pad_token_id is not None
    # On the left: generate() goes on from the last column of every row, which must be the end of its prompt.
    padded = [[tokenizer.pad_token_id] * (length - len(item.prompt_ids)) + [*item.prompt_ids] for item in batch]
    mask = [[0] * (length - len(item.prompt_ids)) + [1] * len(item.prompt_ids) for item in batch]
    tokens = torch.tensor(padded, device=model.device)
    shown = _images(batch, tokens, reader)
    with torch.inference_mode(), _plain_generation(model, tokenizer, end_ids):
        output = model.generate(
            use_cache=True,  # training may have left it off
            **_room(model, length + sampling.max_new_tokens, shown),
            **shown,
            input_ids=tokens,
            attention_mask=torch.tensor(mask, device=model.device),
            logits_processor=_processors(batch, sampling, length),
            max_new_tokens=sampling.max_new_tokens,
            # Sampling in transformers draws from one generator for the whole batch: rows would depend on each other.
            do_sample=False,
        )
    answers = [row[length:] for row in output.tolist()]
    return [as_completion(item, ids, end_ids, tokenizer, sampling) for item, ids in zip(batch, answers, strict=True)]


class KeyedSampler:
    """A logits processor that draws each row's token from the row's own stream of uniform numbers.

    It leaves the drawn token as the only possible one, so that greedy decoding takes it. The cumulative
    distribution runs in the vocabulary's order, not by probability: rounding that swaps two equally likely tokens
    then changes nothing, and a sample differs between batches only where a number falls within rounding of a bound.
    """

    def __init__(self, uniforms: np.ndarray[Any, np.dtype[np.float64]], prompt_length: int, sampling: Sampling) -> None:
        self._uniforms, self._prompt_length, self._sampling = uniforms, prompt_length, sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` [B, V] with everything but each row's draw at minus infinity; `input_ids` [B, prompt + done]."""
        import torch

        step = input_ids.shape[1] - self._prompt_length
        uniform = torch.as_tensor(self._uniforms[:, step : step + 1], device=scores.device)
        # In float64: in fp32 a cumulative sum near 1 does not grow by a probability below 3e-8.
        probabilities = torch.softmax(scores.double() / self._sampling.temperature, dim=-1)
        chosen = inverse_cdf(keep_top_p(probabilities, self._sampling.top_p), uniform)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def keep_top_p(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """`probabilities` [B, V] with zeros outside the smallest set of tokens whose mass reaches `top_p`."""
    if top_p >= 1:
        return probabilities
    # Stable: tokens of the same probability keep their order on every device.
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    # The mass before a token counts: the one that crosses `top_p` stays, and the likeliest always does.
    return probabilities.scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))


def inverse_cdf(masses: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token [B, 1] at which the cumulative mass of `masses` [B, V] first exceeds its share `uniform` [B, 1]."""
    import torch

    cumulative = masses.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = masses.shape[-1] - 1 - (masses.flip(-1) > 0).int().argmax(dim=-1, keepdim=True)
    return torch.minimum(chosen, last)  # a product rounded up to the whole mass stays on the last token that has any


def uniforms(seed: int, key: str, sample: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`count` numbers in [0, 1) that follow from (seed, key, sample) alone, on every machine."""
    # PCG64 by name: NumPy may put another generator behind `default_rng`.
    return np.random.Generator(np.random.PCG64(stream_seed(seed, key, sample))).random(count)


def stream_seed(seed: int, key: str, sample: int) -> int:
    """128 bits that name the random stream of a sample: they follow from (seed, key, sample) alone."""
    # Python's own hash of a string is another one in every process.
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}/{sample}".encode()).digest()[:16])


def require_fitting(requests: Sequence[GenerationRequest], limit: int | None) -> None:
    """Raises InputError naming the longest prompt when it has more than `limit` tokens: nothing is cut silently."""
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    if limit is not None and len(longest.prompt_ids) > limit:
        count = len({request.key for request in requests if len(request.prompt_ids) > limit})
        raise InputError(
            f"{count} prompts do not fit the model's context", where=f"paper {longest.key}",
            got=f"{len(longest.prompt_ids)} tokens", expected=f"at most {limit} beside the answer",
            fix=f"set max_prompt_tokens={limit} to leave such papers out (they are counted), or lower max_new_tokens",
        )  # fmt: skip


@contextlib.contextmanager
def _plain_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> Iterator[None]:
    """Set the model's own generation defaults aside: a shipped top_k or repetition penalty would bias a comparison."""
    from transformers import GenerationConfig

    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _room(model: PreTrainedModel, num_tokens: int, shown: Mapping[str, Any]) -> dict[str, Any]:
    """Room for all keys and values from the start, as what grows is copied at every token; nothing for other models.

    transformers itself goes by this attribute; compiling a model for a few batches would take longer than they do.
    """
    from transformers import StaticCache

    # With this cache transformers (5.19) makes no mask for a prompt: an image's tokens would see none behind them.
    if not model._can_compile_fullgraph or (shown and sees_both_ways(model)):
        return {}
    return {"past_key_values": StaticCache(model.config, max_cache_len=num_tokens), "disable_compile": True}


def _images(
    batch: Sequence[GenerationRequest], tokens: torch.Tensor, reader: ImageReader | None
) -> dict[str, torch.Tensor]:
    """What the model needs of the batch's images; nothing where there are none."""
    paths = [path for request in batch for path in request.images]
    if not paths:
        return {}
    assert reader is not None, "requests with images come with their reader"
    return {name: value.to(tokens.device) for name, value in reader.inputs(paths, tokens).items()}


def _processors(batch: Sequence[GenerationRequest], sampling: Sampling, prompt_length: int) -> list[KeyedSampler]:
    if sampling.temperature == 0:
        return []
    rows = [uniforms(sampling.seed, item.key, item.sample, sampling.max_new_tokens) for item in batch]
    return [KeyedSampler(np.stack(rows), prompt_length, sampling)]


def as_completion(
    request: GenerationRequest,
    ids: Sequence[int],
    end_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> Completion:
    """The completion that the generated `ids` are, up to the first that ends it."""
    end = next((index for index, token in enumerate(ids) if token in end_ids), None)
    answer = list(ids if end is None else ids[:end])
    return {
        "key": request.key,
        "sample": request.sample,
        "text": said(tokenizer, request.prompt_ids, answer),
        "num_tokens": len(answer),
        "truncated": end is None and len(ids) >= sampling.max_new_tokens,
    }
