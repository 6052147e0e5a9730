"""Training a reward model: the common preference trainer over image pairs, calibration, measures, finished folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPModel

from prefmill.core.errors import InputError
from prefmill.core.files import write_json
from prefmill.core.image_rows import HEADS
from prefmill.core.stage import Metrics, Task
from prefmill.core.statistics import Resampling
from prefmill.distributed.devices import rank
from prefmill.families.causal.load_check import turn_off_dropout
from prefmill.families.causal.loading import loading
from prefmill.families.causal.whole import read_whole
from prefmill.families.reward.data import (
    Half,
    LabelledPair,
    PairPreferenceDataset,
    PixelReader,
    coin,
    counted_alike,
    flip_by_coin,
    group_pairs_by_prompt,
    in_half,
    read_pairs,
)
from prefmill.families.reward.family import RewardFamily, reward_family
from prefmill.families.reward.measures import DIGITS, fit_temperature, fit_tie_band, measure_head
from prefmill.families.reward.model import MultiHeadReward, create_reward, cut_prompts, open_processor, require_size
from prefmill.families.reward.open_clip import is_open_clip, load_open_clip
from prefmill.store.jsonl import write_jsonl
from prefmill.store.pictures import cut_images
from prefmill.training.config import TrainingConfig
from prefmill.training.loop import TrainingSpec, run_training
from prefmill.training.objectives import Settings, mix
from prefmill.training.publish import save_finished
from prefmill.training.trainer import Preferences, train_data, val_data

METRICS, PREDICTIONS, TRAINED_ON = "metrics.json", "predictions.jsonl", "trained_on.json"
HELD_OUT = ("val", "test")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardTraining:
    """What the stage asks for beside TrainingConfig's keys; see stages/train_reward.py."""

    half: Half
    hidden_size: int
    trainable: Literal["all", "vision", "heads"]
    crop_scale: float
    overall_for_missing: bool
    shuffle_labels: bool
    num_resamples: int
    confidence: float


def train_reward(config: TrainingConfig, wanted: RewardTraining, task: Task, clip: str, pairs: Path) -> Metrics:
    """Tune `clip` with new heads on the pairs of the folder `pairs`, and measure it on the held-out prompts.

    Resumes from the newest complete checkpoint. Temperatures and tie bands come from the val split alone.
    """
    processor = load_processor(clip, config.revision)
    rows = read_pairs(pairs, wanted.overall_for_missing)
    train, held_out = split_rows(rows, wanted.half, pairs)
    # Training labels alone: this control is measured on what people really said.
    learnt = flip_by_coin(train, config.seed) if wanted.shuffle_labels else train
    settings = Settings(beta=1.0)
    spec = TrainingSpec(
        config=config,
        task=task,
        load=lambda: _load(clip, processor, config, wanted),
        data=Preferences(
            train=train_data(group_pairs_by_prompt(learnt), config),
            val=val_data(group_pairs_by_prompt(held_out["val"]), config),
            family=reward_family(PixelReader(processor, wanted.crop_scale, config.seed)),
            objective=mix(["bradley_terry_heads"], [1.0], settings, RewardFamily.supplies),
            settings=settings,
        ),
        processor=processor,
        publish=lambda trainer: (
            summarise(_measure_and_save(trainer.model, processor, config, wanted, task, train, held_out))
            if trainer.is_world_process_zero()  # one rank measures
            else {}
        ),
        counts={"pairs": len(train), "prompts": len({row.prompt_id for row in train}), **_count_cut(processor, rows)},
        logged={},
    )
    metrics = run_training(spec)
    return metrics if rank() == 0 else {}  # one rank measures


def split_rows(
    rows: Sequence[LabelledPair], half: Half, where: Path
) -> tuple[list[LabelledPair], dict[str, list[LabelledPair]]]:
    """The pairs to train on, of one half of their prompts, and the held-out ones by split.

    Raises InputError when a prompt is on both sides, or nothing is left to train on.
    """
    train = [row for row in rows if row.split == "train" and in_half(row.prompt_id, half)]
    held_out = {split: [row for row in rows if row.split == split] for split in HELD_OUT}
    # Of both halves: what is trained on the other half is judged on the same held-out prompts.
    known = {row.prompt_id for row in rows if row.split == "train"}
    leaked = sorted({row.prompt_id for part in held_out.values() for row in part} & known)
    if leaked:
        raise InputError(
            "a prompt is held out and trained on", where=where, got=leaked[0], fix="split pairs by prompt",
        )  # fmt: skip
    if not train:
        raise InputError(
            "no pairs to train on", where=where, got=f"{len(rows)} pairs, prompt_half: {half}",
            expected="pairs of split train", fix="rate more prompts, or set prompt_half=all",
        )  # fmt: skip
    return counted_alike(train), {split: counted_alike(part) for split, part in held_out.items()}


def load_clip(name: str, config: TrainingConfig) -> CLIPModel:
    """The CLIP to start from, in fp32 from safetensors; raises InputError when it cannot be loaded."""
    if is_open_clip(name):
        return load_open_clip(Path(name), config.attn_implementation)
    with loading("the CLIP model", name):
        model: CLIPModel = read_whole(
            CLIPModel, name, dtype=torch.float32, revision=config.revision,
            attn_implementation=config.attn_implementation,
        )  # fmt: skip
    return model


def load_processor(name: str, revision: str | None) -> Any:
    """CLIP's tokenizer and image processor."""
    with loading("the CLIP processor", name):
        return open_processor(name, revision=revision)


def predict(model: Any, rows: Sequence[LabelledPair], reader: PixelReader, batch_size: int) -> np.ndarray[Any, Any]:
    """Margins r(preferred) - r(rejected) [N, K], float64, of pairs on the model's device, images shown whole."""
    model.eval()
    found = [np.zeros((0, len(HEADS)))]
    loader = DataLoader(PairPreferenceDataset(rows, reader), batch_size=batch_size, shuffle=False)
    for prompts, preferred, rejected, _ in tqdm(loader, desc="held-out pairs", unit=" batches"):
        text = {name: value.to(model.device) for name, value in reader.tokens(prompts).items()}
        with torch.inference_mode():
            sides = [model(pixels.to(model.device), **text) for pixels in (preferred, rejected)]
        found.append((sides[0] - sides[1]).double().cpu().numpy())
    return np.concatenate(found)


def summarise(measured: dict[str, Any]) -> Metrics:
    """Means over the heads that could be measured, for each split: what a sweep may choose by."""
    summary: Metrics = {}
    for split in HELD_OUT:
        heads = [found for found in measured["splits"][split].values() if found is not None]
        for name in ("f1", "accuracy", "tie_aware_accuracy"):
            values = [found[name]["value"] for found in heads if found[name]["value"] is not None]
            summary[f"{split}_{name}"] = round(sum(values) / len(values), DIGITS) if values else None
    return summary


def _load(clip: str, processor: Any, config: TrainingConfig, wanted: RewardTraining) -> MultiHeadReward:
    start = load_clip(clip, config)
    require_size(processor.image_processor, start.config, clip)
    model = create_reward(start, wanted.hidden_size, config.seed)
    check_reward(model, start, clip)
    freeze(model, wanted.trainable)
    return model


def check_reward(model: MultiHeadReward, clip: CLIPModel, name: str) -> None:
    """Raise InputError where `model`, as it trains, differs from its heads on what CLIP's own forward says of each row.

    Dropout is turned off: images of one prompt would be compared through different draws.
    """
    turn_off_dropout(model)
    text, vision = clip.config.text_config, clip.config.vision_config
    ids = torch.arange(6, 12).reshape(2, 3) % text.vocab_size
    ids = torch.cat([ids, torch.full((2, 2), text.eos_token_id)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    size = (3, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.linspace(-2, 2, math.prod(size)).sin().reshape(size)
    prompt_of = torch.tensor([0, 1, 1])
    with torch.no_grad():
        found = model.train()(pixels, ids, mask, prompt_of)
        own = [
            clip.eval()(pixel_values=pixels[n : n + 1], input_ids=ids[p : p + 1], attention_mask=mask[p : p + 1])
            for n, p in enumerate(prompt_of.tolist())
        ]
        expected = torch.cat([model.rewards(each.image_embeds, each.text_embeds) for each in own])
    if not (found - expected).abs().max() <= 1e-3:  # NaN is no agreement
        raise InputError(
            "the reward model does not compute what its CLIP says", where=name, got=found.flatten().tolist(),
            expected=expected.flatten().tolist(), fix="leave attn_implementation out, or start from another CLIP",
        )  # fmt: skip


def freeze(model: MultiHeadReward, trainable: Literal["all", "vision", "heads"]) -> None:
    """Leave gradients to the parts that are to be trained; CLIP's own logit scale takes no part in a reward."""
    frozen: list[Any] = []
    if trainable == "heads":
        frozen = [model.clip]
    elif trainable == "vision":
        frozen = [model.clip.text_model, model.clip.text_projection]
    for part in frozen:
        part.requires_grad_(False)
    # DDP raises an error for a trainable weight that gets no gradient.
    model.clip.logit_scale.requires_grad_(False)


def _measure_and_save(
    model: Any,
    processor: Any,
    config: TrainingConfig,
    wanted: RewardTraining,
    task: Task,
    train: Sequence[LabelledPair],
    held_out: dict[str, list[LabelledPair]],
) -> dict[str, Any]:
    """Write the folder: weights with the fitted temperatures, measures, predictions, and the prompts trained on."""
    # Without a crop: held-out images are seen whole, as they will be when the model scores.
    reader = PixelReader(processor)
    margins = {
        split: predict(model, rows, reader, config.per_device_train_batch_size) for split, rows in held_out.items()
    }
    labels = {split: np.array([row.labels for row in rows]).reshape(-1, len(HEADS)) for split, rows in held_out.items()}
    heads = range(len(HEADS))
    temperatures = [fit_temperature(margins["val"][:, k], labels["val"][:, k]) for k in heads]
    # After the temperatures: a band is a distance between calibrated probabilities.
    bands = [fit_tie_band(margins["val"][:, k] / temperatures[k], labels["val"][:, k]) for k in heads]
    resampling = Resampling(wanted.num_resamples, config.seed, wanted.confidence)
    splits: dict[str, Any] = {}
    for split, rows in held_out.items():
        flipped = np.array([coin(config.seed, row.pair_id) for row in rows], dtype=bool)
        prompts = [row.prompt_id for row in rows]
        splits[split] = {
            HEADS[k]: measure_head(
                margins[split][:, k], labels[split][:, k], flipped, prompts, temperatures[k], bands[k], resampling
            )
            for k in heads
        }
    measured = {
        "heads": list(HEADS),
        "confidence": wanted.confidence,
        "temperatures": dict(zip(HEADS, temperatures, strict=True)),
        "tie_bands": dict(zip(HEADS, bands, strict=True)),
        "splits": splits,
    }
    model.config.temperatures = temperatures
    save_finished(model, processor, task.output, config, task)
    write_json(task.output / METRICS, measured, allow_nan=False)
    write_jsonl(task.output / PREDICTIONS, _predictions(held_out, margins))
    # What evaluate_images refuses to have judged by this model.
    ids, prompts = (sorted(found) for found in ({row.prompt_id for row in train}, {row.prompt for row in train}))
    prompts_seen = {"prompt_half": wanted.half, "prompt_ids": ids, "prompts": prompts}
    write_json(task.output / TRAINED_ON, prompts_seen)
    return measured


def _predictions(
    held_out: dict[str, list[LabelledPair]], margins: dict[str, np.ndarray[Any, Any]]
) -> list[dict[str, Any]]:
    """Every held-out pair with its margins, uncalibrated, and its labels."""
    return [
        {
            "pair_id": row.pair_id,
            "prompt_id": row.prompt_id,
            "split": split,
            "margins": {name: round(float(value), DIGITS) for name, value in zip(HEADS, values, strict=True)},
            "labels": {
                name: None if math.isnan(label) else label for name, label in zip(HEADS, row.labels, strict=True)
            },
        }
        for split, rows in held_out.items()
        for row, values in zip(rows, margins[split], strict=True)
    ]


def _count_cut(processor: Any, rows: Sequence[LabelledPair]) -> Metrics:
    """How many prompts and images CLIP sees only a part of, for the metrics; the log names one."""
    prompts = sorted({row.prompt for row in rows})
    long = cut_prompts(processor.tokenizer, prompts, processor.tokenizer.model_max_length)
    if long:
        _log.warning("%d of %d prompts are longer than CLIP reads, such as %s", len(long), len(prompts), long[0])
    shown = rows if processor.image_processor.do_center_crop else ()
    paths = {path for row in shown for path in (row.preferred, row.rejected)}
    if cut := cut_images(paths, lambda *_: (1, 1)):
        _log.warning(
            "%d of %d images are not square, and CLIP sees their middle alone, by up to %.0f %% less than people did, "
            "such as %s", len(cut), len(paths), 100 * max(cut.values()), min(cut).name,
        )  # fmt: skip
    return {"num_cut_prompts": len(long), "num_cut_images": len(cut)}
