"""Whether the scorer computes a model's own likelihoods, tried on two short answers before anything is spent.

No list of architectures: whatever a model does to its logits, drops out in training or hides behind an attention of its
own shows as a difference. What the model itself says is its untouched forward in eval mode, with full logits.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefmill.core.errors import InputError, PrefmillError
from prefmill.core.precision import torch_dtype
from prefmill.distributed.scoring import inner_model
from prefmill.distributed.sharding import Sharded, shares_weights, uses_fsdp
from prefmill.families.causal.group_attention import own_attention, use_group_attention
from prefmill.families.causal.group_layout import pack
from prefmill.families.causal.scorer import (
    encode_sequences,
    forward_as,
    logps_of,
    patch_forward,
    score_batch,
    sum_by_owner,
)
from prefmill.training.preference_config import PreferenceConfig

_log = logging.getLogger(__name__)
_DRAWS = re.compile(r"(?i).*(drop|jitter).*")  # attributes that functions draw by
_PROMPT, _ANSWERS = 12, (7, 5)  # tokens
# Nats that a sum over an answer may differ by: rounding alone, in another order of the same operations.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.6, torch.float16: 0.1}
_NO_FAULT_OF_THE_MODEL = (PrefmillError, torch.OutOfMemoryError, MemoryError)
Sequences = list[tuple[list[int], list[int]]]


def as_scorer(model: Any, layout: str, name: str, shared: bool = False) -> Any:
    """`model` scoring instead of returning logits, its dropout off: reference and policy must agree.

    Raises ConfigError and InputError where it would not compute its own likelihoods in `layout`; one that ranks are
    to share is not run before they can run it together (`check_in_shards`).
    """
    # Before anything is changed: this is what the scorer is held against.
    expected = None if shared else own_likelihoods(model)
    turn_off_dropout(model)
    if layout == "group":
        use_group_attention(model)
    patch_forward(model)
    if expected is not None:
        check_scorer(model, expected, layout, name)
    return model


def check_in_shards(model: Any, config: PreferenceConfig, name: str) -> None:
    """As `check_scorer`, for a policy that ranks share and run together; any other was checked when it was loaded."""
    if not shares_weights(config):
        return
    inner = inner_model(model)
    with forward_as(inner, partial(type(inner).forward, inner)), own_attention(inner):
        expected = own_likelihoods(model)
    check_scorer(model, expected, config.layout, name, rounding(model, config))


def rounding(model: Any, config: Sharded) -> torch.dtype:
    """What `model` computes in outside of autocast: FSDP2 casts parts as it gathers them."""
    computed: torch.dtype = torch_dtype(config.precision) if uses_fsdp(config) else model.dtype
    return computed


def check_rows(model: Any, name: str, own: tuple[Sequences, Tensor], computed: torch.dtype) -> None:
    """Raise InputError where rows padded beside each other are not what each is alone: `sft` trains on such batches."""
    sequences, expected = own
    batch, was_training = encode_sequences(sequences, pad=0).to(model.device), model.training
    model.eval()  # sft keeps the model's own dropout
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    model.train(was_training)
    logps = logps_of(logits[batch.row, batch.column], batch.target)
    found = sum_by_owner(logps, batch.owner, len(sequences)).cpu()
    if not (found - expected).abs().max() <= TOLERANCE[computed]:  # NaN is no agreement
        raise InputError(
            "rows of a batch are not what each is alone in this model", where=name, got=_shown(found),
            expected=f"{_shown(expected)} within {TOLERANCE[computed]}",
            fix="set per_device_train_batch_size=1, or another attn_implementation",
        )  # fmt: skip


def agrees_with_fused_head(model: Any, own: tuple[Sequences, Tensor], computed: torch.dtype) -> bool:
    """Whether the loss that TRL computes of a model's last layer, with its head's weights, is the model's own.

    TRL goes by a list of what models do to their logits. ModernBERT's decoder has a layer before its head,
    RecurrentGemma a cap under another name, Llama 4 gives it no last layer, and code of its own does as it likes.
    """
    sequences, expected = own
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = torch.stack([_by_fused_head(model, *sequence) for sequence in sequences])
        agrees = bool((found - expected).abs().max() <= TOLERANCE[computed])
    except _NO_FAULT_OF_THE_MODEL:
        raise
    except Exception:  # whatever TRL's code makes of this model's
        agrees = False
    model.train(was_training)
    if not agrees:
        _log.warning("sft computes this model's loss by its own forward, with all logits: TRL's is another one")
    return agrees


def _by_fused_head(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    logps: Tensor = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    return logps.double().sum().cpu()


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Set every rate of dropout, layer drop and router jitter to 0: of modules, and of functions that modules call."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _DRAWS.fullmatch(name):
                setattr(module, name, 0.0)


def own_likelihoods(model: Any) -> tuple[Sequences, Tensor]:
    """Two sequences and their likelihoods by the model's own forward, [2] float64, before it is changed in any way."""
    sequences = _sequences(model)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        scores = [_own(model, prompt, answer) for prompt, answer in sequences]
    model.train(was_training)
    expected = torch.stack(scores)
    if not expected.isfinite().all():
        raise InputError(
            "the model's own likelihoods are no numbers", where=model.config.name_or_path or None, got=_shown(expected),
            expected="finite",
            fix="give the model as it was published, or read its weights, which hold NaN or overflow, with more digits",
        )  # fmt: skip
    return sequences, expected


def check_scorer(
    model: Any, expected: tuple[Sequences, Tensor], layout: str, name: str, computed: torch.dtype | None = None
) -> None:
    """Raise InputError where the scorer of `model`, in train mode and in `layout`, differs from `expected`.

    It may differ by the rounding of `computed`, the weights' dtype unless given. A model whose logits are more than a
    projection (scaled, capped) is given its own head first.
    """
    tolerance, seen = TOLERANCE[computed or model.dtype], []
    for own_head in (False, True):
        inner_model(model).own_head = own_head  # read by the scorer
        try:
            found = _scored(model, expected[0], layout)
        except _NO_FAULT_OF_THE_MODEL:
            raise
        except Exception as error:  # whatever a model's code makes of arguments that it does not know
            seen.append(f"{type(error).__name__}: {error}"[:200])
            continue
        if (found - expected[1]).abs().max() <= tolerance:  # NaN is no agreement
            return
        seen.append(_shown(found))
    raise InputError(
        "the scorer does not compute this model's own likelihoods", where=name,
        got=f"{seen[-1]} in train mode, layout {layout}", expected=f"{_shown(expected[1])} within {tolerance}",
        fix="set layout=pairwise" if layout == "group" else "use another model: this one drops out in functions, "
        "or attends in a way that is not known here",
    )  # fmt: skip


def _scored(model: Any, sequences: Sequences, layout: str) -> Tensor:
    if layout == "group":
        batch = pack([(sequences[0][0], [answer for _, answer in sequences])])
    else:
        batch = encode_sequences(sequences, pad=0)
    return scored_in_training(model, batch, score_batch)


def scored_in_training(model: Any, batch: Any, score: Callable[[Any, Any], Tensor]) -> Tensor:
    """What `score` gives of a batch in train mode: dropout inside functions (StarCoder2) shows in no other."""
    was_training = model.training
    model.train()
    with torch.no_grad():
        scores = score(model, batch.to(model.device))
    model.train(was_training)
    return scores.cpu()


def _sequences(model: Any) -> Sequences:
    """One prompt and two answers, of tokens that stand for nothing special."""
    config = model.config.get_text_config()
    special = {value for key, value in {**model.config.to_dict(), **config.to_dict()}.items()
               if key.endswith("token_id") and isinstance(value, int)}  # fmt: skip
    count = min(model.get_input_embeddings().num_embeddings, getattr(config, "vocab_size", None) or math.inf)
    plain = [token for token in range(count) if token not in special]
    # Fixed rather than drawn: the check must not differ between ranks or attempts.
    ids = [plain[(7 * place + 3) % len(plain)] for place in range(_PROMPT + sum(_ANSWERS))]
    prompt, rest = ids[:_PROMPT], ids[_PROMPT:]
    return [(prompt, rest[: _ANSWERS[0]]), (prompt, rest[_ANSWERS[0] :])]


def _own(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    if len(logits) != ids.shape[1]:  # DiffusionGemma writes a block behind its input
        raise InputError(
            "this model does not say how likely each token is", where=model.config.name_or_path or None,
            got=f"logits of {len(logits)} tokens for {ids.shape[1]}", expected="as many",
            fix="give a causal language model; masked-diffusion models are trained by mdlm_sft and mdlm_dpo",
        )  # fmt: skip
    return logps_of(logits[len(prompt) - 1 : -1], ids[0, len(prompt) :]).double().sum().cpu()


def _shown(values: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())
