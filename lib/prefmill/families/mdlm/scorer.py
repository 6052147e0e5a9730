"""Likelihood bounds of responses under a masked-diffusion model, in memory that does not grow with the draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.distributed.scoring import inner_model
from prefmill.distributed.sharding import missing_runs
from prefmill.families.causal.scorer import (
    forward_as,
    logps_inside,
    recomputed,
    restore_own_forward,
    sum_by_owner,
)
from prefmill.families.mdlm.blocks import block_keys
from prefmill.families.mdlm.estimator import Draws
from prefmill.store.missing import in_batches
from prefmill.training.batches import Movable


@dataclass(frozen=True)
class DiffusionBatch(Movable):
    """S samples of at most T tokens, each with n maskings of its response; the prompt is never masked.

    `input_ids` [S, T] int64 with nothing masked, `ends` [S] the tokens of each row (the rest is padding that no model
    sees), `masked` [S, n, T] bool, `counts` [S, n] how many that are, `weights` [S, n, T] fp32; `lengths` [S] the
    response's tokens; `chosen`, `rejected` [N] name each pair's samples. Shapes follow from `ends` and `counts`, so
    these are numbers of the host: a GPU is never asked for them. With `upper_power` an upper bound is scored too.
    """

    input_ids: Tensor
    ends: tuple[int, ...]
    masked: Tensor
    counts: tuple[tuple[int, ...], ...]
    weights: Tensor
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor
    upper_power: float | None = None

    def first(self, num_draws: int) -> DiffusionBatch:
        """The batch with the first `num_draws` draws of every sample."""
        counts = tuple(row[:num_draws] for row in self.counts)
        return replace(self, masked=self.masked[:, :num_draws], counts=counts, weights=self.weights[:, :num_draws])


def encode_samples(
    samples: Sequence[tuple[list[int], list[int]]],
    draws: Sequence[Draws],
    chosen: Sequence[int] = (),
    rejected: Sequence[int] = (),
    upper_power: float | None = None,
) -> DiffusionBatch:
    """Prompts and responses (token ids) with their draws as a batch."""
    rows = [prompt + response for prompt, response in samples]
    width, num_draws = max(map(len, rows)), len(draws[0].weights)
    masked = torch.zeros(len(rows), num_draws, width, dtype=torch.bool)
    weights = torch.zeros(masked.shape)
    for index, ((prompt, response), drawn) in enumerate(zip(samples, draws, strict=True)):
        places = slice(len(prompt), len(prompt) + len(response))
        masked[index, :, places] = torch.from_numpy(drawn.masked)
        weights[index, :, places] = torch.tensor(drawn.weights.reshape(num_draws, -1))
    return DiffusionBatch(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        ends=tuple(map(len, rows)),
        masked=masked,
        counts=tuple(tuple(map(int, drawn.masked.sum(1))) for drawn in draws),
        weights=weights,
        lengths=torch.tensor([len(response) for _, response in samples]),
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long),
        upper_power=upper_power,
    )


def score_batch(model: Any, batch: DiffusionBatch) -> Tensor:
    """The value of every draw of every sample, [S, n] float64, through `model`'s installed forward.

    With `upper_power` a last column, [S, n + 1], has each sample's upper bound (`upper_bounds`).
    """
    names = ("input_ids", "ends", "masked", "counts", "weights", "lengths", "upper_power")
    scores: Tensor = model(**{name: getattr(batch, name) for name in names})
    return scores


def patch_forward(
    model: Any, *, mask_token_id: int, shifted: bool = False, forward_batch_size: int = 8,
    block_length: int | None = None,
) -> Any:  # fmt: skip
    """Make `model(...)` return the value of every draw, [S, n] float64: weight x masked tokens' log-probabilities.

    `forward_batch_size` maskings run through the model together; activations are recomputed in the backward pass, so
    that memory does not depend on how many draws there are. `shifted`: the output at a place is for the token after it
    (Dream). `block_length`: tokens see their own block, with its masks, and earlier ones, whole. Done to `forward`
    itself, so that DDP, ZeRO-3 and adapters wrap it as they wrap any model. Raises InputError for models whose head
    does more than project.
    """
    inner = inner_model(model)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "scale_logits"):
        if getattr(inner.config, name, None) not in (None, 1, 1.0, False):
            raise InputError(
                f"models that scale their logits are not supported ({name})", where=inner.config.model_type,
                fix="use a model whose logits are a plain projection, such as LLaDA-8B",
            )  # fmt: skip
    plain = inner.forward
    inner.forward_before = inner.__dict__.get("forward")  # one of its own has whoever hooks into the model

    def forward(
        self: Any, input_ids: Tensor, ends: Sequence[int], masked: Tensor, counts: Sequence[Sequence[int]],
        weights: Tensor, lengths: Tensor, upper_power: float | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        def masked_places(rows: Rows) -> tuple[Tensor, tuple[Tensor, ...]]:
            hidden = masked[rows.sample, rows.draw, : rows.end]
            # Their number is known: to find it anew would stop a GPU until it has caught up.
            return hidden, hidden.nonzero_static(size=rows.num_masked).unbind(1)

        def sums(rows: Rows) -> Tensor:
            clean, (hidden, places) = input_ids[rows.sample, : rows.end], masked_places(rows)
            noisy = clean.masked_fill(hidden, mask_token_id)
            logps = masked_logps(self, plain, noisy, places, clean, shifted, block_length)
            weighed = logps.double() * weights[rows.sample, rows.draw][places]
            total = sum_by_owner(weighed, places[0], len(rows.sample))
            return total if upper_power is None else torch.cat([total, logps.double()])

        together = list(chunks(ends, counts, forward_batch_size, input_ids.device))
        # Sharded weights are gathered by all ranks at once, so every rank runs the model equally often.
        idle = [_nothing(input_ids.device)] * missing_runs(len(together), self)
        found = recomputed(sums, [(rows,) for rows in [*together, *idle]])
        values = torch.cat([part[: len(rows.sample)] for rows, part in zip([*together, *idle], found, strict=True)])
        # Chunks go by length: back to samples and draws. Idle runs come last; no place points at them.
        order = torch.argsort(torch.cat([rows.sample * weights.shape[1] + rows.draw for rows in together]))
        draws = values[order].view(weights.shape[:2])
        if upper_power is None:
            return draws
        places = [masked_places(rows)[1] for rows in together]
        sample = torch.cat([rows.sample[row] for rows, (row, _) in zip(together, places, strict=True)])
        draw = torch.cat([rows.draw[row] for rows, (row, _) in zip(together, places, strict=True)])
        column = torch.cat([column for _, column in places])
        logps = torch.cat([part[len(rows.sample) :] for rows, part in zip(together, found, strict=False)])
        width = input_ids.shape[1]
        upper = upper_bounds(logps, sample, column, weights[sample, draw, column], lengths, width, upper_power)
        return torch.cat([draws, upper[:, None]], dim=1)

    inner.forward = MethodType(forward, inner)
    return model


def restore_forward(model: Any) -> None:
    """Give `model` its own forward back."""
    inner = inner_model(model)
    restore_own_forward(inner, inner.forward_before)


def masked_logps(
    model: Any, plain: Any, noisy: Tensor, places: tuple[Tensor, ...], clean: Tensor, shifted: bool,
    block_length: int | None = None,
) -> Tensor:  # fmt: skip
    """log p of the masked tokens of `noisy` [R, T], [C] fp32 by their `places` (rows, columns); logits nowhere else.

    With `block_length` each block of `noisy` is read after the earlier ones of `clean` [R, T], in one pass over both.

    The head is made to return these instead of logits, since models with code of their own have no decoder to call.
    It then runs once a forward pass, as FSDP2 and ZeRO-3 expect of a layer whose weights they gather.
    """
    head = model.get_output_embeddings()
    row, column = places
    project, runs = head.forward, []
    asked: dict[str, Tensor] = {"input_ids": noisy}
    read = column - 1 if shifted else column
    if block_length is not None and block_length < noisy.shape[1]:
        asked, read = _doubled(model, noisy, clean, read, column, block_length)

    def logps(hidden: Tensor) -> Tensor:
        runs.append(hidden.shape)
        return logps_inside(hidden[row, read], clean[row, column], project)[None, :, None]

    with forward_as(head, logps):
        # A cache would keep keys and values of every layer, which nothing reads.
        found: Tensor = plain(**asked, use_cache=False).logits
    if len(runs) != 1:
        raise InputError(
            "the model projects in a way that cannot be watched", where=model.config.model_type,
            got=f"its output embeddings ran {len(runs)} times", expected="once",
            fix="use a model with untied output embeddings, such as LLaDA-8B",
        )  # fmt: skip
    return found.flatten()


def _doubled(
    model: Any, noisy: Tensor, clean: Tensor, read: Tensor, column: Tensor, block_length: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments of a pass over `clean`, then `noisy`, by blocks, and where in it to read the tokens of `column`."""
    length = noisy.shape[1]
    asked = {"input_ids": torch.cat([clean, noisy], 1), **block_keys(model, length, block_length, doubled=True)}
    # Shifted, a block's first token is read in the block before, which is whole.
    return asked, torch.where(read // block_length < column // block_length, read, read + length)


class Rows(NamedTuple):
    """Maskings of one length that run together: draw `draw` of sample `sample`, [R] each, of `end` tokens.

    A tuple, as checkpointing looks into those for the device whose precision it restores.
    """

    sample: Tensor
    draw: Tensor
    end: int
    num_masked: int


def chunks(
    ends: Sequence[int], counts: Sequence[Sequence[int]], forward_batch_size: int, device: torch.device
) -> Iterator[Rows]:
    """The maskings of all samples, at most `forward_batch_size` together.

    Only rows of equal length share a chunk: versions of LLaDA's code ignore attention masks, so nothing may be padded.
    """
    for end in sorted(set(ends)):
        alike = [(s, d) for s, length in enumerate(ends) if length == end for d in range(len(counts[s]))]
        for piece in in_batches(alike, forward_batch_size):
            sample, draw = torch.tensor(piece).T.to(device, non_blocking=True)
            yield Rows(sample, draw, end, sum(counts[s][d] for s, d in piece))


def _nothing(device: torch.device) -> Rows:
    """One token with nothing masked: what a rank runs while others still have maskings, its value left out."""
    place = torch.zeros(1, dtype=torch.long, device=device)
    return Rows(place, place, end=1, num_masked=0)


def upper_bounds(
    logps: Tensor, sample: Tensor, column: Tensor, weights: Tensor, lengths: Tensor, width: int, power: float
) -> Tensor:
    """U of S samples, [S] float64, from masked tokens' log-probabilities [C] and the `weights` [C] of their draws.

    `sample` and `column` [C] say whose they are, `lengths` [S] how many tokens a response has, `width` is of a row.
    Each token's weights are scaled to sum to 1, as they do in the mean; tokens that no draw masked count as the others.
    """
    place = sample * width + column
    size = len(lengths) * width
    scaled = power * logps.double()
    # Largest first: p^b of an unlikely token is 0 in any precision.
    top = torch.full((size,), -torch.inf, dtype=torch.float64, device=logps.device)
    top = top.scatter_reduce(0, place, scaled.detach(), "amax")
    zeros = torch.zeros_like(top)
    share = zeros.index_add(0, place, weights.double() * torch.exp(scaled - top[place]))
    seen = zeros.index_add(0, place, weights.double())
    masked = seen > 0
    means = (share / seen).where(masked, torch.ones_like(seen))
    tokens = means.log() + top.masked_fill(~masked, 0.0)
    totals = (tokens / power).view(-1, width).sum(1)
    result: Tensor = totals * lengths / masked.view(-1, width).sum(1)
    return result
