"""TRL's DPOTrainer, running a prompt once for all of its answers in a batch.

    from prefmill.integrations.group_dpo_trainer import GroupDPOTrainer as DPOTrainer

is all that a script changes. Arguments, losses, metrics and checkpoints are TRL's; only the model's pass over a batch,
and which pairs stand in a batch together, are not.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from transformers.modeling_outputs import MoeModelOutputWithPast
from trl import DPOTrainer

from prefmill.core.errors import ConfigError, InputError
from prefmill.distributed.scoring import inner_model
from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.group_layout import pack
from prefmill.families.causal.scorer import restore_own_forward

# What TRL's fused head gives for each token: its losses and metrics are made of these, and look for them by row.
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_MARK = "_prefmill_shares_prompts"


class GroupDPOTrainer(DPOTrainer):
    """A DPOTrainer whose losses and gradients equal TRL's, from fewer tokens where pairs share prompts.

    Pairs of one prompt are drawn into the same batch where it has room (`train_sampling_strategy="sequential"` keeps
    the dataset's order). Between steps the model is as TRL's trainer has it. Raises ConfigError for images (the stage
    `dpo` takes them), for prompt and prefix tuning, and for models whose layers are not known to share prompts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with self._sharing():
            pass  # refuses here, not at the first step

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        """Have policy and reference share prompts within."""
        self._require_shareable()
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(sharing_prompts(model))
            yield

    def _require_shareable(self) -> None:
        if self._is_vision_dataset:
            raise ConfigError("GroupDPOTrainer trains on text", got="images", fix="use prefmill's stage dpo")
        peft = getattr(self.accelerator.unwrap_model(self.model), "active_peft_config", None)
        if peft is not None and peft.is_prompt_learning:
            raise ConfigError(
                "GroupDPOTrainer does not train prompts or prefixes", got=str(peft.peft_type.value),
                expected="LoRA or another adapter in the layers, or the whole model",
                fix="use TRL's DPOTrainer: virtual tokens stand before each row, where rows share nothing",
            )  # fmt: skip

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        with self._sharing():
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's step; its backward pass is within, as checkpointed layers run again there."""
        with self._sharing():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, of steps and of evaluation."""
        with self._sharing():
            return super().compute_loss(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # transformers ends such a training at step 0, and whoever goes on saves an untrained model.
        if hasattr(dataset, "__len__") and not len(dataset):
            raise InputError(
                "no rows to train on", got="none that TRL has left", expected="answers within max_length tokens",
                fix="raise max_length; of rows whose prompt alone fills it nothing is trained",
            )  # fmt: skip
        if not hasattr(dataset, "__len__") or self.args.train_sampling_strategy != "random":
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Numbers hash alike in every process, unlike text: all ranks must draw one order.
        return PromptSampler([hash(tuple(ids)) for ids in dataset["prompt_ids"]], self._train_batch_size, seed)


class PromptSampler(Sampler[int]):
    """All rows in random order, with the rows of one prompt in one batch where a batch holds them.

    `prompts` has one key a row. The order follows from the seed and the epoch alone.
    """

    def __init__(self, prompts: Sequence[int], batch_size: int, seed: int) -> None:
        self.prompts, self.batch_size, self.seed, self.epoch = list(prompts), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[int]:
        return (row for batch in self._batches() for row in batch)

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be that of `epoch`; accelerate calls this."""
        self.epoch = epoch

    def _batches(self) -> Iterator[list[int]]:
        """Batches that begin with the next group and go on with the largest that fits; if none fits, one is split."""
        waiting = self._groups()
        by_size: dict[int, deque[int]] = {}
        for place, group in waiting.items():
            by_size.setdefault(len(group), deque()).append(place)
        batch: list[int] = []
        while waiting:
            room = self.batch_size - len(batch)
            place = next(iter(waiting))
            for size in range(room if batch else 0, 0, -1):
                queue = by_size.get(size, deque())
                while queue and len(waiting.get(queue[0], ())) != size:
                    queue.popleft()  # taken or cut since
                if queue:
                    place = queue[0]
                    break
            group = waiting[place]
            batch += group[:room]
            waiting[place] = group[room:]
            if not waiting[place]:
                del waiting[place]
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _groups(self) -> dict[int, list[int]]:
        """The rows of each prompt in shuffled order, by a number."""
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}:{self.epoch}").shuffle(order)
        groups: dict[int, list[int]] = {}
        for row in order:
            groups.setdefault(self.prompts[row], []).append(row)
        return dict(enumerate(groups.values()))


@contextmanager
def sharing_prompts(model: Any) -> Iterator[None]:
    """Within, TRL's fused forward of `model` runs each distinct prompt, and each distinct answer to it, once.

    Other calls, such as generation, run as they did, with the attention that the model came with.
    """
    base = inner_model(model)
    if getattr(base, _MARK, False):  # a loss within a step
        yield
        return
    own_attention, own_forward = base.config._attn_implementation, base.forward
    before = [(module, module.__dict__.get("forward")) for module in (base, base.base_model)]
    use_group_attention(base)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            return _shared(own_forward, *args, **kwargs)
        shared_attention = self.config._attn_implementation
        self.set_attn_implementation(own_attention)
        try:
            return own_forward(*args, **kwargs)
        finally:
            self.set_attn_implementation(shared_attention)

    # `generate` checks its arguments against the signature that TRL keeps on its own forward.
    forward.__signature__ = getattr(own_forward, "__signature__", None)  # type: ignore[attr-defined]
    base.base_model.forward = MethodType(_pick_rows(base.base_model.forward), base.base_model)
    base.forward = MethodType(forward, base)
    setattr(base, _MARK, True)
    try:
        yield
    finally:
        delattr(base, _MARK)
        for module, found in before:
            # What stood on the class is found there again: a copy of the model must not run this one's.
            restore_own_forward(module, found)
        base.set_attn_implementation(own_attention)


def _shared(
    forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any
) -> Any:
    """TRL's output for rows [N, T] and labels [N, T] (-100 for what is not scored), from their packed form."""
    packed, cells, of_rows = pack_rows(input_ids, attention_mask, labels)
    device = input_ids.device
    output = forward(
        input_ids=packed.input_ids.to(device),
        # TRL counts experts' loads by it: by None over all tokens that they are given (see `picked`).
        attention_mask=None,
        position_ids=None if packed.position_ids is None else packed.position_ids.to(device),
        segments=packed.segments,
        varlen=packed.varlen and packed.varlen.to(device),
        predicts=packed.column.to(device),
        of_rows=of_rows.to(device),
        shift_labels=packed.target[None].to(device),
        fused_lm_head=True,
        **kwargs,
    )
    row, column, source = (part.to(device) for part in cells)
    for name in _PER_TOKEN:
        values = getattr(output, name)
        if values is not None:
            # The packed batch has each answer once: autograd adds up what all rows that have it send back.
            spread = values.new_zeros(input_ids.shape[0], input_ids.shape[1] - 1)
            setattr(output, name, spread.index_put((row, column), values[0].index_select(0, source)))
    return output


def pack_rows(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Any, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Rows of prompt and answer as one packed batch, and where their tokens stand in it.

    The second part is (row, column, source), [M] each: the label after `column` of `row` is the packed batch's
    completion token `source`. The third is the place of every token of every row, [tokens].
    """
    ids, masks, scored = input_ids.tolist(), attention_mask.bool().tolist(), (labels != -100).tolist()
    groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    placed: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for tokens, mask, wanted in zip(ids, masks, scored, strict=True):
        # A packed answer needs a token before it that predicts its first: without a prompt, the row's own first token.
        length, first = sum(mask), max(1, wanted.index(True) if True in wanted else 0)
        assert all(mask[:length]), "TRL pads on the right"
        prompt, answer = tuple(tokens[:first]), tuple(tokens[first:length])
        groups.setdefault(prompt, {}).setdefault(answer, 0)
        placed.append((first, prompt, answer))
    start = 0
    for answers in groups.values():
        for answer in answers:
            answers[answer] = start
            start += len(answer)
    cells = [
        (row, first - 1 + offset, groups[prompt][answer] + offset)
        for row, (first, prompt, answer) in enumerate(placed)
        for offset in range(len(answer))
        if scored[row][first + offset]
    ]
    packed = pack([(list(prompt), [list(answer) for answer in answers]) for prompt, answers in groups.items()])
    row, column, source = torch.tensor(cells, dtype=torch.long).reshape(-1, 3).T.contiguous()
    spans = {
        (prompt, answer): (segment.prompt, span)
        for (prompt, answers), segment in zip(groups.items(), packed.segments or (), strict=True)
        for answer, span in zip(answers, segment.responses, strict=True)
    }
    of_rows = [place for _, prompt, answer in placed for span in spans[prompt, answer] for place in range(*span)]
    return packed, (row, column, source), torch.tensor(of_rows)


def _pick_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A backbone's forward that returns the hidden states which predict something, [1, C, H], when told which.

    Routers' logits are those of all rows: a prompt counts as often as it stands in a row.
    """

    def picked(
        self: Any, *args: Any, predicts: Tensor | None = None, of_rows: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if predicts is None or of_rows is None:
            return forward(*args, **kwargs)
        # Without a mask transformers would take positions that begin anew for rows of their own.
        output = forward(*args, **{**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])})
        routed = getattr(output, "router_logits", None)
        # `embedding`, as a CPU's threads add gradients of indexed states in another order every time.
        return MoeModelOutputWithPast(
            # The head would otherwise be run over the prompt too, which is most of the tokens.
            last_hidden_state=F.embedding(predicts, output.last_hidden_state[0])[None],
            router_logits=routed and tuple(F.embedding(of_rows, logits) for logits in routed),
        )

    return picked
