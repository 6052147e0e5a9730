"""A reference that is another checkpoint than the policy starts from: which one, and whether it can be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.loading import load_config, load_tokenizer
from prefmill.families.causal.quantized import require_trainable
from prefmill.families.causal.whole import require_embedded
from prefmill.training.adapter_folder import read_adapter, whole_model
from prefmill.training.objectives import Objective
from prefmill.training.preference_config import PreferenceConfig


def reference_parts(config: PreferenceConfig) -> tuple[str, str | None, Path | None] | None:
    """Another reference's whole model, its revision and the adapter on it if it is one; None: the policy's start."""
    name = str(config.ref_folder) if config.ref_folder is not None else config.ref_name
    try:
        return None if name is None else whole_model(name, config.ref_revision)
    except ValueError as error:
        raise ConfigError("the reference cannot be loaded", where=name, got=error, fix="merge the adapter") from None


def check_reference(
    config: PreferenceConfig,
    objective: Objective,
    policy: str,
    tokenizer: PreTrainedTokenizerBase,
    used: Sequence[Sequence[int]],
) -> None:
    """Refuse a reference that does not read the policy's tokens, those `used` at least, or that no objective would ask.

    Its size and shape are its own. Raises ConfigError and InputError.
    """
    parts = reference_parts(config)
    if parts is None:
        return
    (name, revision, adapter), trust = parts, config.trust_remote_code
    if adapter is not None and config.layout == "group" and read_adapter(adapter).get("alora_invocation_tokens"):
        raise ConfigError(
            "the reference's adapter begins at tokens that it looks for (aLoRA): a group has several answers in a row",
            where=adapter, got="layout group", expected="one answer a row", fix="set layout=pairwise",
        )  # fmt: skip
    if not objective.needs_reference:
        raise ConfigError(
            "ref_name is given, but no objective here has a reference", got=", ".join(config.loss_type),
            fix="leave ref_name out, or add an objective with a reference, such as sigmoid",
        )  # fmt: skip
    # Its template never writes a prompt: any day will do for one that reads the clock.
    other = load_tokenizer(name, revision=revision, trust_remote_code=trust, today=date.today())
    _same_vocabulary(name, tokenizer.get_vocab(), other.get_vocab())
    mine = load_config(policy, config.revision, trust)
    theirs = load_config(name, revision, trust)
    require_trainable(name, theirs, config.quantization)
    # Embeddings are often padded beyond the vocabulary: more are fine, fewer would fail in the midst of scoring.
    size = theirs.get_text_config().vocab_size
    require_embedded([*used, [tokenizer.pad_token_id]], tokenizer, size, name, "the reference")
    # Patches and positions come from the policy's reader, and mean something else to another family.
    if hasattr(mine, "vision_config") and theirs.model_type != mine.model_type:
        raise InputError(
            "the reference does not see images as the policy does", where=name, got=theirs.model_type,
            expected=mine.model_type, fix="name a checkpoint of the policy's family in ref_name",
        )  # fmt: skip


def _same_vocabulary(name: str, mine: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    """Raises InputError naming a token that is not the same number in both."""
    other = sorted((item for item in mine.items() if theirs.get(item[0]) != item[1]), key=lambda item: item[1])
    if other:
        token, number = other[0]
        raise InputError(
            "the reference reads other tokens than the policy", where=name,
            got=f"{len(other)} tokens differ, such as {token!r}: {theirs.get(token)}", expected=number,
            fix="name a checkpoint with the policy's tokenizer in ref_name",
        )  # fmt: skip
