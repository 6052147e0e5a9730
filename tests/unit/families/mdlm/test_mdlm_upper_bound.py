"""The upper bound: its formula in float64, that it bounds on a small joint, and that the scorer gives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.exact_joints import random_joint
from prefmill.families.mdlm.family import Drawing, diffusion_family
from prefmill.families.mdlm.loading import load_diffusion_model
from prefmill.families.mdlm.scorer import encode_samples, patch_forward, score_batch, upper_bounds
from tests.unit.families.mdlm.test_mdlm_scorer import MASK, samples

LENGTH = 4
Conditionals = dict[tuple[int, int], float]  # p(token at a place | tokens of these bits known)


def of_joint(seed: int) -> Conditionals:
    """Those of one distribution, which agree with each other."""
    joint, sequence = random_joint(3, LENGTH, seed), (0, 2, 1, 0)
    found = {}
    for known in range(2**LENGTH):
        for place in (n for n in range(LENGTH) if not known >> n & 1):
            kept = tuple(sequence[n] if known >> n & 1 or n == place else slice(None) for n in range(LENGTH))
            before = tuple(sequence[n] if known >> n & 1 else slice(None) for n in range(LENGTH))
            found[place, known] = float(joint.table[kept].sum() / joint.table[before].sum())
    return found


def of_a_network(seed: int) -> Conditionals:
    """Drawn one by one, as a network's: they are of no one distribution."""
    generator = np.random.default_rng(seed)
    return {(n, known): float(generator.beta(0.7, 0.7)) for known in range(16) for n in range(4) if not known >> n & 1}


def exact(found: Conditionals) -> float:
    """log of the mean over all orders of the product: the likelihood of a model that writes in a random order."""
    products = [np.prod([found[n, sum(1 << m for m in order[:k])] for k, n in enumerate(order)])
                for order in permutations(range(LENGTH))]  # fmt: skip
    return float(np.log(np.mean(products)))


def maskings() -> Iterator[tuple[int, float]]:
    """Every mask, by its known tokens' bits, with its chance times its weight L / l under uniform counts."""
    for known in range(2**LENGTH - 1):
        masked = LENGTH - known.bit_count()
        chance = 1 / LENGTH / len([k for k in range(16) if k.bit_count() == known.bit_count()])
        yield known, chance * LENGTH / masked


def enumerated(found: Conditionals, power: float) -> float:
    terms = [(n, found[n, known], weight) for known, weight in maskings() for n in range(4) if not known >> n & 1]
    places, values, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*terms, strict=True))
    lengths = torch.tensor([LENGTH])
    owner = torch.zeros(len(terms), dtype=torch.long)
    return upper_bounds(values.log(), owner, places.long(), weights, lengths, LENGTH, power).item()


def lower(found: Conditionals) -> float:
    return sum(w * np.log(found[n, known]) for known, w in maskings() for n in range(4) if not known >> n & 1)


@pytest.mark.parametrize("seed", range(20))
def test_the_likelihood_lies_between_the_bounds(seed: int) -> None:
    for found in (of_joint(seed), of_a_network(seed)):
        assert lower(found) <= exact(found) + 1e-12
        assert exact(found) <= enumerated(found, power=LENGTH) + 1e-12  # Hoelder: from the number of tokens on
        bounds = [enumerated(found, power) for power in (1e-6, 0.5, 1.0, 1.5, 4.0, 20.0)]
        assert bounds == sorted(bounds)
        assert bounds[0] == pytest.approx(lower(found), abs=1e-3)  # its limit for small powers
    joint = random_joint(3, LENGTH, seed)
    # Of one distribution any order gives the same, so the lower bound is exact and any power bounds.
    assert lower(of_joint(seed)) == pytest.approx(exact(of_joint(seed)))
    assert exact(of_joint(seed)) == pytest.approx(joint.log_probability((0, 2, 1, 0)))
    assert exact(of_joint(seed)) < enumerated(of_joint(seed), power=0.5)


def test_a_small_power_may_lie_below_the_likelihood_of_a_network() -> None:
    """What the page says of 1.5: tokens that are all likely in the same orders are likelier than each by itself."""
    found = {(n, known): 0.9 if known in (0, 1, 3, 7) and n == known.bit_count() else 1e-6
             for known in range(16) for n in range(4) if not known >> n & 1}  # fmt: skip
    assert enumerated(found, power=1.0) < exact(found) < enumerated(found, power=LENGTH)


def test_it_is_its_formula_one_token_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    count, width, power = 60, 7, 1.5
    sample = torch.randint(0, 3, (count,), generator=generator)
    column = torch.randint(0, width - 1, (count,), generator=generator)
    logps = (200 * torch.randn(count, generator=generator, dtype=torch.float64) - 300).requires_grad_()
    weights, lengths = torch.rand(count, generator=generator) + 0.1, torch.tensor([9, 6, 7])
    found = upper_bounds(logps, sample, column, weights, lengths, width, power)
    for s in range(3):
        tokens = []
        for n in range(width):
            mine = (sample == s) & (column == n)
            if mine.any():
                mass = weights[mine].double() / weights[mine].double().sum()
                # The largest taken out by hand: exp(-450) is 0.
                top = logps[mine].max().item()
                mean = (mass * torch.exp(power * (logps[mine].detach() - top))).sum().item()
                tokens.append(np.log(mean) / power + top)
        assert found[s].item() == pytest.approx(np.mean(tokens) * lengths[s].item(), rel=1e-9)
    found.sum().backward()
    assert torch.isfinite(logps.grad).all()
    small = torch.randn(20, generator=generator, dtype=torch.float64, requires_grad=True)
    given = (sample[:20], column[:20], weights[:20], lengths, width, power)
    torch.autograd.gradcheck(lambda values: upper_bounds(values, *given), (small,))


@pytest.mark.parametrize("forward_batch_size", [1, 3, 64])
def test_the_scorer_gives_it_beside_the_draws(tiny_folder: Path, forward_batch_size: int) -> None:
    model: Any = load_diffusion_model(str(tiny_folder), precision="fp32").double()
    rows, drawing = samples(), Drawing(8, "balanced", 0, upper_power=1.5)
    batch = encode_samples(rows, [drawing.of(*row, 0) for row in rows], upper_power=1.5)
    tokens: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for s, end in enumerate(batch.ends):
        clean, masked = batch.input_ids[s, :end], batch.masked[s, :, :end]
        logps = model(input_ids=torch.where(masked, MASK, clean)).logits.double().log_softmax(-1)
        for draw, place in masked.nonzero().tolist():
            value = logps[draw, place, clean[place]].item()
            tokens.setdefault((s, place), []).append((batch.weights[s, draw, place].item(), value))
    means = {key: np.log(np.average([np.exp(1.5 * v) for _, v in found], weights=[w for w, _ in found])) / 1.5
             for key, found in tokens.items()}  # fmt: skip
    expected = [np.mean([v for (owner, _), v in means.items() if owner == s]) * len(rows[s][1]) for s in range(5)]
    patch_forward(model, mask_token_id=MASK, forward_batch_size=forward_batch_size)
    found = score_batch(model, batch)
    assert found.shape == (5, 9)
    assert (found[:, :8] - score_batch(model, replace(batch, upper_power=None))).abs().max() == 0
    assert found[:, 8].tolist() == pytest.approx(expected, rel=1e-6)
    found[:, 8].sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_a_reference_of_the_same_draws_gives_the_margin_0_at_the_start(tiny_folder: Path) -> None:
    from prefmill.training.data import Group, Pair
    from prefmill.training.objectives import Settings, mix

    model: Any = load_diffusion_model(str(tiny_folder), precision="fp32")
    patch_forward(model, mask_token_id=MASK)
    family = diffusion_family(Drawing(4, "balanced", 0, upper_power=1.5))
    group = Group([5, 6], [[7, 8, 9], [10, 11]], [Pair("a", 0, 1)])
    batch = family.encode([group], [SimplePart(0, (0,))], 0)
    with torch.no_grad():
        values = family.score(model, batch)
        scores = family.pair_scores(model, batch, values[batch.chosen], values[batch.rejected])
    objective = mix(["spg", "espo"], [1.0, 0.0], Settings(0.1), family.supplies)
    assert objective.loss(scores, Settings(0.1)).item() == pytest.approx(np.log(2), abs=1e-6)


class SimplePart:
    """As the batch plan names pairs of a group."""

    def __init__(self, group: int, pairs: tuple[int, ...]) -> None:
        self.group, self.pairs = group, pairs
