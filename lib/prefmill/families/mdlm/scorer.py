"""Likelihood bounds of responses under a masked-diffusion model, in memory that does not grow with the draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.families.causal.scorer import recomputed, token_logps
from prefmill.families.mdlm.estimator import Draws


@dataclass(frozen=True)
class DiffusionBatch:
    """S samples of at most T tokens, each with n maskings of its response; the prompt is never masked.

    `input_ids` [S, T] int64 with nothing masked, `ends` [S] the tokens of each row (the rest is padding that no model
    sees), `masked` [S, n, T] bool, `weights` [S, n] fp32; `lengths` [S] the response's tokens; `chosen`, `rejected`
    [N] name each pair's samples.
    """

    input_ids: Tensor
    ends: Tensor
    masked: Tensor
    weights: Tensor
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor

    def to(self, device: torch.device) -> DiffusionBatch:
        """The batch on `device`."""
        return DiffusionBatch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def first(self, num_draws: int) -> DiffusionBatch:
        """The batch with the first `num_draws` draws of every sample."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"masked": self.masked[:, :num_draws], "weights": self.weights[:, :num_draws]}
        return DiffusionBatch(**values)


def encode_samples(
    samples: Sequence[tuple[list[int], list[int]]],
    draws: Sequence[Draws],
    chosen: Sequence[int] = (),
    rejected: Sequence[int] = (),
) -> DiffusionBatch:
    """Prompts and responses (token ids) with their draws as a batch."""
    rows = [prompt + response for prompt, response in samples]
    width, num_draws = max(map(len, rows)), len(draws[0].weights)
    masked = torch.zeros(len(rows), num_draws, width, dtype=torch.bool)
    for index, ((prompt, response), drawn) in enumerate(zip(samples, draws, strict=True)):
        masked[index, :, len(prompt) : len(prompt) + len(response)] = torch.from_numpy(drawn.masked)
    return DiffusionBatch(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        ends=torch.tensor([len(row) for row in rows]),
        masked=masked,
        weights=torch.stack([torch.from_numpy(drawn.weights) for drawn in draws]).float(),
        lengths=torch.tensor([len(response) for _, response in samples]),
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long),
    )


def score_batch(model: Any, batch: DiffusionBatch) -> Tensor:
    """The value of every draw of every sample, [S, n] fp32, through `model`'s installed forward."""
    scores: Tensor = model(input_ids=batch.input_ids, ends=batch.ends, masked=batch.masked, weights=batch.weights)
    return scores


def patch_forward(model: Any, *, mask_token_id: int, shifted: bool = False, rows_at_once: int = 8) -> Any:
    """Make `model(...)` return the value of every draw, [S, n] fp32: weight x masked tokens' log-probabilities.

    `rows_at_once` maskings run through the model together; activations are recomputed in the backward pass, so that
    memory does not depend on how many draws there are. `shifted`: the output at a place is for the token after it
    (Dream). Done to `forward` itself, so that DDP, ZeRO-3 and adapters wrap it as they wrap any model. Raises
    InputError for models whose head does more than project.
    """
    inner = inner_model(model)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "scale_logits"):
        if getattr(inner.config, name, None) not in (None, 1, 1.0, False):
            raise InputError(
                f"models that scale their logits are not supported ({name})", where=inner.config.model_type,
                fix="use a model whose logits are a plain projection, such as LLaDA-8B",
            )  # fmt: skip
    settings = (mask_token_id, shifted, rows_at_once)
    plain = inner.forward
    inner.forward_before = inner.__dict__.get("forward")  # one of its own has whoever hooks into the model

    def forward(self: Any, input_ids: Tensor, ends: Tensor, masked: Tensor, weights: Tensor, **_: Any) -> Tensor:
        return _draw_values(self, plain, settings, input_ids, ends, masked, weights)

    inner.forward = MethodType(forward, inner)
    return model


def restore_forward(model: Any) -> None:
    """Give `model` its own forward back."""
    inner = inner_model(model)
    if inner.forward_before is None:
        del inner.forward
    else:
        inner.forward = inner.forward_before


def inner_model(model: Any) -> Any:
    """The model that an adapter wraps, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def masked_logps(model: Any, plain: Any, noisy: Tensor, masked: Tensor, targets: Tensor, shifted: bool) -> Tensor:
    """log p of the masked tokens of `noisy` [R, T], [C] fp32 in the order of `masked` [R, T]; logits nowhere else."""
    head = model.get_output_embeddings()
    hidden = hidden_states(model, plain, noisy, head)
    row, column = masked.nonzero(as_tuple=True)
    return token_logps(hidden[row, column - 1 if shifted else column], targets[row, column], head)


def hidden_states(model: Any, plain: Any, input_ids: Tensor, head: Any) -> Tensor:
    """What `model` gives its head to project, [R, T, H]; the head itself runs on one place only.

    The head is watched rather than the decoder called, since models with code of their own have no decoder to call.
    """
    seen: list[Tensor] = []

    def watch(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][:, :1],)

    handle = head.register_forward_pre_hook(watch)
    try:
        plain(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise InputError(
            "the model projects in a way that cannot be watched", where=model.config.model_type,
            got=f"its output embeddings ran {len(seen)} times", expected="once",
            fix="use a model with untied output embeddings, such as LLaDA-8B",
        )  # fmt: skip
    return seen[0]


def _draw_values(
    model: Any, plain: Any, settings: tuple[int, bool, int], ids: Tensor, ends: Tensor, masked: Tensor, weights: Tensor
) -> Tensor:
    """Values of the draws, [S, n], a chunk of maskings at a time."""
    mask_token_id, shifted, rows_at_once = settings

    def sums(sample: Tensor, draw: Tensor, end: int) -> Tensor:
        clean, hidden = ids[sample, :end], masked[sample, draw, :end]
        logps = masked_logps(model, plain, clean.masked_fill(hidden, mask_token_id), hidden, clean, shifted)
        owner = hidden.nonzero(as_tuple=True)[0]
        return torch.zeros(len(sample), dtype=logps.dtype, device=logps.device).index_add(0, owner, logps)

    num_samples, num_draws = weights.shape
    together = list(chunks(ends, num_draws, rows_at_once))
    pieces = recomputed(sums, [(sample.to(ids.device), draw.to(ids.device), end) for sample, draw, end in together])
    order = torch.argsort(torch.cat([sample * num_draws + draw for sample, draw, _ in together])).to(ids.device)
    return weights * torch.cat(pieces)[order].view(num_samples, num_draws)


def chunks(ends: Tensor, num_draws: int, rows_at_once: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Samples and draws to run together, with their common number of tokens.

    Only rows of equal length share a chunk: versions of LLaDA's code ignore attention masks, so nothing may be padded.
    """
    lengths = ends.tolist()
    for end in sorted(set(lengths)):
        samples = torch.tensor([index for index, length in enumerate(lengths) if length == end])
        flat = (samples[:, None] * num_draws + torch.arange(num_draws)[None, :]).flatten()
        for piece in torch.split(flat, rows_at_once):
            yield piece // num_draws, piece % num_draws, end
