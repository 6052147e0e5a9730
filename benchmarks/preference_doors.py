"""What a TRL script gains by one line, and what images gain by being encoded once for a prompt's responses.

    python -m benchmarks.preference_doors [--repeats 3]

Forward and backward of one batch that holds one group of 4 responses and 3 pairs, fp32, CPU time, the least of
interleaved repeats. Text: GroupDPOTrainer beside TRL's DPOTrainer, references precomputed in both, for several prompt
lengths. Images: the preference trainer's own batches beside TRL's DPOTrainer, which refuses precomputed references for
images and so runs the reference too; shown apart. The last line is for machines.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer

from prefmill.demo.text import Shape, create_qwen2, create_qwen2_5_vl
from prefmill.demo.tokenizer import VISION_TOKENS, train_chat_tokenizer
from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.group_layout import add_images, encode_groups
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.scorer import patch_forward, score_batch
from prefmill.families.causal.vision import with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.families.causal.vllm_loading import ImageTextProcessor
from prefmill.integrations.group_dpo_trainer import GroupDPOTrainer
from prefmill.training.batches import GroupPart
from prefmill.training.data import PreferencePair, group_by_prompt

SHAPE = Shape(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=768)
RESPONSE, PAIRS = 150, ((0, 1), (0, 2), (0, 3))  # tokens; pairs by their responses
WORDS = [f"w{number}" for number in range(3000)]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    tokenizer = train_chat_tokenizer([" ".join(WORDS)] * 2, 8000, extra_special_tokens=VISION_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        ratios = [_text(tokenizer, tokens, repeats, Path(folder)) for tokens in (100, 1000, 4000)]
        _images(tokenizer, repeats, Path(folder))
    print(f"ratio: {ratios[-1]:.2f}")


def _text(tokenizer: Any, prompt_tokens: int, repeats: int, folder: Path) -> float:
    prompt, answers = _words(tokenizer, prompt_tokens, 0), [_words(tokenizer, RESPONSE, 1 + n) for n in range(4)]
    rows = [{"prompt": prompt, "chosen": answers[good], "rejected": answers[bad]} for good, bad in PAIRS]
    steps: dict[str, Callable[[], float]] = {}
    for name, kind in (("trl", DPOTrainer), ("group", GroupDPOTrainer)):
        model = create_qwen2(tokenizer, SHAPE, seed=0)
        trainer = kind(model=model, args=_arguments(folder, precompute_ref_log_probs=True),
                       train_dataset=Dataset.from_list(rows), processing_class=tokenizer)  # fmt: skip
        _move(trainer.model)
        steps[name] = _step(trainer)
    seconds, losses = _time(steps, repeats)
    ratio = seconds["trl"] / seconds["group"]
    sequences = prompt_tokens + RESPONSE
    predicted = 6 * sequences / (prompt_tokens + 4 * RESPONSE)
    print(f"text   P={prompt_tokens:<5} R={RESPONSE}  DPOTrainer {seconds['trl']:7.2f} s  GroupDPOTrainer "
          f"{seconds['group']:7.2f} s  {ratio:5.2f}x (tokens: {predicted:.2f}x)  |delta loss| "
          f"{abs(losses['trl'] - losses['group']):.1e}", flush=True)  # fmt: skip
    return ratio


def _images(tokenizer: Any, repeats: int, folder: Path) -> None:
    """Six page images of 320 tokens each and a short text."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = create_qwen2_5_vl(tokenizer, SHAPE, seed=0)
    base = folder / "vl"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 250880}).save_pretrained(base)
    paths = tuple(str(folder / f"{number}.png") for number in range(6))
    for number, path in enumerate(paths):
        Image.frombytes("RGB", (448, 560), random.Random(number).randbytes(448 * 560 * 3)).save(path)
    answers = [_words(tokenizer, RESPONSE, 1 + number) for number in range(4)]
    question = _words(tokenizer, 100, 0)
    steps = {
        "trl": _trl_images(model, base, folder, question, answers, paths),
        "group": _own_images(model, base, tokenizer, question, answers, paths),
    }
    seconds, _ = _time(steps, repeats)
    print(f"images 6 x 320 tokens  DPOTrainer {seconds['trl']:7.2f} s (reference included)  group layout "
          f"{seconds['group']:7.2f} s  {seconds['trl'] / seconds['group']:5.2f}x", flush=True)  # fmt: skip


def _trl_images(model: Any, base: Path, folder: Path, question: str, answers: list[str], paths: Any) -> Any:
    parts = [{"type": "text", "text": question}, *({"type": "image"} for _ in paths)]
    rows = [
        {
            "prompt": [{"role": "user", "content": parts}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": answers[good]}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": answers[bad]}]}],
            "images": [Image.open(path) for path in paths],
        }
        for good, bad in PAIRS
    ]
    reference, processor = type(model).from_pretrained(base), ImageTextProcessor.from_pretrained(str(base))
    trainer = DPOTrainer(model=type(model).from_pretrained(base), ref_model=reference, args=_arguments(folder),
                         train_dataset=Dataset.from_list(rows), processing_class=processor)  # fmt: skip
    return _step(trainer)


def _own_images(model: Any, base: Path, tokenizer: Any, question: str, answers: list[str], paths: Any) -> Any:
    reader = open_reader(str(base), tokenizer, ImageLimits())
    assert reader is not None
    turns = with_images([{"role": "user", "content": question + "<image>" * len(paths)}], paths)
    groups = group_by_prompt(
        [PreferencePair(f"p{bad}", "g", turns, answers[good], answers[bad], paths) for good, bad in PAIRS],
        reader.encode,
    )
    use_group_attention(model)
    patch_forward(model)
    model.train()

    def step() -> float:
        batch = add_images(encode_groups(groups, [GroupPart(0, (0, 1, 2))]), groups, reader)
        scores = score_batch(model, batch)
        loss = -torch.nn.functional.logsigmoid(0.1 * (scores[batch.chosen] - scores[batch.rejected])).mean()
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step


def _step(trainer: Any) -> Callable[[], float]:
    trainer.model.train()

    def step() -> float:
        rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        loss.backward()
        trainer.model.zero_grad()
        return float(loss)

    return step


def _move(model: Any) -> None:
    """Away from the reference, so that losses say something."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=noise)


def _time(steps: dict[str, Callable[[], float]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """The least CPU seconds of every step, and its loss; one round to warm up is not counted."""
    seconds = {name: float("inf") for name in steps}
    losses = {}
    for number in range(repeats + 1):
        for name, step in steps.items():
            started = time.process_time()
            losses[name] = step()
            if number:
                seconds[name] = min(seconds[name], time.process_time() - started)
    return seconds, losses


def _arguments(folder: Path, **keys: Any) -> DPOConfig:
    return DPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", max_length=None,
                     per_device_train_batch_size=len(PAIRS), **keys)  # fmt: skip


def _words(tokenizer: Any, tokens: int, seed: int) -> str:
    """Text of about so many tokens."""
    ids = tokenizer(" ".join(random.Random(seed).choices(WORDS, k=tokens)), add_special_tokens=False)["input_ids"]
    text: str = tokenizer.decode(ids[:tokens])
    return text


if __name__ == "__main__":
    main()
