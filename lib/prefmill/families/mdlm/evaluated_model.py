"""A masked-diffusion model that is evaluated: likelihoods and answers, kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain as chain_of
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from prefmill.core.errors import ConfigError
from prefmill.core.files import digest_json
from prefmill.distributed.devices import has_gpu
from prefmill.families.causal.chat import encode, end_token_ids, prompt_text
from prefmill.families.causal.loading import LOADING, ORIGIN
from prefmill.families.causal.token_ids import token_ids
from prefmill.families.causal.whole import require_embedded
from prefmill.families.mdlm.estimator import block_sizes
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.generation import Unmasking, generate, takes_padding
from prefmill.families.mdlm.loading import (
    block_length_of,
    load_diffusion_model,
    load_diffusion_tokenizer,
    mask_token_of,
    predicts_next,
)
from prefmill.families.mdlm.scorer import encode_samples, masked_logps, patch_forward, restore_forward, score_batch
from prefmill.store.missing import Progress, in_batches, kept_rows, silent


@dataclass(frozen=True)
class Likelihood:
    """Of a response of `num_tokens`: its bound in nats, the mean of `values`, one per draw, in independent blocks."""

    num_tokens: int
    values: tuple[float, ...]
    blocks: tuple[int, ...]

    @property
    def bound(self) -> float:
        """B(y|x), in nats."""
        return sum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float | None:
        """Of the bound, from the spread of the blocks' means; None for a single block, which says nothing of it."""
        if len(self.blocks) < 2:
            return None
        sizes = np.array(self.blocks)
        means = np.add.reduceat(np.array(self.values), np.cumsum([0, *sizes[:-1]])) / sizes
        # The last block may be smaller. K/(K-1), as the mean is estimated from the same blocks.
        shares = sizes / sizes.sum()
        return float(np.sqrt((shares**2 * (means - self.bound) ** 2).sum() * len(sizes) / (len(sizes) - 1)))


@torch.no_grad()
def bounds(scorer: Any, samples: Iterable[tuple[list[int], list[int]]], drawing: Drawing) -> Iterator[Likelihood]:
    """The likelihood of every (prompt, response), under a model that is installed to score; the same draws for all."""
    device = next(scorer.parameters()).device
    for prompt, response in samples:
        # Always epoch 0: all models that are compared meet the same draws.
        batch = encode_samples([(prompt, response)], [drawing.of(prompt, response, 0)]).to(device)
        values = tuple(score_batch(scorer, batch)[0].tolist())
        yield Likelihood(len(response), values, tuple(block_sizes(drawing.num_draws, drawing.sampling)))


@torch.no_grad()
def chain(
    model: Any,
    prompt: Sequence[int],
    response: Sequence[int],
    mask_token_id: int,
    shifted: bool,
    forward_batch_size: int,
    block_length: int | None = None,
) -> float:
    """sum_i log p(y_i | x, y_<i, the rest (of its block) masked), in nats: exact for this order, one forward a token.

    The bound is this chain's mean over all orders. `model` has its own forward.
    """
    ids = torch.tensor([*prompt, *response], device=next(model.parameters()).device)
    places = torch.arange(len(prompt), len(ids), device=ids.device)
    total = 0.0
    for chunk in torch.split(places, forward_batch_size):
        clean = ids.expand(len(chunk), -1)
        noisy = clean.masked_fill(torch.arange(len(ids), device=ids.device) >= chunk[:, None], mask_token_id)
        asked = (torch.arange(len(chunk), device=ids.device), chunk)
        total += masked_logps(model, model.forward, noisy, asked, clean, shifted, block_length).double().sum().item()
    return total


SAMPLES_PER_BLOCK = 8  # what a kill costs at most, in responses
Row = dict[str, Any]


class Asked(NamedTuple):
    """A prompt in batch `number`, by which its draws go."""

    number: int
    prompt: list[int]


@dataclass(frozen=True)
class WrittenAnswer:
    """What a model wrote, without its end; `ended` unless it filled all the tokens that it was given."""

    text: str
    ended: bool


@dataclass
class Loaded:
    """A model to evaluate, with its tokenizer and how its outputs are read.

    What it has said is kept in `folder` block by block: an interrupted evaluation goes on from there.
    """

    label: str
    model: Any
    tokenizer: Any
    mask_token_id: int
    shifted: bool
    block_length: int | None
    config: DiffusionEvaluationConfig
    folder: Path
    advance: Progress

    def likelihoods(self, samples: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """The likelihood of every (prompt, response), by the configured draws."""
        self._require_embedded(ids for sample in samples for ids in sample)
        rows = self._kept("likelihoods", in_batches(samples, SAMPLES_PER_BLOCK), self._likelihoods)
        return [Likelihood(row["num_tokens"], tuple(row["values"]), tuple(row["blocks"])) for row in rows]

    def chains(self, samples: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """log p of every (prompt, response), a forward for each token, in order."""
        return self._kept("chains", in_batches(samples, SAMPLES_PER_BLOCK), self._chains)

    def answers(self, prompts: Sequence[str], how: Unmasking) -> list[WrittenAnswer]:
        """An answer to every user's message, in order."""
        return self.continuations([self._prompt(text) for text in prompts], how)

    def continuations(self, prompts: Sequence[list[int]], how: Unmasking) -> list[WrittenAnswer]:
        """An answer to every prompt (token ids), in order."""
        ends = answer_ends(self.model, self.tokenizer)
        return [self._answer(ids, ends) for ids in self.unmasked(prompts, how, ends)]

    def unmasked(
        self, prompts: Sequence[list[int]], how: Unmasking, ends: Collection[int] = frozenset()
    ) -> list[list[int]]:
        """Token ids of an answer to every prompt, in order; prompts of about one length run together."""
        self._require_embedded(prompts)
        # Blocks count from a text's start: filled up on the left, prompts would have theirs in different columns.
        mixed = self.block_length is None and takes_padding(self.model)
        how = replace(how, block_length=self.block_length)
        places = batches_by_length(list(map(len, prompts)), self.config.batch_size, mixed)

        def write(batch: Sequence[Asked]) -> list[list[int]]:
            own = replace(how, seed=how.seed * 1_000_003 + batch[0].number)  # or every batch would be drawn alike
            given = [asked.prompt for asked in batch]
            return generate(self.model, given, own, self.mask_token_id, self.shifted, ends)

        blocks = [[Asked(number, prompts[place]) for place in batch] for number, batch in enumerate(places)]
        found = self._kept("answers", blocks, write, [vars(how), sorted(ends)])
        written = dict(zip(chain_of.from_iterable(places), found, strict=True))
        return [written[place] for place in range(len(prompts))]

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a user's message and an answer to it."""
        return encode(self.tokenizer, [{"role": "user", "content": question}], answer)

    def _require_embedded(self, used: Iterable[Sequence[int]]) -> None:
        size = self.model.get_input_embeddings().num_embeddings
        require_embedded(used, self.tokenizer, size, self.model.config.name_or_path or self.label)

    def _kept(
        self, name: str, blocks: Sequence[Sequence[Any]], make: Callable[[Sequence[Any]], list[Any]], how: object = None
    ) -> list[Any]:
        """`make`'s rows of every block, kept under what was asked: a benchmark's are other files than the pairs'."""
        asked = digest_json([name, blocks, how])[:16]
        return kept_rows(self.folder, f"{name}-{asked}", blocks, make, self.advance, f"{self.label}: {name}")

    def _likelihoods(self, samples: Sequence[tuple[list[int], list[int]]]) -> list[Row]:
        config = self.config
        drawing = Drawing(config.diffusion_steps, config.sampling, config.seed, block_length=self.block_length)
        scorer = patch_forward(
            self.model, mask_token_id=self.mask_token_id, shifted=self.shifted,
            forward_batch_size=config.forward_batch_size, block_length=self.block_length,
        )  # fmt: skip
        try:
            return list(map(vars, bounds(scorer, samples, drawing)))
        finally:
            # Generation and the chain need the model's own logits again.
            restore_forward(self.model)

    def _chains(self, samples: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        how = (self.mask_token_id, self.shifted, self.config.forward_batch_size, self.block_length)
        return [chain(self.model, prompt, response, *how) for prompt, response in samples]

    def _prompt(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, prompt_text(self.tokenizer, [{"role": "user", "content": text}]))

    def _answer(self, ids: list[int], ends: Collection[int]) -> WrittenAnswer:
        # Ends are taken out by id: one that is no special token would stay in the text.
        text: str = self.tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True)
        return WrittenAnswer(text.strip(), ended=ids[-1] in ends)


def batches_by_length(lengths: Sequence[int], batch_size: int, mixed: bool) -> list[Sequence[int]]:
    """Places of prompts of these lengths, the shortest first, in batches; of one length each unless `mixed`."""
    ordered = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    runs = [ordered] if mixed else [list(run) for _, run in groupby(ordered, key=lambda place: lengths[place])]
    return [batch for run in runs for batch in in_batches(run, batch_size)]


def answer_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the end of a turn as the template has it, and the ends that model and tokenizer state."""
    return frozenset(end_token_ids(getattr(model, "generation_config", None), tokenizer))


def load(label: str, name: str, config: DiffusionEvaluationConfig, folder: Path, advance: Progress = silent) -> Loaded:
    """A model ready to be evaluated, which keeps what it says in `folder`."""
    tokenizer = load_diffusion_tokenizer(name, template=config, **config.model_dump(include=ORIGIN))
    options = config.model_dump(include=LOADING)
    model = load_diffusion_model(name, precision=config.precision, **options).eval()
    # Bitsandbytes puts 4-bit weights on the GPU while it loads them.
    if has_gpu() and config.quantization is None:
        model = model.to("cuda")
    mask = mask_token_of(model, tokenizer, config.mask_token_id)
    shifted = predicts_next(model, config.shifted_logits)
    blocks = block_length_of(model.config, config.block_length, config.attn_implementation)
    if None not in (blocks, config.block_tokens) and blocks != config.block_tokens:
        raise ConfigError(
            "this model writes in blocks of its own", where=name, got=f"block_tokens {config.block_tokens}",
            expected=f"block_length, {blocks}", fix="leave block_tokens out",
        )  # fmt: skip
    return Loaded(label, model, tokenizer, mask, shifted, blocks, config, folder, advance)
