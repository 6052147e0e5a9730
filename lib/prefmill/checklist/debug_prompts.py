"""Debugging: what an engine is shown of each review, and what it answers, printed for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from prefmill.checklist.engine import Engine, Outcome
from prefmill.core.records import Paper, Review

Reviews = TypeVar("Reviews", bound=Sequence[Review])


def show_prompts(papers: Iterator[tuple[Paper, Reviews]], engine: Engine) -> Iterator[tuple[Paper, Reviews]]:
    """The same papers; before the engine gets one, the prompts of the first item are printed."""
    for paper, reviews in papers:
        for review in reviews:
            prompt = engine.prompt(paper, review)
            if prompt is not None:
                # tqdm.write, as a plain print would tear the progress bar.
                tqdm.write(f"--- prompt: {_name(paper['paper_id'], review['review_id'])}\n{printable(prompt)}\n---")
        yield paper, reviews


def show_outcome(outcome: Outcome) -> None:
    """Print the answers to every item, or why there are none."""
    lines = [f"--- answers: {_name(outcome.paper_id, outcome.review_id)}"]
    if outcome.num_cut_tokens:
        lines.append(f"{outcome.num_cut_tokens} tokens were cut off the review")
    for name, answer in outcome.answers.items():
        evidence = f'  "{answer["evidence"]}"' if "evidence" in answer else ""
        lines.append(f"{answer['p_yes']:.6f} {'yes' if answer['yes'] else 'no '} {name}{evidence}")
    lines.append("---" if outcome.failure is None else f"failed: {outcome.failure}")
    tqdm.write(printable("\n".join(lines)))


def printable(text: str) -> str:
    """`text` with control characters spelt out: a review must not steer a terminal."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _name(paper_id: str, review_id: str) -> str:
    return f"review {review_id} of paper {paper_id}"
