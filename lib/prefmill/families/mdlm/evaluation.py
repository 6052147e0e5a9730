"""Evaluating masked-diffusion models, before and after a tuning: likelihoods, preferences, answers, benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from prefmill.core.files import write_atomic, write_json
from prefmill.core.stage import Metrics, Task
from prefmill.families.causal.chat import encode, prompt_text
from prefmill.families.causal.token_ids import token_ids
from prefmill.families.mdlm.benchmarks import BenchmarkConfig, Question, read_questions
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig
from prefmill.families.mdlm.evaluated_model import Likelihood, Loaded, Row, load
from prefmill.store.jsonl import JsonlWriter
from prefmill.training.data import PreferencePair, read_pairs
from prefmill.training.telemetry import win_of


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
        for label, name in models.items():
            # Not bound to a name here: the next model is loaded when this one's memory is free.
            rows, likelihoods[label] = _evaluate(load(label, name, config, task.work / label, task.advance), pairs,
                                                 questions, more)  # fmt: skip
            for row in rows:
                writer.write({"model": label, **row})
            metrics[label] = summarise(rows)
    comparison = _implicit(likelihoods)
    write_json(task.output / "metrics.json", {"models": metrics, **comparison})
    write_atomic(task.output / "report.md", report(metrics, comparison))
    return {**{f"{label}_{key}": value for label, row in metrics.items() for key, value in row.items()}, **comparison}


def summarise(rows: Sequence[Row]) -> Row:
    """The figures of one model from its rows; what was not evaluated is left out."""
    chosen = [row for row in rows if row["kind"] == "likelihood" and row["side"] == "chosen"]
    rejected = [row for row in rows if row["kind"] == "likelihood" and row["side"] == "rejected"]
    generated = [row for row in rows if row["kind"] == "generation"]
    found: Row = {}
    if chosen:
        wins = [win_of(a["bound"] - b["bound"]) for a, b in zip(chosen, rejected, strict=True)]
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


def _evaluate(
    loaded: Loaded,
    pairs: Sequence[PreferencePair],
    questions: Mapping[str, tuple[BenchmarkConfig, Sequence[Question]]],
    more: Callable[[Loaded], Iterable[Row]] | None,
) -> tuple[list[Row], list[tuple[Likelihood, Likelihood]]]:
    """All rows of one model, and the likelihoods of both sides of every pair."""
    samples = [
        encode(loaded.tokenizer, pair.messages, answer, pair.tools)
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    found = loaded.likelihoods(samples)
    chains = loaded.chains(samples) if loaded.config.exact_chain else [None] * len(samples)
    rows = [
        *_likelihood_rows(pairs, found, chains),
        *_generation_rows(loaded, pairs),
        *_benchmark_rows(loaded, questions),
        *(more(loaded) if more is not None else ()),
    ]
    return rows, list(zip(found[::2], found[1::2], strict=True))


def _likelihood_rows(
    pairs: Sequence[PreferencePair], found: Sequence[Likelihood], chains: Sequence[float | None]
) -> Iterator[Row]:
    sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    for (pair, side), likelihood, exact in zip(sides, found, chains, strict=True):
        yield {
            "kind": "likelihood",
            "pair_id": pair.pair_id,
            "side": side,
            "num_tokens": likelihood.num_tokens,
            "bound": likelihood.bound,
            "standard_error": likelihood.standard_error,
            "chain": exact,
        }


def _generation_rows(loaded: Loaded, pairs: Sequence[PreferencePair]) -> Iterator[Row]:
    config, tokenizer = loaded.config, loaded.tokenizer
    # Not a set: its order differs by process, and draws go by a prompt's place.
    shown = {prompt_text(tokenizer, pair.messages, pair.tools): _shown(pair.messages) for pair in pairs}
    asked = [text for text in shown for _ in range(config.samples_per_prompt)]
    pattern = None if config.wanted_pattern is None else re.compile(config.wanted_pattern)
    answers = loaded.continuations([token_ids(tokenizer, text) for text in asked], config.unmasking)
    for text, answer in zip(asked, answers, strict=True):
        wanted = None if pattern is None else bool(pattern.search(answer.text))
        yield {
            "kind": "generation",
            "prompt": shown[text],
            "text": answer.text,
            "wanted": wanted,
            "ended": answer.ended,
        }


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    """A prompt of one turn as it is, others as JSON."""
    return str(messages[0]["content"]) if len(messages) == 1 else json.dumps(messages, ensure_ascii=False)


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
    return {"implicit_accuracy": fmean(win_of(margin) for margin in margins), "implicit_margin": fmean(margins)}
