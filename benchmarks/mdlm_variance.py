"""The error of a masked-diffusion score difference: every estimator shipped, beside VRPO's independent draws.

    python -m benchmarks.mdlm_variance

Policy and reference share their draws, on Markov chains whose likelihoods are known exactly at any length (7, 32 and
128 tokens), on joints known by brute force and on a small model before and after preference training. Ratios are at the
same number of forwards. Printed: the variance at 1 to 64 draws and its ratio to independent draws; the slope of log
variance over log draws (-1: the error falls as draws grow); how often |estimate - truth| is within the standard error's
95 % interval at 64 draws. The last line is for machines: the smallest ratio at 2, 4 and 8 draws at 32 and 128 tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks import markov_chain
from benchmarks.exact_joints import Floats, near, random_joint
from prefmill.core.config import read_yaml, validate
from prefmill.core.stage import Task, load_stage
from prefmill.families.mdlm.config import Sampling
from prefmill.families.mdlm.estimator import Draws, block_sizes, draw
from prefmill.families.mdlm.evaluated_model import Likelihood

_CONFIGS = Path(__file__).parents[1] / "configs"
_DRAWS = (1, 2, 4, 8, 16, 64)
_T_95 = {8: 2.365, 64: 1.998}  # Student's t at 97.5 % for 7 and 63 degrees of freedom: 8 blocks, 64 single draws
Values = Callable[[Draws], Floats]  # of one response: weight x masked sum of the difference, [n]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)


def main() -> int:
    """Measure and print; returns 0."""
    ratios = []
    for length in (7, 32, 128):
        values, truths = chain_differences(length)
        found = _show(f"Markov chain, {length} tokens", length, values, truths, samples=200 if length > 32 else 400)
        ratios += found if length > 7 else []
    for title, tilt in (("strong", 1.0), ("weak", 0.5)):
        _show(f"joint by brute force, 10 tokens, {title} ties", 10, *_joint_differences(tilt), samples=400)
    with tempfile.TemporaryDirectory() as folder:
        _show(
            "model before and after preference training, 8 tokens", 8, *_trained_differences(Path(folder)), samples=400
        )
    print(f"ratio: {min(ratios):.2f}")
    return 0


def _show(title: str, length: int, values: Sequence[Values], truths: Sequence[float], samples: int) -> list[float]:
    """Print a table; returns the ratios of `balanced` to independent draws at 2, 4 and 8 draws."""
    print(f"\n{title}: mean variance over {len(values)} responses in nats squared, (ratio to iid)")
    print(f"{'':<12}" + "".join(f"{f'{n} draws':>18}" for n in _DRAWS) + f"{'slope':>8}{'coverage':>10}")
    table = {name: [variance(name, length, n, values, samples) for n in _DRAWS] for name in SAMPLINGS}
    for name, row in table.items():
        cells = [f"{value:.4f} ({base / value:.2f})" for value, base in zip(row, table["iid"], strict=True)]
        slope = np.polyfit(np.log(_DRAWS), np.log(row), 1)[0]
        covered = coverage(name, length, values, truths, samples)
        print(f"{name:<12}" + "".join(f"{cell:>18}" for cell in cells) + f"{slope:>8.2f}{covered:>10.1%}")
    return [base / value for base, value in zip(table["iid"][1:4], table["balanced"][1:4], strict=True)]


def variance(sampling: Sampling, length: int, num_draws: int, values: Sequence[Values], samples: int) -> float:
    """Of the estimate, the mean over responses."""
    generator = np.random.default_rng(0)
    drawn = [[draw(length, num_draws, sampling, generator) for _ in range(samples)] for _ in values]
    return float(
        np.mean([np.var([one(item).mean() for item in items]) for one, items in zip(values, drawn, strict=True)])
    )


def coverage(
    sampling: Sampling,
    length: int,
    values: Sequence[Values],
    truths: Sequence[float],
    samples: int,
    num_draws: int = 64,
) -> float:
    """How often the truth is within the 95 % interval of the standard error."""
    num_draws = _DRAWS[-1]
    generator, blocks, hits = np.random.default_rng(1), tuple(block_sizes(num_draws, sampling)), []
    for one, truth in zip(values, truths, strict=True):
        for _ in range(samples):
            found = Likelihood(length, tuple(one(draw(length, num_draws, sampling, generator))), blocks)
            hits.append(abs(found.bound - truth) <= _T_95[len(blocks)] * float(found.standard_error or 0))
    return float(np.mean(hits))


def chain_differences(length: int, count: int = 6) -> tuple[list[Values], list[float]]:
    """Differences of two near Markov chains on sequences drawn from the reference, and what they truly are."""
    reference = markov_chain.random_chain(8, length, seed=0)
    policy, generator = markov_chain.near(reference, 0.3, seed=1), np.random.default_rng(2)
    drawn = [reference.sample(generator) for _ in range(count)]

    def values(words: Any) -> Values:
        def of(draws: Draws) -> Floats:
            difference = policy.masked_logps(words, draws.masked) - reference.masked_logps(words, draws.masked)
            weighted: Floats = draws.weights * difference.sum(1)
            return weighted

        return of

    truths = [policy.log_probability(words) - reference.log_probability(words) for words in drawn]
    return [values(words) for words in drawn], truths


def _by_sums(sums: Floats) -> Values:
    """From the masked sums of a short response, [2^L]."""

    def of(draws: Draws) -> Floats:
        weighted: Floats = draws.weights * sums[draws.masked @ (1 << np.arange(draws.masked.shape[1]))]
        return weighted

    return of


def _joint_differences(tilt: float) -> tuple[list[Values], list[float]]:
    values, truths = [], []
    for seed in range(4):
        reference = random_joint(3, 10, seed, tilt)
        policy = near(reference, seed + 100, 0.1)
        place = np.random.default_rng(seed).choice(policy.table.size, p=policy.table.ravel())
        sequence = tuple(int(token) for token in np.unravel_index(place, policy.table.shape))
        values.append(_by_sums(policy.masked_sums(sequence) - reference.masked_sums(sequence)))
        truths.append(policy.log_probability(sequence) - reference.log_probability(sequence))
    return values, truths


def _trained_differences(folder: Path) -> tuple[list[Values], list[float]]:
    """Every masked sum of held-out answers under the demo's tuned model and its reference."""
    from benchmarks.exact_joints import all_masked_sums, moments_by_count
    from prefmill.families.causal.chat import encode
    from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of
    from prefmill.training.data import read_pairs

    toy = _run("toy_preferences", folder)
    sft = _run("mdlm_sft", folder, datasets=toy)
    dpo = _run("mdlm_dpo", folder, policy=sft, datasets=toy)
    tokenizer = load_diffusion_tokenizer(str(sft.path))
    reference, policy = (load_diffusion_model(str(item.path), precision="fp32") for item in (sft, dpo))
    mask = mask_token_of(reference, tokenizer)
    values, truths = [], []
    for pair in list(read_pairs(toy.file("dpo_clean_val/data.jsonl")))[:10]:
        for answer in (pair.chosen, pair.rejected):
            prompt, response = encode(tokenizer, pair.messages, answer)
            if len(response) != 7:
                continue
            # As in training, where an end token fills the block.
            response.append(tokenizer.eos_token_id)
            sums = all_masked_sums(policy, prompt, response, mask) - all_masked_sums(reference, prompt, response, mask)
            values.append(_by_sums(sums))
            truths.append(float(moments_by_count(sums, len(response))[0].mean()))
    return values, truths


def _run(name: str, folder: Path, **inputs: Any) -> Any:
    """A stage of the demo, by hand."""
    from prefmill.core.artifact import Provenance
    from prefmill.store.artifacts import publish

    stage = load_stage(name)
    output = folder / name
    output.mkdir()
    task = Task(
        "b", name, "all", {}, {}, {key: (item,) for key, item in inputs.items()}, output, folder / "logs" / name
    )
    stage.run(validate(stage.config, read_yaml(_CONFIGS / name / "demo.yaml")), task)
    return publish(output, stage.writes, Provenance("b", "all", name, {}, {}, "0", {}), {})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
