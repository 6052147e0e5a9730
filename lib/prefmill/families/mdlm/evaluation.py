"""Evaluating masked-diffusion models, before and after a tuning: likelihoods, preferences, answers, benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from prefmill.core.files import write_atomic
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import has_gpu
from prefmill.families.causal.chat import Answer, encode, prompt_text, turn_end
from prefmill.families.causal.generation import end_token_ids
from prefmill.families.mdlm.benchmarks import BenchmarkConfig, Question, read_questions
from prefmill.families.mdlm.block_likelihood import block_bounds
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.generation import Unmasking, generate, takes_padding
from prefmill.families.mdlm.likelihood import Likelihood, bounds, chain
from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of, predicts_next
from prefmill.families.mdlm.scorer import patch_forward, restore_forward
from prefmill.store.jsonl import JsonlWriter
from prefmill.training.data import PreferencePair, read_pairs

Row = dict[str, Any]


@dataclass(frozen=True)
class WrittenAnswer:
    """What a model wrote, without its end; `ended` unless it filled all the tokens that it was given."""

    text: str
    ended: bool


@dataclass
class Loaded:
    """A model to evaluate, with its tokenizer and how its outputs are read."""

    label: str
    model: Any
    tokenizer: Any
    mask_token_id: int
    shifted: bool
    config: DiffusionEvaluationConfig

    def likelihoods(self, samples: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """The likelihood of every (prompt, response), by the configured draws."""
        config = self.config
        drawing = Drawing(config.diffusion_steps, config.sampling, config.seed)
        rows = tqdm(samples, desc=f"{self.label}: likelihoods", unit=" rows")
        at_once, block = config.forward_batch_size, config.score_block_tokens
        if block is not None:
            found = block_bounds(self.model, rows, drawing, block, self.mask_token_id, self.shifted, at_once)
            return list(found)
        scorer = patch_forward(
            self.model, mask_token_id=self.mask_token_id, shifted=self.shifted, forward_batch_size=at_once
        )
        try:
            return list(bounds(scorer, rows, drawing))
        finally:
            # Generation and the chain need the model's own logits again.
            restore_forward(self.model)

    def answers(self, prompts: Sequence[str], how: Unmasking) -> list[WrittenAnswer]:
        """An answer to every user's message, in order."""
        return self.continuations([self._prompt(text) for text in prompts], how)

    def continuations(self, prompts: Sequence[list[int]], how: Unmasking) -> list[WrittenAnswer]:
        """An answer to every prompt (token ids), in order."""
        ends = answer_ends(self.model, self.tokenizer)
        return [self._answer(ids, ends) for ids in self.unmasked(prompts, how, ends)]

    def unmasked(
        self, prompts: Sequence[list[int]], how: Unmasking, ends: Collection[int] = frozenset()
    ) -> list[list[int]]:
        """Token ids of an answer to every prompt, in order; prompts of about one length run together."""
        written: dict[int, list[int]] = {}
        places = batches_by_length(list(map(len, prompts)), self.config.batch_size, takes_padding(self.model))
        for number, batch in enumerate(tqdm(places, desc=f"{self.label}: answers", unit=" batches")):
            own = replace(how, seed=how.seed * 1_000_003 + number)  # or every batch would be drawn alike
            found = generate(self.model, [prompts[p] for p in batch], own, self.mask_token_id, self.shifted, ends)
            written |= dict(zip(batch, found, strict=True))
        return [written[place] for place in range(len(prompts))]

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a user's message and an answer to it."""
        return encode(self.tokenizer, [{"role": "user", "content": question}], answer)

    def _prompt(self, text: str) -> list[int]:
        said = prompt_text(self.tokenizer, [{"role": "user", "content": text}])
        # The template has written the first token: a tokenizer such as Llama's would add it again.
        ids: list[int] = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        return ids

    def _answer(self, ids: list[int], ends: Collection[int]) -> WrittenAnswer:
        # Ends are taken out by id: one that is no special token would stay in the text.
        text: str = self.tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True)
        return WrittenAnswer(text.strip(), ended=ids[-1] in ends)


def batches_by_length(lengths: Sequence[int], batch_size: int, mixed: bool) -> list[list[int]]:
    """Places of prompts of these lengths, the shortest first, in batches; of one length each unless `mixed`."""
    ordered = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    runs = [ordered] if mixed else [list(run) for _, run in groupby(ordered, key=lambda place: lengths[place])]
    return [run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)]


def evaluate_models(
    config: DiffusionEvaluationConfig,
    task: Task,
    models: Mapping[str, str],
    pairs_file: Path | None,
    more: Callable[[Loaded], Iterable[Row]] | None = None,
) -> Metrics:
    """Evaluate the models by their labels; writes metrics.json, the rows behind it and report.md.

    `more` adds rows of a kind of its own: a `task` with its `measure` and `value`.
    """
    pairs = list(read_pairs(pairs_file))[: config.num_pairs] if pairs_file is not None else []
    # Before any model is loaded: a malformed row then ends the task at once.
    questions = {item.name: (item, read_questions(item)) for item in config.benchmarks}
    metrics: dict[str, Row] = {}
    likelihoods: dict[str, list[tuple[Likelihood, Likelihood]]] = {}
    with JsonlWriter(task.output / "rows.jsonl") as writer:
        for number, (label, name) in enumerate(models.items()):
            loaded = load(label, name, config)
            likelihoods[label] = _pair_likelihoods(loaded, pairs)
            rows = [
                *_likelihood_rows(loaded, pairs, likelihoods[label]),
                *_generation_rows(loaded, pairs),
                *_benchmark_rows(loaded, questions),
                *(more(loaded) if more is not None else ()),
            ]
            for row in rows:
                writer.write({"model": label, **row})
            metrics[label] = summarise(rows)
            task.progress(number + 1, len(models), "models")
    comparison = _implicit(likelihoods)
    write_atomic(task.output / "metrics.json", json.dumps({"models": metrics, **comparison}, indent=1) + "\n")
    write_atomic(task.output / "report.md", report(metrics, comparison))
    return {**{f"{label}_{key}": value for label, row in metrics.items() for key, value in row.items()}, **comparison}


def answer_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the end of a turn as the template has it, and the ends that model and tokenizer state."""
    stated = getattr(model, "generation_config", None)
    return frozenset({*end_token_ids(stated, tokenizer), turn_end(tokenizer)})


def load(label: str, name: str, config: DiffusionEvaluationConfig) -> Loaded:
    """A model ready to be evaluated."""
    options: Any = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = load_diffusion_tokenizer(name, template=config, **options)
    model = load_diffusion_model(
        name,
        precision=config.precision,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        quantization=config.quantization,
    ).eval()
    # Bitsandbytes puts 4-bit weights on the GPU while it loads them.
    if has_gpu() and config.quantization is None:
        model = model.to("cuda")
    mask = mask_token_of(model, tokenizer, config.mask_token_id)
    return Loaded(label, model, tokenizer, mask, predicts_next(model, config.shifted_logits), config)


def summarise(rows: Sequence[Row]) -> Row:
    """The figures of one model from its rows; what was not evaluated is left out."""
    chosen = [row for row in rows if row["kind"] == "likelihood" and row["side"] == "chosen"]
    rejected = [row for row in rows if row["kind"] == "likelihood" and row["side"] == "rejected"]
    generated = [row for row in rows if row["kind"] == "generation"]
    found: Row = {}
    if chosen:
        wins = [_wins(a["bound"] - b["bound"]) for a, b in zip(chosen, rejected, strict=True)]
        found |= {
            "chosen_nats_per_token": fmean(row["bound"] / row["num_tokens"] for row in chosen),
            "rejected_nats_per_token": fmean(row["bound"] / row["num_tokens"] for row in rejected),
            "preference_accuracy": fmean(wins),
        }
        if chosen[0]["chain"] is not None:
            found["chosen_chain_nats_per_token"] = fmean(row["chain"] / row["num_tokens"] for row in chosen)
    if generated:
        found["ended_share"] = fmean(row["ended"] for row in generated)
    if generated and generated[0]["wanted"] is not None:
        found["wanted_share"] = fmean(row["wanted"] for row in generated)
    for name in sorted({row["benchmark"] for row in rows if row["kind"] == "benchmark"}):
        asked = [row for row in rows if row.get("benchmark") == name]
        found[f"{name}_accuracy"] = fmean(row["right"] for row in asked)
    return found | {row["measure"]: row["value"] for row in rows if row["kind"] == "task"}


def report(metrics: Mapping[str, Row], comparison: Row) -> str:
    """The figures as a Markdown table, a column for each model."""
    labels = list(metrics)
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    lines = [
        "# Masked-diffusion evaluation",
        "",
        "| measure | " + " | ".join(labels) + " |",
        "|---" * (len(labels) + 1) + "|",
    ]
    for name in names:
        cells = [f"{metrics[label][name]:.4f}" if name in metrics[label] else "" for label in labels]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    for name, value in comparison.items():
        lines += ["", f"{name.replace('_', ' ')}: {value:.4f}"]
    return "\n".join(lines) + "\n"


def _pair_likelihoods(loaded: Loaded, pairs: Sequence[PreferencePair]) -> list[tuple[Likelihood, Likelihood]]:
    samples = [
        encode(loaded.tokenizer, pair.messages, answer, pair.tools)
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    found = loaded.likelihoods(samples) if samples else []
    return list(zip(found[::2], found[1::2], strict=True))


def _likelihood_rows(
    loaded: Loaded, pairs: Sequence[PreferencePair], found: Sequence[tuple[Likelihood, Likelihood]]
) -> Iterator[Row]:
    for pair, sides in zip(pairs, found, strict=True):
        for side, answer, likelihood in zip(("chosen", "rejected"), (pair.chosen, pair.rejected), sides, strict=True):
            yield {
                "kind": "likelihood",
                "pair_id": pair.pair_id,
                "side": side,
                "num_tokens": likelihood.num_tokens,
                "bound": likelihood.bound,
                "standard_error": likelihood.standard_error,
                "chain": _chain(loaded, pair, answer) if loaded.config.exact_chain else None,
            }


def _chain(loaded: Loaded, pair: PreferencePair, answer: Answer) -> float:
    prompt, response = encode(loaded.tokenizer, pair.messages, answer, pair.tools)
    at_once = loaded.config.forward_batch_size
    return chain(loaded.model, prompt, response, loaded.mask_token_id, loaded.shifted, at_once)


def _generation_rows(loaded: Loaded, pairs: Sequence[PreferencePair]) -> Iterator[Row]:
    config = loaded.config
    # Not a set: its order differs by process, and draws go by a prompt's place.
    prompts = list(dict.fromkeys(pair.messages[-1]["content"] for pair in pairs if len(pair.messages) == 1))
    asked = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    pattern = None if config.wanted_pattern is None else re.compile(config.wanted_pattern)
    for prompt, answer in zip(asked, loaded.answers(asked, config.unmasking) if asked else [], strict=True):
        wanted = None if pattern is None else bool(pattern.search(answer.text))
        yield {"kind": "generation", "prompt": prompt, "text": answer.text, "wanted": wanted, "ended": answer.ended}


def _benchmark_rows(
    loaded: Loaded, benchmarks: Mapping[str, tuple[BenchmarkConfig, Sequence[Question]]]
) -> Iterator[Row]:
    for name, (config, questions) in benchmarks.items():
        answers = _choose(loaded, questions) if config.kind == "multiple_choice" else _write(loaded, questions)
        for question, answer in zip(questions, answers, strict=True):
            yield {
                "kind": "benchmark",
                "benchmark": name,
                "question_id": question.question_id,
                "answer": answer,
                "right": answer == question.answer.strip(),
            }


def _choose(loaded: Loaded, questions: Sequence[Question]) -> list[str]:
    """The likeliest choice of every question."""
    samples = [loaded.encode(question.text, choice) for question in questions for choice in question.choices]
    found = iter(loaded.likelihoods(samples))
    # By -n a tie goes to the first choice, not to the last in the alphabet.
    return [max((next(found).bound, -n, choice) for n, choice in enumerate(q.choices))[2].strip() for q in questions]


def _write(loaded: Loaded, questions: Sequence[Question]) -> list[str]:
    """The answer that is written to every question, taking the likeliest tokens."""
    return [answer.text for answer in loaded.answers([question.text for question in questions], loaded.config.greedy)]


def _implicit(likelihoods: Mapping[str, Sequence[tuple[Likelihood, Likelihood]]]) -> Row:
    """With two models: how often the second prefers the chosen side more than the first does, by the same draws."""
    if len(likelihoods) != 2 or not all(likelihoods.values()):
        return {}
    before, after = likelihoods.values()
    margins = [
        (new[0].bound - old[0].bound) - (new[1].bound - old[1].bound) for old, new in zip(before, after, strict=True)
    ]
    return {"implicit_accuracy": fmean(_wins(margin) for margin in margins), "implicit_margin": fmean(margins)}


def _wins(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
