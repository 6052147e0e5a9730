"""Supervised fine-tuning with TRL's SFTTrainer, on completions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from prefmill.core.errors import ConfigError
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import world_size
from prefmill.distributed.sharding import fsdp_mixed_precision
from prefmill.families.causal.chat import encode_turns
from prefmill.families.causal.chat_rows import TrainedTurns
from prefmill.families.causal.load_check import agrees_with_fused_head, check_rows, own_likelihoods, rounding
from prefmill.families.causal.loading import LOADING, ORIGIN, load_model, load_tokenizer
from prefmill.families.causal.router_loss import require_routing
from prefmill.families.causal.start_checks import check_positions, check_start, check_tokens
from prefmill.families.causal.templates import recorded_day
from prefmill.families.causal.vision import ImageReader, with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.families.causal.vision_parts import KeptProcessor, freeze
from prefmill.training.adapter import add_adapter
from prefmill.training.arguments import made, trainer_arguments
from prefmill.training.callbacks import check_every_step
from prefmill.training.config import TrainingConfig, weights_precision
from prefmill.training.data import encoded_chats
from prefmill.training.loop import TrainingSpec, run_training
from prefmill.training.publish import NUM_SAMPLES, Rescoring, publish

_IGNORED = -100  # a label that takes no part in the loss


def train_sft(
    config: TrainingConfig,
    task: Task,
    model_name: str,
    train: Path,
    val: Path | None,
    turns: TrainedTurns = TrainedTurns(),  # noqa: B008
) -> Metrics:
    """Fine-tune `model_name` on the chats in `train`, resuming where an earlier attempt stopped.

    The loss is that of the tokens of the turns that `turns` says, averaged over an optimizer step. Raises ConfigError
    for over-long rows unless they are to be dropped.
    """
    options = config.model_dump(include=ORIGIN)
    tokenizer = load_tokenizer(model_name, template=turns, today=task.began_on, adapter=config.lora_start, **options)
    check_start(model_name, config)
    reader = open_reader(model_name, tokenizer, turns, **options)
    parts = [load_chats(path, tokenizer, config, task, turns, reader) for path in (train, val) if path is not None]
    chats = Chats(
        train=parts[0],
        val=None if val is None else parts[1],
        tokenizer=tokenizer,
        collate=partial(collate_images, reader=reader, beside=_shown_beside(parts)) if reader else None,
        router_aux_loss_coef=turns.router_aux_loss_coef,
    )
    turns.tell_unread_without(reader is not None and any(any(part["image_paths"]) for part in parts))
    check_tokens(model_name, tokenizer, (ids for part in parts for ids in part["input_ids"]), config)
    check_positions(model_name, (len(ids) for part in parts for ids in part["input_ids"]), config)
    rescoring = sft_rescoring(config, chats.train, chats.collate)
    processor = reader or KeptProcessor(tokenizer, model_name, config.revision)
    spec = TrainingSpec(
        config=config,
        task=task,
        load=lambda: _load_trained(model_name, config, turns, any(chats.train["image_paths"]) if reader else False),
        data=chats,
        processor=processor,
        check=lambda model: _check_losses(model, config, model_name, turns.router_aux_loss_coef),
        publish=lambda trainer: publish(trainer, processor, config, task, model_name, rescoring),
        counts={"train_rows": len(chats.train), **recorded_day(tokenizer)},
        logged={"val_loss": "eval_loss"},
    )
    return run_training(spec)


@dataclass(frozen=True)
class Chats:
    """Rows of `input_ids` and `labels`, which TRL's trainer fine-tunes on; `collate` where they have images."""

    train: Dataset
    val: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] | None
    router_aux_loss_coef: float | None = None

    def trainer(self, model: Any, config: TrainingConfig, task: Task, callbacks: list[TrainerCallback]) -> SFTTrainer:
        """TRL's trainer of `model`; raises ConfigError for an adapter that TRL's loss reads past."""
        if not isinstance(model.get_output_embeddings(), (nn.Linear, ModulesToSaveWrapper)):
            raise ConfigError(
                "sft computes its loss from the head's own weights, without the adapter on them", where="lora",
                got=type(model.get_output_embeddings()).__name__, expected="a head that is left alone, or saved whole",
                fix="leave lora.target_modules out: all-linear spares the head; or start from one that holds it whole",
            )  # fmt: skip
        given = trainer_arguments(config, task, world_size()) | {
            # TRL's default is to cut rows at 1,024 tokens; over-long ones are dropped or refused before.
            "max_length": None,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            # Rows are token ids with labels: nothing is left to template, tokenise or cut.
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "eval_strategy": "epoch" if self.val is not None else "no",
            # The Trainer averages over batches: of several rows the loss would hang on which stand together.
            "per_device_eval_batch_size": 1,
        }
        trainer = _EachRowOnce(
            model=model,
            args=fsdp_mixed_precision(made(TrlConfig, given), config),
            train_dataset=self.train,
            eval_dataset=self.val,
            processing_class=self.tokenizer,
            data_collator=self.collate,
            callbacks=callbacks,
        )
        # Qwen2.5-VL says that it takes no count of tokens, but it is TRL that divides by it: the mean is over the step.
        trainer.model_accepts_loss_kwargs = True
        trainer.train_dataset = _Repeatable(self.train)
        check_every_step(trainer)
        return trainer


class _EachRowOnce(SFTTrainer):
    """TRL's trainer on rows that ranks learn once an epoch: accelerate fills their last batches with the first rows.

    A model that `uses_own_loss` is given by its own forward what TRL would compute of its last layer and its head.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The mean over the step's tokens; TRL's own figures of them, as their entropy, only with its own loss."""
        compute = Trainer.compute_loss if self.model.uses_own_loss else SFTTrainer.compute_loss
        return compute(self, model, {**inputs, "use_cache": False}, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The rows in their order, and after them some without labels, up to what ranks run beside each other."""
        loader: Any = super().get_train_dataloader()
        if self.args.world_size > 1:
            loader.set_sampler(_Filled(loader.get_sampler(), self.args.train_batch_size * self.args.world_size))
        return loader


class _Filled(Sampler[int]):
    """The places that `sampler` gives, and others after the last row up to a multiple of `size`."""

    def __init__(self, sampler: Any, size: int) -> None:
        self._sampler, self._size = sampler, size
        self.set_epoch = sampler.set_epoch

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._size) * self._size

    def __iter__(self) -> Iterator[int]:
        yield from self._sampler
        yield from range(len(self._sampler), len(self))


@dataclass(frozen=True)
class _Repeatable(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows, and after the last one the same again without labels: nothing is learnt from those."""

    rows: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[place % len(self.rows)]
        return row if place < len(self.rows) else _unlearnt(row)


def _load_trained(name: str, config: TrainingConfig, parts: TrainedTurns, with_images: bool) -> Any:
    model = load_model(name, precision=weights_precision(config), **config.model_dump(include=LOADING))
    if parts.router_aux_loss_coef:
        require_routing(model, name)
    return add_adapter(model, config, freeze(model, parts, with_images))


def _check_losses(model: Any, config: TrainingConfig, name: str, balancing: float | None) -> None:
    """See by which forward `model` learns its own loss; raises InputError where neither has it of padded rows.

    ConfigError for `balancing` of a model that learns by its own forward.
    """
    own, computed = own_likelihoods(model), rounding(model, config)
    if config.per_device_train_batch_size > 1:
        check_rows(model, name, own, computed)
    model.uses_own_loss = not agrees_with_fused_head(model, own, computed)
    if model.uses_own_loss and balancing:
        raise ConfigError(
            "the weight of the experts' balancing loss cannot be set here", where=name,
            got=f"router_aux_loss_coef={balancing}", expected="the model's own loss, which its configuration settles",
            fix="leave router_aux_loss_coef out",
        )  # fmt: skip


def sft_rescoring(config: TrainingConfig, rows: Dataset, collate: Any) -> Rescoring:
    """The shortest rows' log-likelihoods of their completions, by the model's own loss."""
    lengths = [len(row) for row in rows["input_ids"]]
    shortest = sorted(range(len(lengths)), key=lambda place: lengths[place])[:NUM_SAMPLES]

    def score(model: Any, device: torch.device) -> Tensor:
        return torch.stack([_row_score(model, rows[place], collate, device) for place in shortest]).cpu()

    def load(name: str) -> Any:
        # As whoever loads the finished folder: whole weights, no attention asked for.
        return load_model(name, precision="fp32", **config.model_dump(include=ORIGIN))

    return Rescoring(load, score, score, config.quantization is not None)


def _row_score(model: Any, row: Mapping[str, Any], collate: Any, device: torch.device) -> Tensor:
    """log p of a row's completion, a float64 scalar."""
    plain = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
    batch = collate([row]) if collate else {**plain, "attention_mask": torch.ones_like(plain["input_ids"])}
    count = int((batch["labels"] != _IGNORED).sum())
    loss: Tensor = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss
    # The loss is a mean over the tokens that are trained.
    return -loss.double() * count


def load_chats(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    task: Task,
    turns: TrainedTurns,
    reader: ImageReader | None = None,
) -> Dataset:
    """The rows of an SFT dataset as `input_ids` and `labels`, what is not trained ignored; over-long rows reported.

    With a `reader` rows also have the paths of their images; without one raises InputError for a row with images.
    """

    def encode(row: Mapping[str, Any], images: Sequence[str]) -> tuple[dict[str, Any], int]:
        encoded = _encode_row(row, tokenizer, turns, reader, images)
        return encoded, len(encoded["input_ids"])

    return Dataset.from_list(encoded_chats(path, encode, config, task, reader is not None))


def _shown_beside(parts: Sequence[Dataset]) -> Mapping[str, Any] | None:
    """The shortest row with an image, of which nothing is learnt, for batches of other ranks that have no image.

    A rank that does not run the vision part would leave the others, which share it or its gradients, waiting for it.
    """
    if world_size() == 1:
        return None
    shown = (row for part in parts for row in part if row["image_paths"])
    shortest = min(shown, key=lambda row: len(row["input_ids"]), default=None)
    return shortest and _unlearnt(shortest)


def _unlearnt(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [_IGNORED] * len(row["labels"])}


def collate_images(
    rows: Sequence[Mapping[str, Any]], reader: ImageReader, beside: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Rows padded on the right, [R, T], with the pixels of their images; transformers places the images itself.

    Where none has an image the row `beside` them follows.
    """
    if beside is not None and not any(row["image_paths"] for row in rows):
        rows = [*rows, beside]
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": int(reader.tokenizer.pad_token_id or 0), "labels": _IGNORED, "attention_mask": 0}
    filled = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    batch = {
        key: torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in filled])
        for key, value in padding.items()
    }
    paths = [path for row in rows for path in row["image_paths"]]
    return batch | reader.inputs(paths, batch["input_ids"])


def _encode_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    turns: TrainedTurns,
    reader: ImageReader | None,
    images: Sequence[str],
) -> dict[str, Any]:
    messages, tools = row["messages"], row.get("tools", ())
    places = turns.places(messages)
    if reader is None:
        ids, trained = encode_turns(tokenizer, messages, places, tools)
    else:
        shown = [*with_images(messages[:-1], images), messages[-1]]  # an answer may name the marker
        ids, trained = reader.encode_turns(shown, places, tools)
    labels = [token if learnt else _IGNORED for token, learnt in zip(ids, trained, strict=True)]
    encoded = {"input_ids": ids, "labels": labels}
    return encoded if reader is None else {**encoded, "image_paths": list(images)}
