"""Publishing: the folder that a training leaves, scored again on a few samples: what was saved is what was trained."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmill.core.config import StrictConfig, identity
from prefmill.core.errors import PipelineError
from prefmill.core.files import write_atomic
from prefmill.core.precision import Precision, torch_dtype
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.scoring import scoring_context
from prefmill.distributed.sharding import is_sharded, unsharded_loading, whole_weights
from prefmill.training.adapter import ADAPTER, add_adapter, base_name, merge_adapter, save_adapter
from prefmill.training.batches import AnyGroup, GroupPart
from prefmill.training.config import TrainingConfig
from prefmill.training.family import Family
from prefmill.training.finished import mend_generation_config, rounded, stored_precision, take_trained

# Few, as after a sharded training one rank scores them alone, in fp32 on its CPU.
NUM_SAMPLES = 8
# How far the saved folder may be from the trained model, as a share of what training changed: docs/decisions/0107.
LOST_SHARE: dict[Precision, float] = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.1}
# How far the model in training may be from the same weights in fp32, as a share of the scores themselves.
COMPUTED: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
_ROUNDING = 1e-5  # of fp32 sums, as a share of the scores


@dataclass(frozen=True)
class Rescoring:
    """Scores, [S] float64 in nats, of the same few training samples under any model of a family.

    `load` gives a folder's whole model in fp32 as `score` runs it; `live` scores the model in training. `quantized`:
    the model in training computes with a rounded base that the finished one does not have.
    """

    load: Callable[[str], Any]
    score: Callable[[Any, torch.device], Tensor]
    live: Callable[[Any, torch.device], Tensor]
    quantized: bool = False


@dataclass(frozen=True)
class Scores:
    """The samples' scores, [S] each: of the start, of the trained weights in fp32, and of the saved folder."""

    start: Tensor
    trained: Tensor
    saved: Tensor

    @property
    def difference(self) -> float:
        """The largest difference of a sample's score that saving made, in nats."""
        return float((self.saved - self.trained).abs().max())

    @property
    def lost_share(self) -> float:
        """|saved - trained| / |trained - start|: 0: all of the training was saved, 1: maybe nothing of it."""
        effect = float((self.trained - self.start).norm())
        lost = float((self.saved - self.trained).norm())
        return lost / effect if effect else float(lost > 0)

    def faithful(self, precision: Precision) -> bool:
        """Whether saving in this precision kept what training changed; False where a score is not a number."""
        effect, size = (float(value.norm()) for value in (self.trained - self.start, self.trained))
        # The second term lets a training pass that changed next to nothing, where rounding of sums is all there is.
        return float((self.saved - self.trained).norm()) <= LOST_SHARE[precision] * effect + _ROUNDING * size


def check_live(live: Tensor, trained: Tensor, precision: Precision) -> None:
    """Raises PipelineError where the model in training, [S], was not these weights: one was lost on the way."""
    # `not <=` in place of `>`: NaN compares false with everything, and has to be refused.
    if not float((live - trained).norm()) <= COMPUTED[precision] * float(trained.norm()):
        raise PipelineError(
            "the weights to publish are not those of the model in training",
            got=f"scores that differ by up to {float((live - trained).abs().max()):.3g} nats",
            expected=f"at most {COMPUTED[precision]:.1%} of {float(trained.norm()):.3g}",
            fix="lower learning_rate if the loss grew; else this is a bug: report it, the last checkpoint is kept",
        )  # fmt: skip


def shortest_pairs(groups: Sequence[AnyGroup], size: Callable[[Any, Any], int]) -> list[GroupPart]:
    """The few pairs that are cheapest to score, `size` being a group's and a pair's."""
    sizes = [
        (size(group, pair), place, index)
        for place, group in enumerate(groups)
        for index, pair in enumerate(group.pairs)
    ]
    return [GroupPart(place, (index,)) for _, place, index in sorted(sizes)[:NUM_SAMPLES]]


def pair_scorer(
    family: Family, groups: Sequence[AnyGroup], parts: Sequence[GroupPart]
) -> Callable[[Any, torch.device], Tensor]:
    """What scores both sides of the parts' pairs, [S], one part after the other."""

    def score(model: Any, device: torch.device) -> Tensor:
        sides = []
        for part in parts:
            batch = family.encode(groups, [part], 0).to(device)
            scores = family.score(model, batch).double()
            # Masked diffusion has a value for every draw, other families one a sample.
            scores = scores.reshape(len(scores), -1).mean(1)
            sides += [scores[batch.chosen], scores[batch.rejected]]
        return torch.cat(sides).cpu()

    return score


_log = logging.getLogger(__name__)


def publish(
    trainer: Any, processor: Any, config: TrainingConfig, task: Task, start: str, rescoring: Rescoring
) -> Metrics:
    """Write the finished folder of a training that began at `start`, and score it again; every rank calls.

    Returns what saving changed, on rank 0. Raises PipelineError when it changed more than the precision explains, and
    for weights that are not numbers: see docs/decisions/0107.
    """
    model, device = trainer.model.eval(), trainer.args.device
    with torch.no_grad(), scoring_context(trainer, config):
        # Before anything is gathered or merged: a weight that is lost on the way then shows as a difference.
        live = rescoring.live(model, device)
    sharded = any(map(is_sharded, model.parameters()))
    first = trainer.is_world_process_zero()
    weights = whole_weights(model, keep=first, trained=True)  # every rank has a part
    metrics: Metrics = {}
    if first:
        with torch.no_grad(), unsharded_loading():
            place = torch.device("cpu") if sharded else device  # one rank alone may not have room for all of it
            metrics = _publish_whole(weights, live, processor, config, task, start, rescoring, place)
    # A rank that ended while rank 0 still scores would take the process group with it.
    trainer.accelerator.wait_for_everyone()
    return metrics


def save_finished(model: Any, processor: Any, folder: Path, config: TrainingConfig, task: Task) -> None:
    """Write a model that has no start to be compared with, as it is unless `save_dtype` says otherwise."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True  # the Trainer has it off while it trains
    precision: Precision = "fp32" if config.save_dtype == "auto" else config.save_dtype
    write_folder(model, processor, folder, precision, model_card(task, config))


def write_folder(model: Any, processor: Any, folder: Path, precision: Precision, card: str) -> None:
    """A plain Hugging Face folder: weights in safetensors, rounded once, tokenizer or processor, and the card."""
    model.config._name_or_path = ""  # a path of this machine is no part of the content
    mend_generation_config(model)
    # An attempt in another precision may have left more shards than this one writes.
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    with rounded(model, torch_dtype(precision)):
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_atomic(folder / "README.md", card)


def _publish_whole(
    weights: Any, live: Any, processor: Any, config: TrainingConfig, task: Task, start: str, rescoring: Rescoring,
    device: torch.device,
) -> Metrics:  # fmt: skip
    model = rescoring.load(start).to(device).eval()
    before = rescoring.score(model, device)
    model = add_adapter(model, config).to(device).eval()
    take_trained(model, weights)
    trained = rescoring.score(model, device)
    # What 4 bits had changed in the base is not in the finished folder: there is nothing to agree with.
    if not rescoring.quantized:
        check_live(live, trained, config.precision)
    if config.lora is not None:
        # Before merging, which takes the adapter out of the model.
        save_adapter(model, base_name(start, config.revision, task), config.revision, task.output / ADAPTER)
    model = merge_adapter(model).cpu()
    for precision in precisions(config, lambda: stored_precision(start, config.revision)):
        write_folder(model, processor, task.output, precision, model_card(task, config))
        saved = rescoring.score(rescoring.load(str(task.output)).to(device).eval(), device)
        scores = Scores(before, trained, saved)
        told = f"{scores.lost_share:.0%} of the training, up to {scores.difference:.3g} nats a sample"
        if scores.faithful(precision) or accepted_with_losses(told, bool(saved.isfinite().all()), precision, config):
            break
    return {"saved_dtype": precision, "saved_difference": scores.difference, "saved_lost_share": scores.lost_share}


def precisions(config: TrainingConfig, stored: Callable[[], Precision]) -> list[Precision]:
    """Those to save in, the first that does not lose the training: the one asked for, or the base's `stored` and fp32.

    The base's own halves the files, but at small learning rates rounds most of the training away.
    """
    return list(dict.fromkeys((stored(), "fp32"))) if config.save_dtype == "auto" else [config.save_dtype]


def accepted_with_losses(told: str, finite: bool, precision: Precision, config: TrainingConfig) -> bool:
    """Whether what lost as much as `told` counts; raises PipelineError where no other precision would be nearer."""
    if precision == "fp32" or (config.save_dtype != "auto" and not finite):
        raise PipelineError(
            "the saved folder is not the trained model", got=f"saving in {precision} lost {told}",
            expected=f"at most {LOST_SHARE[precision]:.0%}",
            fix="set save_dtype=fp32; if it is, this is a bug: report it, the last checkpoint is kept",
        )  # fmt: skip
    asked = config.save_dtype != "auto"
    _log.warning("rounding to %s loses %s: %s", precision, told, "saved so, as asked" if asked else "saved in fp32")
    return asked


def model_card(task: Task, config: StrictConfig) -> str:
    """A model card with what the checkpoint was made from; the same content gives the same card."""
    inputs = [
        f"- {name}: `{item.manifest.kind}` of stage {item.manifest.stage}, content `{item.manifest.content_digest}`"
        for name, items in task.inputs.items()
        for item in items
    ]
    made_from = "\n".join(inputs or ["- nothing of this pipeline"])
    # Keys that change no result (`runtime`) would give one model several cards, as would where a folder lies here.
    known = {key: _without_place(value) for key, value in identity(config).items()}
    settings = json.dumps(known, indent=1, sort_keys=True)
    return (
        f"---\nlibrary_name: transformers\ntags: [prefmill, {task.stage}]\n---\n"
        f"# {task.stage}\n\nMade by prefmill's stage `{task.stage}`.\n\n"
        f"## Made from\n\n{made_from}\n\n## Configuration\n\n```json\n{settings}\n```\n"
    )


def _without_place(value: Any) -> Any:
    """A folder of this machine, as a model or a reference may be, by its own name."""
    is_folder = isinstance(value, str) and os.path.isdir(os.path.expanduser(value))  # False for texts of any length
    return os.path.basename(os.path.normpath(value)) if is_folder else value
