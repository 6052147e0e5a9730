"""`make bench-gpu` on a CPU: every figure runs with tiny models, and one that fails says so."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, gpu_training
from benchmarks.gpu_training import Shape, seen_pairs
from prefmill.families.causal.group_layout import pack
from tests.training_steps import qwen2


@pytest.mark.slow
@pytest.mark.parametrize("letter", sorted(gpu.figures().keys() - {"a2", "a3"}))  # these are a1 at other lengths
def test_a_figure_is_a_line(letter: str) -> None:
    found = gpu.line(letter, tiny=True)
    assert found.startswith(f"({letter}) ")
    assert "failed" not in found, found
    assert "\n" not in found


def test_a_figure_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tiny: bool) -> str:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu_training, "peak", fails)
    assert gpu.line("b", tiny=True).endswith("failed: ValueError: no such kernel")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_result_is_named_after_its_gpu() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_operations_are_those_that_torch_counts() -> None:
    """torch counts a forward pass, and attention as if every token saw every other one."""
    length, shape = 24, Shape(layers=2, width=64, key_width=32, inner=128, vocabulary=1000)
    model = qwen2("tiny")
    model.set_attn_implementation("eager")  # products that it has a count for
    with FlopCounterMode(display=False) as counted:
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    assert shape.flops(length, length, length**2) == 3 * counted.get_total_flops()


def test_pairs_of_queries_and_keys() -> None:
    packed = pack([([1] * 7, [[2] * 3, [3] * 5])])
    (segment,) = packed.segments or ()
    seen = torch.ones(15, 15, dtype=torch.bool).tril()
    first, second = (slice(*span) for span in segment.responses)
    seen[second, first] = False
    assert seen_pairs(7, [3, 5]) == seen.sum()
