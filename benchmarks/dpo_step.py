"""An epoch of DPO on papers' reviews: this trainer's group layout beside TRL's DPOTrainer and pair-wise sharing.

    python -m benchmarks.dpo_step REVIEWS [--prompt-tokens 4000] [--response-tokens 150] [--groups 2] [--repeats 5]
    python -m benchmarks.dpo_step REVIEWS --short              # prompts of 100 tokens
    python -m benchmarks.dpo_step REVIEWS --layers window      # of 512; or hybrid: three of four with a state
    python -m benchmarks.dpo_step REVIEWS --gpu --prompt-tokens 16000 --response-tokens 600

REVIEWS is a JSONL of reviews, plain or .gz. Groups are accepted papers as they are there: which reviews beat which by
two points, and how long each review is beside the others, scaled to the mean asked for; the papers drawn have the
corpus' mean of pairs and responses. Their texts are random words: speed depends on lengths alone. Same weights,
pairs, dtype and threads on all sides, in one process, in turns; an epoch is the reference's scores, then forward,
backward and AdamW over all pairs. TRL runs with every setting of `TRL_SETTINGS` once, and then with its fastest.
Peak memory is what a fresh process adds to what it held before its first score. The last line is for machines: how many
times more pairs per second than TRL. Targets: 11 (2.5 with --short, 4 with --layers), 1.5 beside pair-wise sharing, a
third of the memory. The share of the machine's peak counts a step's products (of attention half of each square) against
the fastest fp32 product of two matrices of 2048 in the same run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dpo_work import LAYERS, Setting, create_model, draw, groups_of
from prefmill.training.data import Group

TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "batch 1": {"per_device_train_batch_size": 1},
    "batch 1, checkpointing": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
    "batch 4": {"per_device_train_batch_size": 4},
    "batch 4, checkpointing": {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
}
OURS, PAIR_ONLY = "group layout", "shared within a pair"


@dataclass(frozen=True)
class Runner:
    """One side: `cache` scores the reference, `step` takes an optimizer step over every pair; `tokens` of a step."""

    cache: Callable[[], Tensor]
    step: Callable[[], None]
    tokens: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--response-tokens", type=int, default=150)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="prompts of 100 tokens")
    parser.add_argument("--layers", choices=list(LAYERS), default="full")
    parser.add_argument("--gpu", action="store_true", help="Qwen2.5-3B's shape in bf16 on the first GPU")
    given = parser.parse_args()
    setting = draw(given.reviews, given.groups, 100 if given.short else given.prompt_tokens, given.response_tokens)
    setting = replace(setting, gpu=given.gpu, layers=given.layers)
    responses = sum(map(len, setting.lengths))
    print(f"{given.groups} papers, {setting.num_pairs} pairs, {responses} responses of {given.response_tokens} tokens "
          f"on average, prompts of {setting.prompt_tokens}; {torch.get_num_threads()} threads", flush=True)  # fmt: skip
    best = sweep(setting)
    memory = {name: peak_memory(setting, name) for name in (best, OURS, PAIR_ONLY)}
    report(setting, best, *measure(setting, best, given.repeats), memory)


def open_runner(setting: Setting, name: str) -> Runner:
    """The side called `name`."""
    groups = groups_of(setting)
    if name in TRL_SETTINGS:
        return trl_runner(setting, groups, TRL_SETTINGS[name])
    if name == PAIR_ONLY:
        groups = [replace(group, pairs=[pair]).up_to(10**9) for group in groups for pair in group.pairs]
    return own_runner(setting, groups)


def own_runner(setting: Setting, groups: list[Group]) -> Runner:
    """The preference trainer's own batches, scores and loss."""
    from prefmill.families.causal.group_attention import use_group_attention
    from prefmill.families.causal.group_layout import cut_responses, encode_groups, pack
    from prefmill.families.causal.scorer import patch_forward, score_batch
    from prefmill.training.batches import GroupPart
    from prefmill.training.objectives import PairScores, Settings, sigmoid

    model = create_model(setting)
    if setting.gpu:
        model.gradient_checkpointing_enable()
    use_group_attention(model)
    patch_forward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    references: list[Tensor] = []

    def cache() -> Tensor:
        model.eval()
        with torch.no_grad():
            packs = [next(iter(cut_responses(group, None))) for group in groups]
            references[:] = [score_batch(model, pack([item]).to(model.device)) for item in packs]
        return torch.cat([
            torch.stack([scores[pair.chosen], scores[pair.rejected]])
            for group, scores in zip(groups, references, strict=True) for pair in group.pairs
        ])  # fmt: skip

    def step() -> None:
        model.train()
        for number, group in enumerate(groups):
            batch = encode_groups(groups, [GroupPart(number, tuple(range(len(group.pairs))))]).to(model.device)
            scores, lengths, reference = score_batch(model, batch), batch.lengths.float(), references[number]
            sides = [tensor[side] for tensor in (scores, lengths, reference) for side in (batch.chosen, batch.rejected)]
            (sigmoid(PairScores(*sides), Settings(0.1)).sum() / setting.num_pairs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Runner(cache, step, sum(len(group.prompt) + sum(map(len, group.responses)) for group in groups))


def trl_runner(setting: Setting, groups: list[Group], keys: dict[str, Any]) -> Runner:
    """TRL's DPOTrainer on the same token ids, its references precomputed by its own code."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from prefmill.demo.tokenizer import train_chat_tokenizer

    tokenizer: PreTrainedTokenizerFast = train_chat_tokenizer(["a b c"] * 2, 300)
    rows = [{"prompt_ids": group.prompt, "chosen_ids": group.responses[pair.chosen],
             "rejected_ids": group.responses[pair.rejected]} for group in groups for pair in group.pairs]  # fmt: skip

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    batch = keys["per_device_train_batch_size"]
    args = DPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=not setting.gpu, bf16=False, report_to="none",
                     max_length=None, precompute_ref_log_probs=True,
                     **{"gradient_checkpointing": setting.gpu, **keys})  # fmt: skip
    nothing = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    trainer = Tokenised(model=create_model(setting), args=args, train_dataset=nothing, processing_class=tokenizer)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-9)
    scored: list[Any] = []

    def cache() -> Tensor:
        dataset = Dataset.from_list(rows)
        dataset._fingerprint = f"{time.time_ns():x}"  # or TRL would find what it computed before
        trainer.model.eval()
        scored[:] = [trainer._precompute_ref_logps(dataset, "train", batch)]
        return torch.tensor([row[key] for row in scored[0] for key in ("ref_chosen_logps", "ref_rejected_logps")])

    def step() -> None:
        trainer.model.train()
        pairs = list(scored[0])
        for start in range(0, len(pairs), batch):
            rows = pairs[start : start + batch]
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
            (loss * len(rows) / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    sequences = [len(row["prompt_ids"]) + len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    return Runner(cache, step, sum(sequences))


def sweep(setting: Setting) -> str:
    """The name of TRL's fastest setting, each taken once on the first paper."""
    first = replace(setting, lengths=setting.lengths[:1], pairs=setting.pairs[:1])
    seconds = {}
    for name in TRL_SETTINGS:
        runner = open_runner(first, name)
        runner.cache()
        runner.step()
        seconds[name] = sum(_timed(setting, work) for work in (runner.cache, runner.step))
        print(f"TRL, {name:<24} {first.num_pairs / seconds[name]:8.3f} pairs per second on one paper", flush=True)
    return min(seconds, key=lambda name: seconds[name])


def measure(setting: Setting, best: str, repeats: int) -> tuple[dict[str, Runner], dict[str, Any], float]:
    """Seconds of every repeat by side and part, and the largest difference of a reference score."""
    runners = {name: open_runner(setting, name) for name in (best, PAIR_ONLY, OURS)}
    scores = {name: runner.cache().flatten().cpu() for name, runner in runners.items()}
    difference = (scores[best] - scores[OURS]).abs().max().item()
    seconds: dict[str, dict[str, list[float]]] = {name: {"cache": [], "step": []} for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            seconds[name]["cache"].append(_timed(setting, runner.cache))
            seconds[name]["step"].append(_timed(setting, runner.step))
    return runners, seconds, difference


def _timed(setting: Setting, work: Callable[[], Any]) -> float:
    return _seconds(lambda: (work(), torch.cuda.synchronize() if setting.gpu else None))


def peak_memory(setting: Setting, name: str) -> float:
    """GB that an epoch adds to what a fresh process with the model held before."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak, args=(setting, name, torch.get_num_threads(), sender))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"{name} ended with exit code {child.exitcode}: out of memory?")
    peak: float = receiver.recv()
    return peak


def _peak(setting: Setting, name: str, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    runner = open_runner(setting, name)
    before = _held(setting)
    runner.cache()
    runner.step()
    sender.send(_peak_held(setting) - before)


def _held(setting: Setting) -> float:
    """The memory this process holds, in GB; its peak is counted from here on."""
    if setting.gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")
    return _status_gb("VmRSS")


def _peak_held(setting: Setting) -> float:
    """The most memory this process has held since `_held`, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if setting.gpu else _status_gb("VmHWM")


def _status_gb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024 / 1e9


def report(
    setting: Setting, best: str, runners: dict[str, Runner], seconds: dict[str, Any], difference: float,
    memory: dict[str, float],
) -> None:  # fmt: skip
    """Print every side's figures, the ratios, and the line for machines."""
    rates = {}
    for name, runner in runners.items():
        epochs = [cache + step for cache, step in zip(*seconds[name].values(), strict=True)]
        rates[name] = setting.num_pairs / min(epochs)
        title = f"TRL, {name}" if name == best else name
        print(f"{title:<26} {rates[name]:8.3f} pairs/s; reference {min(seconds[name]['cache']):7.2f} s, step "
              f"{min(seconds[name]['step']):7.2f} s; epoch {min(epochs):.2f} to {max(epochs):.2f} s; "
              f"{runner.tokens} tokens, {memory[name]:.2f} GB")  # fmt: skip
    if not setting.gpu:
        print(f"{OURS}: {_share_of_peak(runners[OURS].step, min(seconds[OURS]['step']))}")
    tokens = runners[best].tokens / runners[OURS].tokens
    print(f"max |delta logp| {difference:.1e}; tokens {tokens:.2f}x fewer than TRL; step alone "
          f"{min(seconds[best]['step']) / min(seconds[OURS]['step']):.2f}x TRL's speed")  # fmt: skip
    print(f"memory: {memory[OURS] / memory[best]:.2f} of TRL's (target: at most 0.33)")
    print(f"beside sharing within a pair: {rates[OURS] / rates[PAIR_ONLY]:.2f}x (target: 1.5)")
    print(f"ratio: {rates[OURS] / rates[best]:.2f}")


def _share_of_peak(step: Callable[[], None], seconds: float) -> str:
    from torch.utils.flop_counter import FlopCounterMode

    left, right = torch.randn(2, 2048, 2048)
    fastest = min(_seconds(lambda: left @ right) for _ in range(10))
    peak = 2 * 2048**3 / fastest
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count / (2 if "attention" in str(kind) else 1) for kind, count in counts.items())
    return f"{products / seconds / peak:.0%} of this machine's peak of {peak / 1e9:.0f} GFLOP/s in products"


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
