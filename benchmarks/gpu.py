"""The decisive figures of one GPU, one line each, into benchmarks/results/gpu-NAME.txt. No download: random weights.

    python -m benchmarks.gpu                # on a machine with a GPU, after `make install-gpu`
    python -m benchmarks.gpu --only a,c
    python -m benchmarks.gpu --tiny         # the same with tiny models on a CPU, to see that it runs

Every figure has a process of its own; one that fails says so in its line, and the others go on. Targets: at least 40 %
of the GPU's peak at prompts of 24,000 tokens, 5 times TRL there, and memory within 10 % of `estimate`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from prefmill.core.errors import PrefmillError
from prefmill.distributed.devices import has_gpu
from prefmill.distributed.isolation import in_own_process

RESULTS = Path(__file__).parent / "results"
NO_GPU = "there is no GPU here: run this on a machine with one, or with --tiny to see that it runs"


def figures() -> Mapping[str, tuple[str, Callable[[bool], str]]]:
    """By its letter: the name of a figure, and the function that measures it, tiny or not."""
    from benchmarks import gpu_models, gpu_training

    return {
        "a1": ("DPO at 100/150 tokens beside TRL", gpu_training.short),
        "a2": ("DPO at 4,000/150 tokens beside TRL", gpu_training.middle),
        "a3": ("DPO at 24,000/600 tokens beside TRL", gpu_training.long),
        "b": ("peak memory at 28,000 tokens", gpu_training.peak),
        "c": ("attention of 4, 16, 64 responses", gpu_training.attention),
        "d": ("a 7B judge, 24 items", gpu_models.judge),
        "e": ("SDXL, 1024 x 1024, beside diffusers' recipe", gpu_models.sdxl),
        "f": ("masked diffusion, LLaDA-8B's width, 4 layers", gpu_models.masked_diffusion),
        "g": ("import to first step", gpu_training.first_step),
    }


def measure(letter: str, tiny: bool, result: Path) -> None:
    """Measure one figure and write it down."""
    result.write_text(figures()[letter][1](tiny))


def line(letter: str, tiny: bool) -> str:
    """A figure's line, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figure.txt"
        try:
            in_own_process(Path(folder), measure, letter, tiny, result)
        except PrefmillError as error:
            return f"({letter}) {figures()[letter][0]}: failed: {_last_line(error)}"
        return f"({letter}) {figures()[letter][0]}: {result.read_text()}"


def _last_line(error: PrefmillError) -> str:
    lines = [text for text in str(error).splitlines() if text.strip() and not text.lstrip().startswith("fix:")]
    return lines[-1].strip()


def main(arguments: list[str] | None = None) -> int:
    """Print the figures and write them; 2 where there is no GPU, 1 where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="letters, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU too; writes no result")
    given = parser.parse_args(arguments)
    if not given.tiny and not has_gpu():
        print(NO_GPU, file=sys.stderr)
        return 2
    wanted = given.only.split(",") if given.only else list(figures())
    lines = [machine()] if has_gpu() else []
    for letter in wanted:
        lines.append(line(letter, given.tiny))
        print(lines[-1], flush=True)
    if not given.tiny:
        (RESULTS / f"gpu-{slug(gpu_name())}.txt").write_text("\n".join(lines) + "\n")
    return int(any(": failed: " in text for text in lines))


def machine() -> str:
    """The GPU, and the versions that matter."""
    import torch
    import transformers

    return (
        f"{gpu_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def gpu_name() -> str:
    """The first GPU's name."""
    import torch

    return torch.cuda.get_device_name()


def slug(name: str) -> str:
    """A GPU's name as part of a file's: NVIDIA H100 80GB HBM3 is h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


if __name__ == "__main__":
    sys.exit(main())
