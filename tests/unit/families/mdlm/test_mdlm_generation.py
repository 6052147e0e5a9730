"""Generation by unmasking: which tokens settle when, block after block; draws follow the model's probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefmill.demo.text import Shape
from prefmill.demo.toy_language import build_model
from prefmill.families.mdlm.evaluated_model import answer_ends, batches_by_length
from prefmill.families.mdlm.generation import Unmasking, generate, settled_at, takes_padding, until_end
from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer
from tests.conftest import REPOSITORY

MASK, VOCABULARY = 0, 6


class Fixed(nn.Module):
    """Logits for every place, whatever it is shown; `seen` keeps what that was."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen: list[list[int]] = []

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.logits.repeat(len(input_ids), 1, 1))


def how(**keys: Any) -> Unmasking:
    return Unmasking(**{"num_tokens": 4, "block_tokens": 4, "num_steps": 4, "temperature": 0.0,
                        "remasking": "low_confidence", "seed": 0, **keys})  # fmt: skip


def peaked(tokens: list[int], sureness: list[float]) -> Fixed:
    logits = torch.zeros(1, len(tokens), VOCABULARY)
    for place, (token, sure) in enumerate(zip(tokens, sureness, strict=True)):
        logits[0, place, token] = sure
    return Fixed(logits)


def test_the_surest_token_settles_first() -> None:
    model = peaked([1, 1, 2, 3, 4, 5], [9, 9, 2.0, 4.0, 3.0, 1.0])
    assert generate(model, [[1, 1]], how(), MASK) == [[2, 3, 4, 5]]
    assert [seen[2:] for seen in model.seen] == [[0, 0, 0, 0], [0, 3, 0, 0], [0, 3, 4, 0], [2, 3, 4, 0]]


def test_blocks_are_finished_one_after_another() -> None:
    model = peaked([1, 1, 2, 3, 4, 5], [9, 9, 1.0, 2.0, 8.0, 9.0])
    assert generate(model, [[1, 1]], how(block_tokens=2, num_steps=2), MASK) == [[2, 3, 4, 5]]
    assert [seen[2:] for seen in model.seen] == [[0, 0, 0, 0], [2, 3, 0, 0]]


def test_shifted_logits_are_read_one_place_before() -> None:
    model = peaked([1, 2, 3, 4, 5, 1], [9, 9, 9, 9, 9, 9])
    assert generate(model, [[1, 1]], how(), MASK, shifted=True) == [[2, 3, 4, 5]]


def test_a_mask_is_never_an_answer() -> None:
    model = peaked([MASK] * 6, [20.0] * 6)
    assert MASK not in generate(model, [[1, 1]], how(temperature=1.0), MASK)[0]


def test_draws_have_the_models_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.0])
    model = Fixed(probabilities.clamp_min(1e-9).log().expand(1, 6, -1).clone())
    answers = generate(model, [[1, 1]] * 2000, how(temperature=1.0, remasking="random"), MASK)
    found = torch.tensor(answers).flatten().bincount(minlength=VOCABULARY) / 8000
    assert (found - probabilities).abs().max() < 0.02


def plainly(model: Any, prompt: list[int], how: Unmasking, mask: int, shifted: bool) -> list[int]:
    """The papers' sampler for one prompt at temperature 0, token by token: full forwards, Python numbers, no batch."""

    def logits_of(ids: list[int]) -> list[list[float]]:
        with torch.no_grad():
            rows: list[list[float]] = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        return rows

    ids = prompt + [mask] * how.num_tokens
    num_blocks = how.num_tokens // how.block_tokens
    for block in range(num_blocks):
        places = range(len(prompt) + block * how.block_tokens, len(prompt) + (block + 1) * how.block_tokens)
        for count in settled_at(how.block_tokens, how.num_steps // num_blocks):
            given, free = logits_of(ids), logits_of([mask] * len(prompt) + ids[len(prompt) :])
            found = {}
            for place in (place for place in places if ids[place] == mask):
                at = place - shifted
                row = [u + (how.guidance + 1) * (c - u) for c, u in zip(given[at], free[at], strict=True)]
                row[mask] = -math.inf
                whole = math.log(sum(math.exp(value) for value in row))
                p = sorted((math.exp(value - whole) for value in row), reverse=True)
                sure = {
                    "low_confidence": p[0],
                    "margin": p[0] - p[1],
                    "entropy": sum(value * math.log(value) for value in p if value > 0),
                }
                found[place] = (sure[how.remasking], row.index(max(row)))
            for place in sorted(found, key=lambda place: -found[place][0])[:count]:
                ids[place] = found[place][1]
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def peaky(tiny_folder: Path) -> Any:
    loaded = load_diffusion_model(str(tiny_folder), precision="fp32").double()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(6.0)  # predictions far from uniform, so that the order of settling shows
    return loaded


PROMPTS = [[5, 9, 14, 20], [7, 30], [11, 12, 13, 40, 41, 42, 43], [50]]


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize(("block_tokens", "num_steps"), [(12, 5), (4, 12), (6, 4)])
@pytest.mark.parametrize(("guidance", "shifted"), [(0.0, False), (1.5, False), (0.0, True)])
def test_prompts_of_any_lengths_are_answered_as_the_papers_say(
    peaky: Any, remasking: str, block_tokens: int, num_steps: int, guidance: float, shifted: bool
) -> None:
    keys = {"num_tokens": 12, "block_tokens": block_tokens, "num_steps": num_steps}
    own = how(**keys, remasking=remasking, guidance=guidance)
    expected = [plainly(peaky, prompt, own, 2, shifted) for prompt in PROMPTS]
    assert generate(peaky, PROMPTS, own, 2, shifted) == expected
    assert len({token for row in expected for token in row}) > 4, "and they are no constant"


def test_the_remaskings_differ(peaky: Any) -> None:
    kinds = ("low_confidence", "margin", "entropy", "random")
    found = [generate(peaky, PROMPTS, how(num_tokens=12, block_tokens=12, num_steps=6, remasking=k), 2) for k in kinds]
    assert len({str(rows) for rows in found}) == 4


def test_an_answer_stops_at_its_first_end_and_leaves_the_batch(peaky: Any) -> None:
    own = how(num_tokens=12, block_tokens=4, num_steps=12)
    whole = generate(peaky, PROMPTS, own, 2)
    ends = {whole[0][1], whole[2][6]}
    seen: list[int] = []
    handle = peaky.register_forward_pre_hook(lambda _, __, keys: seen.append(len(keys["input_ids"])), with_kwargs=True)
    found = generate(peaky, PROMPTS, own, 2, end_ids=ends)
    handle.remove()
    assert found == [until_end(row, ends) for row in whole]
    assert len(found[0]) < 12 == len(whole[0])
    assert seen[0] == len(PROMPTS) > seen[-1]


@pytest.mark.parametrize("shifted", [False, True])
def test_a_cached_prefix_is_exact_where_it_does_not_change(tmp_path: Path, shifted: bool) -> None:
    """In one layer keys and values are of the tokens alone; in more, those of the block's first step are kept."""
    one, two = (build_model(tmp_path / str(n), ["how is it"] * 3, Shape(num_hidden_layers=n), seed=1) for n in (1, 2))
    for folder, steps, equal in ((one, 12, True), (two, 3, True), (two, 12, False)):
        model = load_diffusion_model(str(folder), precision="fp32").double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6.0)
        for guidance in (0.0, 1.0):
            keys = {"num_tokens": 12, "block_tokens": 4, "num_steps": steps, "guidance": guidance}
            plain = generate(model, PROMPTS, how(**keys), 2, shifted)
            cached = generate(model, PROMPTS, how(**keys, prefix_cache=True), 2, shifted)
            assert (plain == cached) == equal


def test_filling_up_is_tried_before_it_is_relied_on(peaky: Any) -> None:
    assert takes_padding(peaky)
    fixed = peaked([1] * 8, [1.0] * 8)
    fixed.get_input_embeddings = lambda: nn.Embedding(VOCABULARY, 2)  # type: ignore[assignment]
    assert not takes_padding(fixed)
    assert batches_by_length([3, 2, 3, 2, 2], 2, mixed=False) == [[1, 3], [4], [0, 2]]
    assert batches_by_length([3, 2, 3, 2, 2], 2, mixed=True) == [[1, 3], [4, 0], [2]]


def test_a_turns_end_ends_an_answer_too() -> None:
    folder = REPOSITORY.parent / "shared" / "data" / "mdlm" / "llada-tiny"
    if not folder.is_dir():
        pytest.skip("needs the tiny models in published form beside the checkout (shared/data/mdlm)")
    tokenizer = load_diffusion_tokenizer(str(folder))
    ends = answer_ends(nn.Module(), tokenizer)
    assert {str(tokenizer.convert_ids_to_tokens(token)) for token in ends} == {"<|eot_id|>", "<|endoftext|>"}


def test_steps_are_spread_evenly_and_must_divide() -> None:
    assert settled_at(7, 3) == [3, 2, 2]
    with pytest.raises(ValueError, match="multiple of block_tokens"):
        generate(peaked([1] * 6, [1.0] * 6), [[1, 1]], how(block_tokens=3), MASK)
