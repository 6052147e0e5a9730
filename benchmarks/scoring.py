"""Checklist scoring on real reviews: both engines beside the usual script and one-by-one transformers, in one run.

    python -m benchmarks.scoring REVIEWS [--papers 2] [--repeats 3] [--threads 2]
    python -m benchmarks.scoring REVIEWS --threads 1 --cpu-time     # on a machine that others use as well

REVIEWS is a JSONL of reviews, plain or .gz. Whole papers are drawn whose prompts (instructions, title and abstract,
review, item) come nearest to 1,000 tokens on average; each review is asked all 24 shipped items. The model is a Qwen2
of 26 million random parameters in float32, the same for all: Qwen2.5-1.5B at half its width, 2 of its 28 layers. Every
way has a process of its own and they take turns; vLLM's cache is emptied before each turn. The ways:

- vllm engine, transformers engine: as score_reviews opens them.
- usual script: a text prompt for every item, the item first and 16 tokens through `LLM.generate` of the same vLLM.
  Prompts share no more than an item and the task (some 50 tokens) with another review's, so its cache hardly helps.
  With --paper-first title and abstract follow the item, and a paper's reviews share them as well.
- usual, review first: the same with the item last, which is what the prefix cache alone does for a usual script.
- one by one: transformers' `generate` of 16 tokens, one prompt of the usual script at a time. A review is asked one
  item (in turn), so items per second are extrapolated from a 24th of the work. One forward: 1 token instead of 16.

The bound is the usual script's tokens (prompts and 16 each) over those left when no prefix is read twice. Figures are
of a way's fastest turn; start-up lasts from its process's start to the first review's answers. The last line is for
machines: how many times more items per second than the usual script the faster engine answers. Goals for that one: 15,
2 with the review first, and 85 % of the bound; 20 beside one by one; the transformers engine at 60 % of the vLLM engine
on a CPU.

Predicted before the first run, for 8 layers of 512 and two idle cores: bound 16; usual script 6 items/s; vLLM engine
with blocks of 128 tokens 9x that, as an item then rereads half a block beside its own 40 tokens; with blocks of 32
12.5x, 78 % of the bound; review first 6x; one by one 2.3 items/s; transformers engine 60 % of vLLM's; |delta p_yes|
below 1e-5. What came: docs/decisions/0093-prefixes-end-at-blocks.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.scoring_work import Work, distinct_tokens, draw, every_prompt, open_prompts, usual_prompts

NUM_GENERATED = 16
OURS, USUAL, REVIEW_FIRST = "vllm engine", "usual script", "usual, review first"
ONE_BY_ONE, ONE_FORWARD, NO_VLLM = "one by one", "one by one, one forward", "transformers engine"


@dataclass(frozen=True)
class Done:
    """One turn: items answered, tokens that ran through the model, and P(yes) by review where there is one."""

    num_items: int
    num_tokens: int
    p_yes: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """An opened way to score: `run` answers reviews, `reset` forgets what was cached."""

    run: Callable[[Work], Done]
    reset: Callable[[], Any] = lambda: None


@dataclass
class Measured:
    """A way's start-up, the seconds of its turns, and what its last turn did."""

    startup: float
    seconds: list[float]
    done: Done

    @property
    def rate(self) -> float:
        """Items a second in the fastest turn."""
        return self.done.num_items / min(self.seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--papers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="seconds of each process's CPU instead of the clock's")
    parser.add_argument("--paper-first", action="store_true", help="the usual script's cache shares item and paper")
    parser.add_argument("--kv-cache-gb", type=float, default=0.5, help="of each vLLM")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # before any process loads torch
    with tempfile.TemporaryDirectory() as folder:
        work = replace(
            draw(given.reviews, given.papers, Path(folder), given.kv_cache_gb), paper_first=given.paper_first
        )
        prompts = every_prompt(work, open_prompts(work))
        length = statistics.mean(map(len, prompts))
        print(f"{len(work.papers)} papers, {len(work.reviews)} reviews, {len(prompts)} items, prompts of {length:.0f} "
              f"tokens on average; {given.threads} threads, seconds {'of CPU' if given.cpu_time else 'by the clock'}",
              flush=True)  # fmt: skip
        report(measure(work, given.repeats, given.cpu_time), prompts)


def open_vllm(work: Work) -> Any:
    """The engine as score_reviews opens it."""
    from prefmill.checklist.engine import VllmConfig
    from prefmill.checklist.engines import open_engine
    from prefmill.checklist.items import load_checklist

    config = VllmConfig(model_name_or_path=work.model, precision="fp32", include_paper="title_abstract",
                        kv_cache_gb=work.kv_cache_gb, enforce_eager=True)  # fmt: skip
    return open_engine(config, load_checklist())


def vllm_engine(work: Work) -> Way:
    """This project's engine with vLLM."""
    engine = open_vllm(work)

    def run(work: Work) -> Done:
        before = engine.num_prompt_tokens - engine.num_cached_tokens
        p_yes = _p_yes(engine.score(work.papers))
        return Done(_count(p_yes), engine.num_prompt_tokens - engine.num_cached_tokens - before, p_yes)

    return Way(run, engine._llm.reset_prefix_cache)


def usual_script(work: Work, item_first: bool = True) -> Way:
    """A text prompt for every item and 16 tokens, through the same vLLM; `item_first` or last."""
    llm = open_vllm(work)._llm

    def run(work: Work) -> Done:
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=NUM_GENERATED, temperature=0.0, ignore_eos=True)
        outputs = llm.generate(usual_prompts(work, item_first), wanted, use_tqdm=False)
        read = sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
        return Done(len(outputs), read + sum(len(output.outputs[0].token_ids) for output in outputs))

    return Way(run, llm.reset_prefix_cache)


def transformers_engine(work: Work) -> Way:
    """This project's engine without vLLM."""
    from prefmill.checklist.engine import TransformersConfig
    from prefmill.checklist.engines import open_engine
    from prefmill.checklist.items import load_checklist

    config = TransformersConfig(model_name_or_path=work.model, precision="fp32", include_paper="title_abstract")
    engine: Any = open_engine(config, load_checklist())

    def run(work: Work) -> Done:
        before = engine.num_prompt_tokens - engine.num_cached_tokens
        p_yes = _p_yes(engine.score(work.papers))
        return Done(_count(p_yes), engine.num_prompt_tokens - engine.num_cached_tokens - before, p_yes)

    return Way(run)


def one_by_one(work: Work, num_generated: int = NUM_GENERATED) -> Way:
    """Transformers' own loop: a prompt at a time, one item of each review."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    model = AutoModelForCausalLM.from_pretrained(work.model).eval()

    def run(work: Work) -> Done:
        tokens, prompts, num_items = 0, usual_prompts(work, item_first=True), len(work.reviews)
        each = len(prompts) // num_items
        for index in range(num_items):
            encoded = tokenizer(prompts[index * each + index % each], return_tensors="pt")
            output = model.generate(**encoded, max_new_tokens=num_generated, min_new_tokens=num_generated,
                                    do_sample=False)  # fmt: skip
            tokens += output.shape[1]
        return Done(num_items, tokens)

    return Way(run)


def _p_yes(outcomes: Any) -> dict[str, list[float]]:
    return {outcome.review_id: [answer["p_yes"] for answer in outcome.answers.values()] for outcome in outcomes}


def _count(p_yes: dict[str, list[float]]) -> int:
    return sum(map(len, p_yes.values()))


WAYS: dict[str, Callable[[Work], Way]] = {
    OURS: vllm_engine,
    USUAL: usual_script,
    REVIEW_FIRST: partial(usual_script, item_first=False),
    ONE_BY_ONE: one_by_one,
    ONE_FORWARD: partial(one_by_one, num_generated=1),
    NO_VLLM: transformers_engine,
}


def measure(work: Work, repeats: int, cpu_time: bool) -> dict[str, Measured]:
    """Every way in a process of its own, all in turns."""
    context = multiprocessing.get_context("spawn")
    pipes, children, measured = {}, [], {}
    try:
        for name in WAYS:  # one after another: a start has the machine to itself
            pipes[name], end = context.Pipe()
            started = time.perf_counter()
            children.append(context.Process(target=_serve, args=(name, work, end), daemon=True))
            children[-1].start()
            end.close()
            cpu, done = _receive(pipes[name], name)
            measured[name] = Measured(cpu if cpu_time else time.perf_counter() - started, [], done)
        for _ in range(repeats):
            for name, pipe in pipes.items():
                pipe.send(work)
                clock, cpu, measured[name].done = _receive(pipe, name)
                measured[name].seconds.append(cpu if cpu_time else clock)
    finally:
        for child in children:
            child.terminate()
            child.join()
    return measured


def _receive(pipe: Any, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of '{name}' ended: its error stands above, or memory ran out") from None


def _serve(name: str, work: Work, pipe: Any) -> None:
    """A way's process: opened and warm with the first review, then a turn for each work sent."""
    paper, reviews = work.papers[0]
    way = WAYS[name](work)
    done = way.run(replace(work, papers=[(paper, reviews[:1])]))
    pipe.send((time.process_time(), done))
    while True:
        turn = pipe.recv()
        way.reset()
        clock, cpu = time.perf_counter(), time.process_time()
        done = way.run(turn)
        pipe.send((time.perf_counter() - clock, time.process_time() - cpu, done))


def report(measured: dict[str, Measured], prompts: Sequence[tuple[int, ...]]) -> None:
    """Print every way's figures, what they amount to, and the line for machines."""
    for name, way in measured.items():
        total = way.done.num_items / (way.startup + min(way.seconds))
        tokens = f"; {way.done.num_tokens / way.done.num_items:.1f} tokens per item" if way.done.num_tokens else ""
        turns = f"{way.done.num_items} items in {min(way.seconds):.2f} to {max(way.seconds):.2f} s"
        started = f"start-up {way.startup:.1f} s, with it {total:.2f} items/s"
        print(f"{name:<23} {way.rate:7.2f} items/s; {turns}; {started}{tokens}")
    rates = {name: way.rate for name, way in measured.items()}
    values, others = (measured[name].done.p_yes for name in (OURS, NO_VLLM))
    apart = max(abs(a - b) for name in values for a, b in zip(values[name], others[name], strict=True))
    every = [value for answers in values.values() for value in answers]
    print(f"max |delta p_yes| between the engines {apart:.1e}; p_yes from {min(every):.3f} to {max(every):.3f}")
    usual, distinct = measured[USUAL].done.num_tokens / len(prompts), distinct_tokens(prompts) / len(prompts)
    bound = usual / distinct
    print(f"bound: {usual:.1f} tokens per item against {distinct:.1f}, {bound:.2f}x (targets: 85% of it; 15x, 2x, 20x)")
    for name in (OURS, NO_VLLM):
        times = {other: rates[name] / rates[other] for other in (USUAL, REVIEW_FIRST, ONE_BY_ONE, ONE_FORWARD)}
        print(f"{name}: {times[USUAL] / bound:.0%} of the bound; " + ", ".join(
            f"{value:.2f}x {other}" for other, value in times.items()))  # fmt: skip
    print(f"without vLLM: {rates[NO_VLLM] / rates[OURS]:.0%} of the vLLM engine (target: 60%)")
    reached = max(rates[name] for name in (OURS, NO_VLLM)) / rates[USUAL]
    print(f"ratio: {reached:.2f}")


if __name__ == "__main__":
    main()
