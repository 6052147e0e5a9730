"""Every causal architecture of the installed transformers, tiny: what comes of it in both layouts."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES,
)

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.group_layout import pack
from prefmill.families.causal.load_check import as_scorer
from prefmill.families.causal.scorer import encode_sequences, score_batch
from tests.models.tiny_configs import tiny_config

GROUPS = [
    ([7, 50, 12, 33, 81, 20, 64, 9, 15, 72, 41, 28, 90], [[11, 60, 24, 35, 52, 70], [66], [19, 88, 44, 31]]),
    ([21, 45, 78, 30, 17, 62], [[53, 14, 92], [26, 39, 85, 10, 48, 75, 57]]),
]  # two prompts longer than a window of 5, and an answer of one token
TOLERANCE = 1e-3  # nats of an answer's sum, fp32
ARCHITECTURES = sorted({*CAUSAL, *IMAGES})


@dataclass(frozen=True)
class Row:
    """The outcome of an architecture in each layout: `works`, why it is refused, or `WRONG by ...`."""

    model_type: str
    name: str
    group: str
    pairwise: str


@lru_cache
def row_of(model_type: str) -> Row | str:
    """The row of an architecture; else why it cannot be built tiny here, or has no likelihood of text alone."""
    try:
        model = build(model_type)
        truth = own_scores(model)
    except KeyError:  # which key it is depends on the order of a set, another one in each process
        return "its configuration lacks a key"
    except Exception as error:  # as many kinds as there are architectures
        return next(iter(str(error).strip().splitlines()), type(error).__name__)[:110].strip(" :")
    outcomes = [_outcome(copy.deepcopy(model), truth, layout) for layout in ("group", "pairwise")]
    return Row(model_type, type(model).__name__, *outcomes)


def build(model_type: str) -> Any:
    """The tiny model in fp32 with random weights, in eval mode."""
    config = tiny_config(model_type)
    kind = AutoModelForImageTextToText if model_type in IMAGES else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind.from_config(config).parameters())
    assert size < 20_000_000, f"not tiny: {size:,} weights"
    torch.manual_seed(0)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    model = kind.from_config(config, attn_implementation="eager" if capped else None).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point() and weight.ndim > 1:
                weight.normal_(0, 0.2)
    return model


def own_scores(model: Any) -> Tensor:
    """log p of every answer by the model's own forward, one sequence at a time: fp32 log_softmax of full logits."""
    scores = []
    with torch.no_grad():
        for prompt, answers in GROUPS:
            for answer in answers:
                logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
                logps = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
                scores.append(logps.gather(-1, torch.tensor(answer)[:, None]).double().sum())
    return torch.stack(scores)


def _outcome(model: Any, truth: Tensor, layout: str) -> str:
    try:
        scorer = as_scorer(model, layout, "tiny").train()
    except InputError:
        return "refused: other likelihoods than the model's own"
    except ConfigError as error:
        return f"refused: {error.details['got']}"
    rows = [(prompt, answer) for prompt, answers in GROUPS for answer in answers]
    batch = pack(GROUPS) if layout == "group" else encode_sequences(rows, pad=0)
    with torch.no_grad():
        difference = (score_batch(scorer, batch) - truth).abs().max().item()
    return "works" if difference <= TOLERANCE else f"WRONG by {difference:.4f} nats"


@contextmanager
def silence() -> Iterator[None]:
    """No warnings of transformers' and ours: refusals are what is shown."""
    import transformers

    ours, before = logging.getLogger("prefmill"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    ours.setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        yield
    ours.setLevel(logging.NOTSET)
    transformers.logging.set_verbosity(before)
