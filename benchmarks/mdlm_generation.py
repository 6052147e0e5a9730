"""Generation of a masked-diffusion model with a cached prefix, beside the plain sampler.

    python -m benchmarks.mdlm_generation

A small LLaDA with random weights, prompts of 64 and 256 tokens, 64 tokens an answer in blocks of 16, a step a
token, fp32. Random weights make the tokens' agreement the hardest case: nothing is sure. Processor seconds, median of
three runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from prefmill.families.mdlm.generation import Unmasking, generate

_HOW = Unmasking(64, 16, 64, 0.0, "low_confidence", 0)
_MASK = 2


def main() -> int:
    """Measure and print; returns 0."""
    model = small_model()
    print(f"{'prompt tokens':<16}{'plain s':>10}{'cached s':>10}{'times as fast':>16}{'same tokens':>14}")
    for length in (64, 256):
        prompts = np.random.default_rng(0).integers(5, 250, (2, length)).tolist()
        plain, told = timed(model, prompts, _HOW)
        cached, found = timed(model, prompts, replace(_HOW, prefix_cache=True))
        same = np.mean(np.array(told) == np.array(found))
        print(f"{length:<16}{plain:>10.2f}{cached:>10.2f}{plain / cached:>16.2f}{same:>14.0%}")
    print(f"ratio: {plain / cached:.2f}")
    return 0


def timed(model: Any, prompts: list[list[int]], how: Unmasking) -> tuple[float, list[list[int]]]:
    """Seconds for the answers, and the answers."""
    seconds, answers = [], []
    for _ in range(3):
        start = time.process_time()
        answers = generate(model, prompts, how, _MASK)
        seconds.append(time.process_time() - start)
    return median(seconds), answers


def small_model() -> Any:
    """Four layers of 256, its vocabulary bytes."""
    from prefmill.demo.text import Shape
    from prefmill.demo.toy_language import build_model
    from prefmill.families.mdlm.loading import load_diffusion_model

    shape = Shape(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768)
    with tempfile.TemporaryDirectory() as folder:
        return load_diffusion_model(str(build_model(Path(folder), ["how is it"] * 3, shape, seed=0)), precision="fp32")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
