"""Preference training of causal language models: pairs to groups, the reference, the trainer, the finished folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import digest_path
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import world_size
from prefmill.distributed.scoring import scoring_context, scoring_model
from prefmill.distributed.sharding import shares_weights, unsharded_loading
from prefmill.families.causal.chat import encode
from prefmill.families.causal.chat_rows import ChatRows
from prefmill.families.causal.group_layout import add_images, cut_responses, encode_groups, pack
from prefmill.families.causal.layout import choose_layout
from prefmill.families.causal.ld_dpo import DesensitizedFamily, per_token, reference_sums
from prefmill.families.causal.load_check import as_scorer, check_in_shards
from prefmill.families.causal.loading import LOADING, ORIGIN, load_model, load_tokenizer
from prefmill.families.causal.other_reference import check_reference, reference_parts
from prefmill.families.causal.router_loss import RoutedFamily, require_routing
from prefmill.families.causal.scorer import Batch, encode_pairwise, encode_sequences, score_batch
from prefmill.families.causal.start_checks import check_positions, check_start, check_tokens
from prefmill.families.causal.templates import recorded_day
from prefmill.families.causal.vision import ImageReader, with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.families.causal.vision_parts import KeptProcessor, freeze
from prefmill.training.adapter import add_adapter, put_on
from prefmill.training.bad_rows import BadRows, report_dropped
from prefmill.training.batches import GroupPart, Microbatch, one_by_one, plan_group_batches
from prefmill.training.config import TrainingConfig, accumulation
from prefmill.training.data import (
    Group,
    PreferencePair,
    group_by_prompt,
    no_images,
    read_pairs,
    swap_by_coin,
    tokenising,
)
from prefmill.training.family import Family, Reference, by_group
from prefmill.training.finished import kept_dtype, loading_precision
from prefmill.training.loop import TrainingSpec, run_training
from prefmill.training.objectives import Settings, mix
from prefmill.training.preference_config import PreferenceConfig
from prefmill.training.publish import Rescoring, pair_scorer, publish, shortest_pairs
from prefmill.training.reference import (
    GroupScoring,
    computed_as,
    kept_reference,
    reference_scores,
    start_weights,
    weights_of,
)
from prefmill.training.trainer import PreferenceData, Preferences, PreferenceTrainer, plan_epochs


def train_dpo(
    config: PreferenceConfig,
    task: Task,
    policy: str,
    train: Path,
    val: Path | None,
    rows: ChatRows = ChatRows(),  # noqa: B008
) -> Metrics:
    """Tune `policy` on the pairs in `train`, the reference being `policy` itself as it was before the first step.

    Or the checkpoint that `config.ref_name` names. Resumes from the newest complete checkpoint; the reference's scores
    come from their cache or from a checkpoint loaded afresh, never from the policy in training.
    """
    config, why_pairwise = choose_layout(config, policy)
    options = config.model_dump(include=ORIGIN)
    tokenizer = load_tokenizer(policy, template=rows, today=task.began_on, adapter=config.lora_start, **options)
    # From the configuration alone: refused before rows are tokenised and weights are loaded.
    check_start(policy, config)
    reader = open_reader(policy, tokenizer, rows, **options)
    groups = load_groups(train, tokenizer, config, task, shuffle=config.shuffle_labels, reader=reader)
    held_out = load_groups(val, tokenizer, config, task, reader=reader) if val is not None else []
    read = [*groups, *held_out]
    rows.tell_unread_without(any(group.images for group in read))
    used = [ids for group in read for ids in (group.prompt, *group.responses)]
    check_tokens(policy, tokenizer, used, config)
    check_positions(policy, (length for group in read for length in group.lengths), config)
    settings = Settings(config.beta, config.label_smoothing, config.simpo_gamma)
    objective = mix(config.loss_type, config.loss_weights, settings, Family.supplies)
    check_reference(config, objective, policy, tokenizer, used)
    rescoring = causal_rescoring(config, groups, tokenizer.pad_token_id, reader)
    processor = reader or KeptProcessor(tokenizer, policy, config.revision)
    spec = TrainingSpec(
        config=config,
        task=task,
        load=lambda: load_trained(policy, config, rows, any(group.images for group in groups)),
        data=Preferences(
            train=PreferenceData(groups, None, _plan(groups, config)),
            val=PreferenceData(held_out, None, _one_by_one(held_out, config)) if held_out else None,
            family=causal_family(config, tokenizer.pad_token_id, reader, rows.router_aux_loss_coef),
            objective=objective,
            settings=settings,
        ),
        processor=processor,
        check=lambda model: check_in_shards(model, config, policy),
        publish=lambda trainer: publish(trainer, processor, config, task, policy, rescoring),
        reference=partial(_reference, task, groups, held_out, tokenizer, config, reader)
        if objective.needs_reference
        else None,
        counts={
            "pairs": sum(len(group.pairs) for group in groups),
            "groups": len(groups),
            "layout": config.layout,
            "why_pairwise": why_pairwise,
            **recorded_day(tokenizer),
        },
    )
    return run_training(spec)


def load_groups(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    task: Task,
    shuffle: bool = False,
    reader: ImageReader | None = None,
) -> list[Group]:
    """The pairs in `path` as groups; those with a side over max_length are reported and dropped, or refused.

    Raises InputError for images that no `reader` is there for, and for a pair that the template cannot write.
    """
    pairs = (_placed(pair, reader) for pair in read_pairs(path))
    chosen = swap_by_coin(pairs, config.seed) if shuffle else pairs
    bad = BadRows.of(config, task)
    groups = group_by_prompt(tokenising(chosen, path), reader.encode if reader else partial(encode, tokenizer), bad)
    bad.tell(len(groups))
    dropped = [
        {"id": pair.pair_id, "file": path.parent.name, "num_tokens": group.tokens_of(pair)}
        for group in groups
        for pair in group.pairs
        if group.tokens_of(pair) > config.max_length
    ]
    # Pair by pair: the others of the same prompt stay.
    kept = [group for group in (group.up_to(config.max_length) for group in groups) if group.pairs]
    report_dropped(task, dropped, sum(len(group.pairs) for group in kept), config)
    if not kept:
        raise InputError("no pairs to train on", where=path, fix="lower the thresholds of build_datasets")
    return kept


def _placed(pair: PreferencePair, reader: ImageReader | None) -> PreferencePair:
    """`pair` with its images where their markers stand."""
    if pair.images and reader is None:
        raise no_images(f"pair {pair.pair_id}", pair.images[0])
    return replace(pair, messages=with_images(pair.messages, pair.images))


def load_trained(name: str, config: PreferenceConfig, parts: ChatRows, with_images: bool) -> Any:
    """The model to tune with its adapter, its frozen parts without gradient and without one."""
    model = load_policy(name, config, config.revision)
    if parts.router_aux_loss_coef:
        require_routing(model, name)
        model.counts_routing = True  # its scorer then keeps the balancing loss
    # Frozen first: an adapter is not put on modules that stay as they are.
    return add_adapter(model, config, freeze(model, parts, with_images))


def load_policy(name: str, config: PreferenceConfig, revision: str | None) -> Any:
    """The model to tune, as a scorer."""
    options = {**config.model_dump(include=LOADING), "revision": revision}
    model = load_model(name, precision=loading_precision(name, config, revision), **options)
    return as_scorer(model, config.layout, name, shares_weights(config))


def _plan(groups: Sequence[Group], config: PreferenceConfig) -> list[Microbatch]:
    """The microbatches of all epochs, as the layout cuts them."""
    epochs, target, ranks = config.num_train_epochs, config.effective_batch_size, world_size()
    if config.layout == "pairwise":
        return plan_epochs(groups, config, epochs)
    accumulation(config, ranks)  # for its error alone
    at_once, max_tokens = config.per_device_train_batch_size, config.max_tokens_per_microbatch
    return plan_group_batches(groups, epochs, target, at_once, ranks, max_tokens, config.seed)


def causal_family(
    config: PreferenceConfig, pad: int, reader: ImageReader | None = None, router_aux_loss_coef: float | None = None
) -> Family:
    """Log-likelihoods of responses, the same in every epoch."""

    def encode_parts(groups: Sequence[Group], parts: Sequence[GroupPart], epoch: int) -> Batch:
        if config.layout == "group":
            batch, shown = encode_groups(groups, parts), [groups[part.group] for part in parts]
        else:
            batch = encode_pairwise(groups, parts, pad)
            shown = [groups[part.group] for part in parts for _ in part.pairs for _side in range(2)]
        return add_images(batch, shown, reader) if reader else batch

    # Each is a family of its own, and none is both.
    if config.ld_alpha is not None and router_aux_loss_coef:
        raise ConfigError(
            "ld_alpha and router_aux_loss_coef do not go together",
            got=router_aux_loss_coef,
            fix="leave one of them out",
        )
    if config.ld_alpha is not None:
        return DesensitizedFamily(encode_parts, score_batch, config.ld_alpha)
    if router_aux_loss_coef:
        return RoutedFamily(encode_parts, score_batch, router_aux_loss_coef)
    return Family(encode_parts, score_batch)


def causal_rescoring(
    config: PreferenceConfig, groups: Sequence[Group], pad: int, reader: ImageReader | None
) -> Rescoring:
    """The shortest pairs' log-likelihoods; saved models are scored pairwise with plain attention in fp32."""
    # As whoever loads the folder computes: one row a response, the model's own attention, whole weights.
    fp32 = {"precision": "fp32", "attn_implementation": None, "layout": "pairwise", "quantization": None}
    plain = config.model_copy(update=fp32)
    parts = shortest_pairs(groups, lambda group, pair: group.tokens_of(pair))
    families = [causal_family(given, pad, reader) for given in (plain, config)]
    score, live = (pair_scorer(family, groups, parts) for family in families)
    return Rescoring(
        lambda name: load_policy(name, plain, config.revision), score, live, config.quantization is not None
    )


def _one_by_one(groups: Sequence[Group], config: PreferenceConfig) -> list[Microbatch]:
    """Every validation pair once, in microbatches of the training size."""
    at_once = config.per_device_train_batch_size
    if config.layout == "pairwise":
        return one_by_one(groups, at_once, config.seed)
    num_pairs = sum(len(group.pairs) for group in groups)
    return plan_group_batches(groups, 1, num_pairs, at_once, 1, config.max_tokens_per_microbatch, config.seed)


def _reference(
    task: Task,
    train: Sequence[Group],
    val: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    config: PreferenceConfig,
    reader: ImageReader | None,
    trainer: PreferenceTrainer,
    model: Any,
) -> tuple[Reference, Reference]:
    """The reference's scores of all responses, train and val; called while the policy still is as it starts."""
    at_once = [config.per_device_train_batch_size, config.max_tokens_per_microbatch]
    # Another packing or batch size adds in another order: scores are kept for each.
    settings = {**computed_as(config), "layout": config.layout, "at_once": at_once, "ld_alpha": config.ld_alpha}
    other, device = reference_parts(config), trainer.args.device
    scope = nullcontext(model) if other is None else _other_reference(*other, config, trainer)
    with scope as reference, scoring_context(trainer, config):
        weights = start_weights(task, config) if other is None else _weights(*other)
        kept = kept_reference(task, weights, settings, device)
        scoring = GroupScoring(
            content=lambda group: _content(group, config, reader),
            batches=lambda group: _response_batches(group, config, tokenizer.pad_token_id, reader),
            score=lambda batch: score_batch(reference, batch.to(device)),
            join=lambda group, scores: _joined(group, scores, config),
            in_step=shares_weights(config),
        )
        scores = reference_scores([*train, *val], scoring, kept, task, config.precision)
    return by_group(scores[: len(train)]), by_group(scores[len(train) :])


@contextmanager
def _other_reference(
    base: str, revision: str | None, adapter: Path | None, config: PreferenceConfig, trainer: PreferenceTrainer
) -> Iterator[Any]:
    """Another checkpoint than the policy, as training would hold it."""
    # transformers' sharded loading would come before the adapter is put on; `scoring_model` shares both together.
    with unsharded_loading():
        model = load_policy(base, config, revision)
    if adapter is not None:
        model = put_on(model, adapter)  # not merged: in bf16 that would round it away
    with scoring_model(model, trainer, config, kept_dtype(config)) as reference:
        check_in_shards(reference, config, base)
        yield reference


def _weights(base: str, revision: str | None, adapter: Path | None) -> str:
    return "+".join([weights_of(base, revision), *([digest_path(adapter)] if adapter else [])])


def _content(group: Group, config: PreferenceConfig, reader: ImageReader | None) -> list[Any]:
    """All that a group's scores depend on but the model and the settings."""
    # With LD-DPO alone the score of a response depends on its rival.
    pairs = [(pair.chosen, pair.rejected) for pair in group.pairs] if config.ld_alpha is not None else None
    return [group.prompt, group.responses, reader.digest([group.images]) if reader else None, pairs]


def _joined(group: Group, scores: Sequence[Tensor], config: PreferenceConfig) -> Tensor:
    """A group's scores from those of its batches; with ld_alpha a side's sum depends on the other one."""
    if config.ld_alpha is None:
        return torch.cat(list(scores))
    return reference_sums(torch.cat(list(scores)), list(map(len, group.responses)), group.pairs, config.ld_alpha)


def _response_batches(
    group: Group, config: PreferenceConfig, pad: int, reader: ImageReader | None = None
) -> list[Batch]:
    """All responses of a group in batches of the training layout and size."""
    if config.layout == "group":
        batches = [pack([cut]) for cut in cut_responses(group, config.max_tokens_per_microbatch)]
        shown = [[group]] * len(batches)
    else:
        # A pair is two rows in training: as many here need no more memory.
        at_once = 2 * config.per_device_train_batch_size
        sequences = [(group.prompt, response) for response in group.responses]
        batches = [encode_sequences(sequences[n : n + at_once], pad) for n in range(0, len(sequences), at_once)]
        shown = [[group] * len(batch.lengths) for batch in batches]
    if reader:
        batches = [add_images(batch, groups, reader) for batch, groups in zip(batches, shown, strict=True)]
    return batches if config.ld_alpha is None else list(map(per_token, batches))
