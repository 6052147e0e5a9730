"""Which layout a preference training takes where its configuration leaves that open."""

from __future__ import annotations

import logging

import torch

from prefmill.core.errors import ConfigError
from prefmill.families.causal.group_attention import refused, use_group_attention
from prefmill.families.causal.loading import load_config
from prefmill.families.causal.other_reference import reference_parts
from prefmill.families.causal.vision_parts import auto_class
from prefmill.training.preference_config import PreferenceConfig

# Found by the load check alone, with weights at hand (docs/models.md): a mixer that starts from no state, layers that
# do not pass on what they are given, a mask built from the mask.
_PAIRWISE_ONLY = frozenset((
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "doge", "falcon_mamba", "git", "jamba", "mamba",
    "marian", "mbart", "minimax", "moshi", "nemotron", "pegasus", "plbart", "recurrent_gemma", "stablelm",
    "xlstm", "zaya",
))  # fmt: skip


def choose_layout(config: PreferenceConfig, policy: str) -> tuple[PreferenceConfig, str | None]:
    """The configuration with `auto` replaced, and why it is pairwise then; None where it is group, or was not `auto`.

    What `auto` becomes follows from the configuration and the models alone, so that it is the same on every machine.
    Raises ConfigError for `group` where the models do not allow it.
    """
    if config.layout == "pairwise":
        return config, None
    reason = _why_pairwise(config, policy)
    if config.layout == "group":
        if reason is not None:  # known before weights are loaded
            raise refused(reason, policy)
        return config, None
    if reason is not None:
        logging.getLogger(__name__).warning("layout: auto is pairwise: %s", reason)
    return config.model_copy(update={"layout": "pairwise" if reason else "group"}), reason


def _why_pairwise(config: PreferenceConfig, policy: str) -> str | None:
    if config.attn_implementation is not None:
        return f"attn_implementation is {config.attn_implementation}, and group brings its own"
    other = reference_parts(config)
    # Policy and reference run the same packed rows.
    models = [(policy, config.revision)]
    models += [other[:2]] if other is not None else []
    reasons = (_why_not_group(name, revision, config) for name, revision in models)
    return next(filter(None, reasons), None)


def _why_not_group(name: str, revision: str | None, config: PreferenceConfig) -> str | None:
    """The refusal of a model without weights: what decides is its configuration and its code."""
    trust = config.trust_remote_code
    found = load_config(name, revision, trust)
    if found.model_type in _PAIRWISE_ONLY:
        return f"a model of type {found.model_type} cannot share prompts"
    try:
        # A model of any size fits: on this device weights have shapes and no memory.
        with torch.device("meta"):
            use_group_attention(auto_class(found).from_config(found, trust_remote_code=trust))
    except ConfigError as error:
        got = error.details["got"]
        return error.what.removeprefix("layout: ") + (f" ({got})" if got else "")
    return None
