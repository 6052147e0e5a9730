"""The scoring benchmark: its bound, and what each way's prompts share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.scoring import Measured, one_by_one, report, transformers_engine
from benchmarks.scoring_work import (
    Work,
    distinct_tokens,
    draw,
    every_prompt,
    open_prompts,
    shared_length,
    usual_prompts,
)
from prefmill.reviews.generated import generate


def test_tokens_of_distinct_prefixes() -> None:
    assert distinct_tokens([(1, 2, 3), (1, 2, 4), (1, 2), (5,)]) == 5
    assert distinct_tokens([(1, 2), (1, 2)]) == 2
    assert shared_length((1, 2, 3), (1, 2)) == 2
    assert shared_length((7,), (1, 2)) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("scoring")
    path = folder / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in generate(7, 12)))
    return draw(path, 1, folder / "model", 0.1)


@pytest.mark.slow
def test_what_prompts_share(work: Work) -> None:
    """The item last shares all but the item; the item first shares with no other item, nor with another review."""
    first, last = usual_prompts(work, item_first=True), usual_prompts(work, item_first=False)
    review = work.papers[0][1][0]["text"]
    assert len(first) == len(last) == 24 * len(work.reviews)
    assert all(review in text for text in [*first[:24], *last[:24]])
    assert shared_length(last[0], last[1]) > last[0].index(review) + len(review)
    assert max(shared_length(first[0], other) for other in first[1:24]) < first[0].index(review)
    title = work.papers[0][0]["title"]
    assert first[0].index(title) > first[0].index(review)
    paper_first = usual_prompts(replace(work, paper_first=True), item_first=True)
    assert paper_first[0].index(title) < paper_first[0].index(review)
    prompts = every_prompt(work, open_prompts(work))
    assert len(prompts) == len(first)
    assert distinct_tokens(prompts) < sum(map(len, prompts)) / 8


@pytest.mark.slow
def test_a_report_of_ways_without_vllm(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    engine, loop = transformers_engine(work).run(work), one_by_one(work).run(work)
    assert engine.num_items == 24 * len(work.reviews) == 24 * loop.num_items
    assert loop.num_tokens > 16 * loop.num_items
    values = [value for answers in engine.p_yes.values() for value in answers]
    assert 0 <= min(values) < 0.5 < max(values) <= 1
    ways = {name: Measured(1.0, [2.0, 4.0], engine) for name in ("vllm engine", "transformers engine")}
    for name in ("usual script", "usual, review first", "one by one", "one by one, one forward"):
        ways[name] = Measured(1.0, [8.0], loop)
    report(ways, every_prompt(work, open_prompts(work)))
    lines = capsys.readouterr().out.splitlines()
    assert "max |delta p_yes| between the engines 0.0e+00" in lines[6]
    assert lines[-1] == "ratio: 96.00"  # 24 times the items in a quarter of the time
